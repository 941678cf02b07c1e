"""This machine's processes, as far as the system shows them, and how backends are ended.

The system may refuse any query: a process is gone or belongs to another user, or there is no /proc.
All such refusals are caught here, in :func:`ask`.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")

# In the environment of a backend and, by inheritance, of whatever it starts. The environment is the
# one thing that a process keeps when it leaves its parent, its group and its session.
MARK = "BACKEND_OF_MLXPROXY"
_MARK = re.compile(
    r"([0-9]{1,9}):([0-9]{1,9})(?:\+([0-9]{1,9}))?(?:~([0-9]{1,9}))?:(.+)", re.DOTALL
)
POLL = 0.02


def ask(question: Callable[[], T]) -> T | None:
    """Return what psutil answers; None if the system does not tell."""
    try:
        return question()
    except (psutil.Error, OSError, NotImplementedError, RuntimeError, ValueError):
        return None


def every() -> list[psutil.Process]:
    """Return all processes that the system shows."""
    return ask(lambda: list(psutil.process_iter())) or []


def at(pid: int | None) -> psutil.Process | None:
    """Return the process with that pid, if there is one."""
    return None if pid is None else ask(lambda: psutil.Process(pid))


def lives(process: psutil.Process) -> bool:
    """Return whether it runs: a zombie has exited, and a pid may have been reused."""
    return bool(
        ask(lambda: process.is_running() and process.status() != psutil.STATUS_ZOMBIE),
    )


@dataclass(frozen=True)
class Mark:
    """The mark of the backend that a process belongs to.

    Attributes:
        proxy: the pid of the proxy that started it.
        first_port: the port of that proxy's first slot.
        instance: the proxy's instance folder.
        slot: the number of the backend's slot; 0 for a standby, which has none when it starts.
        standby: the number of the standby, from 1; 0 for a process started for a load.
    """

    proxy: int
    first_port: int
    instance: str
    slot: int = 0
    standby: int = 0

    @property
    def port(self) -> int:
        """The backend's port."""
        return self.first_port + self.slot

    @classmethod
    def of(cls, process: psutil.Process) -> Mark | None:
        """Return the mark that the process carries; None if it shows none."""
        value = (ask(process.environ) or {}).get(MARK, "")
        found = _MARK.fullmatch(value)
        if found is None:
            return None
        return cls(int(found[1]), int(found[2]), found[5], int(found[3] or 0), int(found[4] or 0))

    @classmethod
    def own(cls, first_port: int, instance: Path, slot: int = 0) -> Mark:
        """Return the mark for this process's backend in that slot."""
        return cls(os.getpid(), first_port, os.path.realpath(instance), slot)

    def environment(self) -> dict[str, str]:
        """Return the environment variable that a backend is started with."""
        place = f"{self.first_port}+{self.slot}" if self.slot else str(self.first_port)
        if self.standby:
            place += f"~{self.standby}"
        return {MARK: f"{self.proxy}:{place}:{self.instance}"}

    def master(self, process: psutil.Process) -> psutil.Process | None:
        """Return the proxy that started a process with this mark, if it still lives.

        A process that reuses a dead proxy's pid is younger than those that the proxy started.
        """
        proxy = at(self.proxy)
        born, begun = ask(process.create_time), proxy and ask(proxy.create_time)
        if proxy is None or not born or not begun or begun > born or not lives(proxy):
            return None
        return proxy


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """Return all descendants of a process: its children, their children, and so on."""
    return ask(lambda: process.children(recursive=True)) or []


def family(leader: psutil.Process | None, mark: Mark) -> set[psutil.Process]:
    """Return the living members of a backend: its descendants, its session, those with its mark."""
    found = {process for process in every() if Mark.of(process) == mark}
    if leader is not None:
        found |= {leader, *_session(leader)}
    for process in list(found):
        found.update(descendants(process))
    return {process for process in found if lives(process)}


def _session(leader: psutil.Process) -> list[psutil.Process]:
    """Return the processes of the leader's session; none if its pid has been reused."""
    if ask(leader.is_running) is False and ask(lambda: psutil.pid_exists(leader.pid)):
        return []
    return [it for it in every() if _session_of(it) == leader.pid]


def _session_of(process: psutil.Process) -> int | None:
    return ask(lambda: os.getsid(process.pid))


def terminate(processes: Collection[psutil.Process]) -> None:
    """Send SIGTERM to each; leave a reused pid alone (psutil compares start times)."""
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            process.terminate()


def wait(processes: Collection[psutil.Process], deadline: float) -> list[psutil.Process]:
    """Wait until the processes exit, or until `deadline` (monotonic); return those that live on.

    psutil's own wait would reap our children, and considers a zombie that nobody reaps alive.
    """
    left = [process for process in processes if lives(process)]
    while left and time.monotonic() < deadline:
        time.sleep(POLL)
        left = [process for process in left if lives(process)]
    return left


def kill(find: Callable[[], Collection[psutil.Process]], seconds: float) -> list[psutil.Process]:
    """Send SIGKILL to all that are found, and to what they start meanwhile, until none is left.

    Returns:
        Those that live on after `seconds`: a process that waits for a lost disk cannot be killed.
    """
    deadline = time.monotonic() + seconds
    while True:
        left = [process for process in find() if lives(process)]
        if not left or time.monotonic() > deadline:
            return left
        for process in left:
            with contextlib.suppress(psutil.Error, OSError):
                process.kill()
        wait(left, min(deadline, time.monotonic() + 0.5))
