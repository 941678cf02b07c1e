"""One proxy per backend port: the lock, the record of our child, and reclaiming an orphan.

`mlx_lm.server` notices nothing of its parent's death. A proxy that was killed leaves it running,
with the model's memory and the port. The next proxy finds it by the mark in its environment
(`processes.Mark`) or, where the system shows no environment, by what is recorded here. A backend
whose proxy lives is nobody's orphan, whatever has become of the lock's file.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from mlxproxy.backend import processes
from mlxproxy.backend.processes import Mark, ask
from mlxproxy.errors import LoadFailed
from mlxproxy.files import note, read_record, remove, write_record
from mlxproxy.instance import Instance

log = logging.getLogger("mlxproxy.backend.ownership")

CLOCK_TOLERANCE = 2.0  # seconds; Linux derives a start time from the boot time, which NTP may move
KILL_TIMEOUT = 10.0  # seconds from SIGKILL to an orphan's end


class AlreadyRunning(Exception):
    """Another proxy owns the backend port; the message is the sentence for the user."""


@dataclass(frozen=True)
class Record:
    """What is known of a process: of a proxy, or of its child.

    Attributes:
        pid: None before the start.
        created: when the process began, in Unix seconds; None where the system does not tell.
        command: its command line, for a child.
        since: when this was recorded.
    """

    pid: int | None = None
    created: float | None = None
    command: tuple[str, ...] = ()
    since: float = 0.0

    @classmethod
    def read(cls, path: Path) -> Record:
        """Return what is in the file, an empty record where it is none of ours."""
        found = read_record(path)
        pid = found.get("pid")
        command = found.get("command")
        if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
            command = []
        return cls(
            pid if isinstance(pid, int) and 1 < pid < 1 << 31 else None,  # 1: JSON's true, too
            _number(found.get("created")),
            tuple(command),
            _number(found.get("since")) or 0.0,
        )

    def process(self) -> psutil.Process | None:
        """Return the process that was recorded, if it still lives."""
        process = processes.at(self.pid)
        if process is None or self.created is None or not processes.lives(process):
            return None
        begun = ask(process.create_time)
        return process if begun and abs(begun - self.created) < CLOCK_TOLERANCE else None

    def is_of(self, process: psutil.Process) -> bool:
        """Whether that process was started with the command (a script shows its interpreter)."""
        words = self.command[1:]
        return bool(words) and tuple(ask(process.cmdline) or ())[-len(words) :] == words


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
        files = Instance(instance)
        self._record = files.backend(port)
        self._holder = files.proxy(port)
        instance.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(files.lock(port))
        self.mark = Mark.own(port, instance)

    def acquire(self) -> None:
        """Take the port for this process and end the orphans of a predecessor that was killed.

        Raises:
            AlreadyRunning: another proxy has it.
            OSError: the lock cannot be used.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise self._taken(Record.read(self._holder).pid) from None
        holder = self.holder() or self._master()  # somebody may have deleted the file of its lock
        if holder is not None:
            self._lock.release()
            raise self._taken(holder.pid)
        created = ask(lambda: psutil.Process().create_time())
        note(self._holder, {"pid": os.getpid(), "created": created})
        self._reclaim()

    def _taken(self, pid: int | None) -> AlreadyRunning:
        who = f" (pid {pid})" if pid else ""
        return AlreadyRunning(
            f"mlxproxy is already running{who} with the backend port {self._port}. Stop it, or "
            "set MLX_BACKEND_PORT and PROXY_PORT to other ports."
        )

    def holder(self) -> psutil.Process | None:
        """Return the living proxy, other than this process, that has recorded the port as its."""
        process = Record.read(self._holder).process()
        return process if process is not None and process.pid != os.getpid() else None

    def _master(self) -> psutil.Process | None:
        """Return the living proxy of a backend that runs for this folder and port."""
        for process, mark in self._marked():
            master = mark.master(process)
            if master is not None and master.pid != os.getpid():
                return master
        return None

    def release(self) -> None:
        """Give the port up and remove what was recorded."""
        for path in (self._record, self._holder):
            remove(path)
        self._lock.release()

    # -- the record of our child

    def starting(self, command: Sequence[str]) -> None:
        """Record what is about to start, so that no moment leaves a process nobody knows.

        Raises:
            LoadFailed: it cannot be recorded, so nothing must be started.
        """
        try:
            write_record(self._record, {"command": list(command), "since": time.time()})
        except OSError as error:
            reason = error.strerror or str(error)
            log.error("%s cannot be written: %s", self._record, reason)
            raise LoadFailed(
                "No backend was started, because it could not be recorded in the instance folder "
                f"({reason}). Free some space on that folder's disk, or make the folder writable."
            ) from None

    def started(self, command: Sequence[str], pid: int) -> None:
        """Record the pid; where that fails, the record before the start is still there."""
        record: dict[str, Any] = {"command": list(command), "since": time.time(), "pid": pid}
        record["created"] = ask(lambda: psutil.Process(pid).create_time())
        note(self._record, record)

    def stopped(self) -> None:
        """Forget the child: it has been reaped."""
        remove(self._record)

    def orphans(self) -> list[psutil.Process]:
        """Return what still runs of a proxy that was killed: told by its mark, or by the record."""
        found = {process for process, mark in self._marked() if mark.master(process) is None}
        if (recorded := self._recorded()) is not None:
            found.add(recorded)
        return sorted((it for it in found if processes.lives(it)), key=lambda it: it.pid)

    def _marked(self) -> list[tuple[psutil.Process, Mark]]:
        """Return the processes that were started for this folder and port, by whatever proxy."""
        ours = (self.mark.port, self.mark.instance)
        marked = ((process, Mark.of(process)) for process in processes.every())
        return [(it, mark) for it, mark in marked if mark and (mark.port, mark.instance) == ours]

    def _recorded(self) -> psutil.Process | None:
        record = Record.read(self._record)
        if record.pid is not None:
            process = record.process()
            return (
                process if process and record.is_of(process) and not _has_proxy(process) else None
            )
        for process in processes.every():  # killed between the start and the record of its pid
            if record.is_of(process) and not _has_proxy(process):
                begun = ask(process.create_time)
                if begun and begun >= record.since - CLOCK_TOLERANCE:
                    return process
        return None

    def _reclaim(self) -> None:
        """End the orphans and what they have started, so that memory and port are back."""
        orphans = self.orphans()
        if orphans:
            pids = ", ".join(str(process.pid) for process in orphans)
            log.warning(
                "the backend of a killed proxy is still running (pid %s): stopping it", pids
            )
            family = set(orphans).union(*map(processes.descendants, orphans))
            processes.terminate(family)
            processes.wait(family, time.monotonic() + self._stop_timeout)
            if left := processes.kill(lambda: family | set(self.orphans()), KILL_TIMEOUT):
                log.error("pid %d cannot be killed", left[0].pid)
        remove(self._record)


def _has_proxy(process: psutil.Process) -> bool:
    """Whether the parent is a proxy that lives (an orphan's is `init`)."""
    parent = ask(process.parent)
    words = (ask(parent.cmdline) or []) if parent is not None else []
    return "serve" in words and any(Path(word).name == "mlxproxy" for word in words)


def _number(value: object) -> float | None:
    """Return a number that can be computed with, None for another: JSON's may be NaN or endless."""
    if isinstance(value, (int, float)) and abs(value) < 1e15:
        return float(value)
    return None
