"""The costs of processes, and how the benchmark starts and ends them."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return the processor time that these processes have used, including all their threads."""
    if sys.platform == "linux":  # to the nanosecond; /proc counts in steps of 10 ms
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def resident_bytes(pids: Sequence[int]) -> int:
    """Return the total resident memory of these processes."""
    return sum(int(psutil.Process(pid).memory_info().rss) for pid in pids)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], seconds: float, what: str, pause: float = 0.005) -> None:
    """Wait until the condition is true.

    Raises:
        TimeoutError: it was not true within `seconds`; the message contains `what`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(pause)


def accepts(port: int) -> bool:
    """Return whether something listens on 127.0.0.1:`port`."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextlib.contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that is terminated, gracefully first, when the block is left."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
