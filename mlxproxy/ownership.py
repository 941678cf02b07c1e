"""One proxy per backend port: the lock, the record of our child, and reclaiming an orphan.

`mlx_lm.server` notices nothing of its parent's death. A proxy that was killed leaves it running,
with the model's memory and the port, so the next proxy finds it by what is recorded here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from mlxproxy.files import read_json, write_json

log = logging.getLogger("mlxproxy.ownership")

CLOCK_TOLERANCE = 2.0  # seconds; Linux derives a start time from the boot time, which NTP may move


class AlreadyRunning(Exception):
    """Another proxy owns the backend port; the message is the sentence for the user."""


class Ownership:
    """The right to run a backend on one port, as files in the instance folder.

    Args:
        instance: the instance folder; made if missing.
        port: the backend's port.
        stop_timeout: seconds between SIGTERM and SIGKILL for an orphan.
    """

    def __init__(self, instance: Path, port: int, stop_timeout: float = 10.0) -> None:
        self._port = port
        self._stop_timeout = stop_timeout
        self._record = instance / f"backend-{port}.json"
        self._holder = instance / f"proxy-{port}.json"
        instance.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(instance / f"backend-{port}.lock")

    def acquire(self) -> None:
        """Takes the port for this process and ends the orphan of a predecessor that was killed.

        Raises:
            AlreadyRunning: another proxy has it.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            holder = self.holder()
            who = f" (pid {holder})" if holder else ""
            raise AlreadyRunning(
                f"mlxproxy is running already{who} with the backend port {self._port}. Stop it, "
                "or set MLX_BACKEND_PORT and PROXY_PORT to other ports."
            ) from None
        write_json(self._holder, {"pid": os.getpid(), "started": time.time()})
        self.reclaim()

    def holder(self) -> int | None:
        """The pid of the proxy that has, or last had, the port."""
        pid = read_json(self._holder).get("pid")
        return pid if isinstance(pid, int) else None

    def release(self) -> None:
        """Gives the port up and removes what was recorded."""
        for path in (self._record, self._holder):
            path.unlink(missing_ok=True)
        self._lock.release()

    # -- the record of our child

    def starting(self, command: Sequence[str]) -> None:
        """Recorded before the start, so that no moment leaves a process nobody knows."""
        write_json(self._record, {"command": list(command), "since": time.time()})

    def started(self, command: Sequence[str], pid: int) -> None:
        """Recorded once the pid is known."""
        record: dict[str, Any] = {"command": list(command), "since": time.time(), "pid": pid}
        with contextlib.suppress(psutil.Error):
            record["created"] = psutil.Process(pid).create_time()
        write_json(self._record, record)

    def stopped(self) -> None:
        """The child has been reaped."""
        self._record.unlink(missing_ok=True)

    def orphan(self) -> psutil.Process | None:
        """The recorded child if it still runs: told by pid, start time and command together."""
        record = read_json(self._record)
        command = record.get("command")
        if not isinstance(command, list):
            return None
        if isinstance(record.get("pid"), int):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(record["pid"])
                if _is(process, command, record.get("created")):
                    return process
            return None
        for process in psutil.process_iter():  # killed between the start and the record of its pid
            with contextlib.suppress(psutil.Error):
                young = process.create_time() >= record.get("since", 0) - CLOCK_TOLERANCE
                if young and _is(process, command, None):
                    return process
        return None

    def reclaim(self) -> None:
        """Ends the orphan and its group, so that its memory and the port are back."""
        process = self.orphan()
        if process is not None:
            log.warning(
                "the backend of a proxy that was killed still runs (pid %d): ending it", process.pid
            )
            family = [process]
            with contextlib.suppress(psutil.Error):
                family += process.children(recursive=True)
            for member in family:
                with contextlib.suppress(psutil.Error):
                    member.terminate()
            _, alive = psutil.wait_procs(family, self._stop_timeout)
            for member in alive:
                with contextlib.suppress(psutil.Error):
                    member.kill()
            psutil.wait_procs(alive, self._stop_timeout)
        self._record.unlink(missing_ok=True)


def _is(process: psutil.Process, command: list[str], created: float | None) -> bool:
    """Whether the process was started with the command (a script shows its interpreter first)."""
    if process.status() == psutil.STATUS_ZOMBIE:
        return False
    if created is not None and abs(process.create_time() - created) > CLOCK_TOLERANCE:
        return False
    return process.cmdline()[-len(command[1:]) :] == command[1:]
