"""Records of the proxy's backends, and cleanup of the backends that a killed proxy left behind.

`mlx_lm.server` does not notice that its parent has died. A killed proxy leaves its backends
running, with their memory and their ports. The next proxy finds each by the mark in its environment
(`processes.Mark`) or, if the system does not show the environment, by its record here.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mlxproxy.backend import processes
from mlxproxy.backend.processes import Mark, ask
from mlxproxy.errors import LoadFailed
from mlxproxy.files import note, read_record, remove, write_record
from mlxproxy.instance import Instance

log = logging.getLogger("mlxproxy.backend.orphan")

CLOCK_TOLERANCE = 2.0  # seconds; Linux derives a start time from the boot time, which NTP may move
KILL_TIMEOUT = 10.0  # seconds from SIGKILL to an orphan's exit


@dataclass(frozen=True)
class Record:
    """The known facts about a process: a proxy, or a child of one.

    Attributes:
        pid: None before the start.
        created: when the process started, in Unix seconds; None if the system does not tell.
        command: its command line, for a child.
        since: when this was recorded.
        first_port: the first backend port of the proxy that started it; None for a proxy.
    """

    pid: int | None = None
    created: float | None = None
    command: tuple[str, ...] = ()
    since: float = 0.0
    first_port: int | None = None

    @classmethod
    def read(cls, path: Path) -> Record:
        """Return the record in the file, or an empty one if the file holds no valid record."""
        found = read_record(path)
        pid, first_port = found.get("pid"), found.get("first_port")
        command = found.get("command")
        if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
            command = []
        return cls(
            pid if isinstance(pid, int) and 1 < pid < 1 << 31 else None,  # 1: JSON's true, too
            _number(found.get("created")),
            tuple(command),
            _number(found.get("since")) or 0.0,
            first_port if isinstance(first_port, int) else None,
        )

    def process(self) -> psutil.Process | None:
        """Return the process that was recorded, if it still lives."""
        process = processes.at(self.pid)
        if process is None or self.created is None or not processes.lives(process):
            return None
        begun = ask(process.create_time)
        return process if begun and abs(begun - self.created) < CLOCK_TOLERANCE else None

    def is_of(self, process: psutil.Process) -> bool:
        """Return whether that process was started with the command (a script shows its interpreter
        first)."""
        words = self.command[1:]
        return bool(words) and tuple(ask(process.cmdline) or ())[-len(words) :] == words


class ChildRecord:
    """The record of the backend in one slot, or of the standby, in case this proxy is killed.

    Args:
        instance: the instance folder.
        first_port: the port of the first slot.
        slot: the slot's number; its backend's port is `first_port + slot`. None: the standby.

    Attributes:
        mark: what the backend carries in its environment.
    """

    def __init__(self, instance: Path, first_port: int, slot: int | None = 0) -> None:
        self.mark = Mark.own(first_port, instance, slot or 0)
        files = Instance(instance)
        self._path = files.standby(first_port) if slot is None else files.backend(self.mark.port)

    def starting(self, command: Sequence[str]) -> None:
        """Record what is about to start, so that there is never an unrecorded process.

        Raises:
            LoadFailed: it cannot be recorded, so nothing may be started.
        """
        try:
            write_record(self._path, self._told(command))
        except OSError as error:
            reason = error.strerror or str(error)
            log.error("%s cannot be written: %s", self._path, reason)
            raise LoadFailed(
                "No backend was started, because it could not be recorded in the instance folder "
                f"({reason}). Free some space on that folder's disk, or make the folder writable."
            ) from None

    def started(self, command: Sequence[str], pid: int) -> None:
        """Record the pid; if that fails, the record from before the start remains."""
        created = ask(lambda: psutil.Process(pid).create_time())
        note(self._path, {**self._told(command), "pid": pid, "created": created})

    def stopped(self) -> None:
        """Remove the record of the child, which has been reaped."""
        remove(self._path)

    def _told(self, command: Sequence[str]) -> dict[str, Any]:
        since, first_port = time.time(), self.mark.first_port
        return {"command": list(command), "since": since, "first_port": first_port}


class Orphans:
    """The backends of killed proxies that used this instance folder and one of these ports.

    A predecessor with the same first port may have had more slots: its backends are found, too. A
    backend whose proxy lives is no orphan, even if the lock file has been deleted.

    Args:
        instance: the instance folder.
        ports: those of this proxy's backends.
        stop_timeout: seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, instance: Path, ports: range, stop_timeout: float = 10.0) -> None:
        self._ports = ports
        self._stop_timeout = stop_timeout
        self._files = Instance(instance)
        self._instance = Mark.own(ports.start, instance).instance

    def find(self) -> list[psutil.Process]:
        """Return the processes of killed proxies that still run, found by their mark or record."""
        found = {process for process, mark in self._marked() if mark.master(process) is None}
        for _, record in self._records():
            if (recorded := _recorded(record)) is not None:
                found.add(recorded)
        return sorted((each for each in found if processes.lives(each)), key=lambda each: each.pid)

    def masters(self) -> list[psutil.Process]:
        """Return the living proxies whose backends run on these ports."""
        masters = (mark.master(process) for process, mark in self._marked())
        return [master for master in masters if master is not None]

    def reclaim(self) -> None:
        """Stop the orphans and all processes that they started, to free their memory and ports."""
        records = [path for path, _ in self._records()]
        orphans = self.find()
        if orphans:
            pids = ", ".join(str(process.pid) for process in orphans)
            log.warning(
                "the backend of a killed proxy is still running (pid %s): stopping it", pids
            )
            family = set(orphans).union(*map(processes.descendants, orphans))
            processes.terminate(family)
            processes.wait(family, time.monotonic() + self._stop_timeout)
            if left := processes.kill(lambda: family | set(self.find()), KILL_TIMEOUT):
                log.error("pid %d cannot be killed", left[0].pid)
        for path in records:
            remove(path)

    def _marked(self) -> Iterator[tuple[psutil.Process, Mark]]:
        """Yield the processes that any proxy started as backends on these ports."""
        for process in processes.every():
            mark = Mark.of(process)
            if mark and mark.instance == self._instance and self._has(mark.port, mark.first_port):
                yield process, mark

    def _records(self) -> Iterator[tuple[Path, Record]]:
        """Yield the records of backends on these ports, and of standbys."""
        for path in self._files.folder.glob("*.json"):
            port = re.fullmatch(r"(?:backend|standby)-([0-9]{1,5})\.json", path.name)
            if port is not None:
                record = Record.read(path)
                if self._has(int(port[1]), record.first_port):
                    yield path, record

    def _has(self, port: int, first_port: int | None) -> bool:
        return port in self._ports or first_port == self._ports.start


def _recorded(record: Record) -> psutil.Process | None:
    """Return the orphan that a record describes, if it still runs."""
    if record.pid is not None:
        process = record.process()
        return process if process and record.is_of(process) and not _has_proxy(process) else None
    for process in processes.every():  # killed between the start and the record of its pid
        if record.is_of(process) and not _has_proxy(process):
            begun = ask(process.create_time)
            if begun and begun >= record.since - CLOCK_TOLERANCE:
                return process
    return None


def _has_proxy(process: psutil.Process) -> bool:
    """Return whether the parent is a living proxy (an orphan's parent is `init`)."""
    parent = ask(process.parent)
    words = (ask(parent.cmdline) or []) if parent is not None else []
    return "serve" in words and any(Path(word).name == "mlxproxy" for word in words)


def _number(value: object) -> float | None:
    """Return a finite number; None for another value: JSON numbers may be NaN or infinite."""
    if isinstance(value, (int, float)) and abs(value) < 1e15:
        return float(value)
    return None
