"""The standby: one process that has imported its program and waits for the load that it will serve.

Python and the program's imports take most of the start of a small model. So, while the proxy is
idle, it starts the process of the next load before anybody asks for one. It is the same process in
every respect: its output, which is read from then on, its session, its environment, its stop.
Whatever is wrong with it, it is thrown away, and the load starts a process of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from mlxproxy.backend import memory
from mlxproxy.backend.launch import Launched, launch
from mlxproxy.backend.orphan import ChildRecord
from mlxproxy.backend.processes import Mark
from mlxproxy.backend.protocol import Command, Engine, StandbyCommand, StandbyEngine, StandbyLink
from mlxproxy.errors import LoadFailed

log = logging.getLogger("mlxproxy.backend.standby")

LOOK_SECONDS = 1.0  # between two looks at whether one is needed; two in a row must be idle
TAKE_SECONDS = 5.0  # from the command line to its confirmation, which may follow a `prepare`
KILL_SECONDS = 5.0
NEEDED_BYTES = 250_000_000  # measured: 75 MB after the imports, 135 MB with a tokenizer


class Standby:
    """The one standby of a proxy. It has no process before :meth:`watch`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # for a few assignments; never held while a process starts
        self._engine: StandbyEngine | None = None  # of the last load that succeeded
        self._waiting: _Waiting | None = None
        self._count = 0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """The process id; None if there is no process."""
        waiting = self._waiting
        return waiting.launched.process.pid if waiting else None

    @property
    def is_ready(self) -> bool:
        """Whether there is a process that can take a load."""
        waiting = self._waiting
        return waiting is not None and waiting.is_ready()

    def memory(self) -> int:
        """Return the bytes that it holds, and that its use or its end would free."""
        pid = self.pid
        return (memory.footprint(pid) or 0) if pid else 0

    # -- for the backends

    def renew(self, engine: Engine) -> None:
        """Have one for the next load: a load of this engine has succeeded."""
        if isinstance(engine, StandbyEngine):
            with self._lock:
                self._engine = engine

    def prepare(self, engine: Engine, path: str) -> None:
        """Tell it which model comes next, so that it gets ready while others still answer."""
        waiting = self._waiting
        if waiting is not None and waiting.engine.name == engine.name and waiting.is_ready():
            waiting.link.prepare(path)

    def take(
        self, engine: Engine, command: Command, on_death: Callable[[str], None]
    ) -> Launched | None:
        """Return the process for a load, which it carries out from now on; None if there is none.

        There is no other until a load succeeds: a load that fails may have failed because of it.

        Args:
            command: the command that the load would be started with.
            on_death: called with the reason when it reports that it can no longer generate.
        """
        with self._lock:
            waiting, self._waiting, self._engine = self._waiting, None, None
        if waiting is None:
            return None
        if not waiting.is_ready():
            why: str | None = "it is not ready yet"
        elif waiting.engine.name != engine.name:
            why = "the model needs another program"
        else:
            why = waiting.fault()
        if why is None:
            waiting.on_death = on_death
            if waiting.link.hand_over(command, TAKE_SECONDS):
                return waiting.launched
            why = "it does not answer"
        self._discard(waiting, why)
        return None

    # -- its own life

    def watch(
        self, record: ChildRecord, is_idle: Callable[[], bool], room: Callable[[], int]
    ) -> None:
        """Have a process whenever one is of use, until :meth:`close`.

        Args:
            record: records the process, in case this proxy is killed.
            is_idle: returns whether the proxy has nothing to do.
            room: returns the bytes of memory that the models and the process itself leave; less
                than zero if memory is short.
        """
        self._thread = threading.Thread(
            target=self._watch, args=(record, is_idle, room), name="standby", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End the process, for good."""
        self._closed.set()
        with self._lock:
            waiting, self._waiting, self._engine = self._waiting, None, None
        if waiting is not None:
            self._discard(waiting, "the proxy stops")
        if self._thread is not None:
            self._thread.join(KILL_SECONDS)

    def _watch(
        self, record: ChildRecord, is_idle: Callable[[], bool], room: Callable[[], int]
    ) -> None:
        was_idle = False
        while not self._closed.wait(LOOK_SECONDS):
            try:
                was_idle, was = is_idle(), was_idle
                self._look(record, was and was_idle, room)
            except Exception:
                log.exception("the standby failed unexpectedly")
        record.stopped()

    def _look(self, record: ChildRecord, is_idle: bool, room: Callable[[], int]) -> None:
        """Drop the process if it is of no use any more; start one if that is due."""
        waiting, engine = self._waiting, self._engine
        if waiting is not None:
            fault = waiting.fault()
            if fault is None and room() >= 0:
                return
            with self._lock:
                if self._waiting is not waiting:
                    return  # it has just been taken
                self._waiting = None
                if fault is not None:
                    self._engine = None  # or it might be started and lost again every two seconds
            self._discard(waiting, fault or "memory is short")
        elif engine is not None and is_idle and room() >= NEEDED_BYTES:
            self._start(engine, record)

    def _start(self, engine: StandbyEngine, record: ChildRecord) -> None:
        waiting: _Waiting | None = None
        command = engine.standby()
        if command is not None:
            self._count += 1
            mark = replace(record.mark, standby=self._count)
            argv = (*command.argv, f"{mark.proxy}~{mark.standby}")
            with contextlib.suppress(LoadFailed, OSError):
                record.starting(argv)
                waiting = _Waiting(engine, command, argv, mark)
                record.started(argv, waiting.launched.process.pid)
                log.info("standby started: pid %d", waiting.launched.process.pid)
        with self._lock:
            # Somebody may have begun a load, or a stop, in the meantime.
            still = self._engine is engine and not self._closed.is_set()
            if still:
                self._waiting = waiting
                self._engine = engine if waiting else None
        if waiting is not None and not still:
            self._discard(waiting, "it came too late")

    def _discard(self, waiting: _Waiting, why: str) -> None:
        process = waiting.launched.process
        process.kill()  # it has neither data to save nor children
        os.close(waiting.launched.output)
        try:
            process.wait(KILL_SECONDS)
            log.info("standby thrown away: pid %d, %s", process.pid, why)
        except subprocess.TimeoutExpired:
            log.error("standby pid %d cannot be killed", process.pid)


class _Waiting:
    """One process that waits, or is about to.

    Raises:
        OSError: it cannot be executed.
    """

    def __init__(
        self, engine: StandbyEngine, command: StandbyCommand, argv: Sequence[str], mark: Mark
    ) -> None:
        self.engine = engine
        self.on_death: Callable[[str], None] = lambda reason: None
        self.link: StandbyLink = command.link(lambda reason: self.on_death(reason))
        self.launched = launch(argv, command.environment, mark, self.link)
        self._command = command

    def is_ready(self) -> bool:
        """Return whether it waits for its command line."""
        return self.link.is_waiting()

    def fault(self) -> str | None:
        """Return why it cannot be used any more; None if it can."""
        status = self.launched.process.poll()
        if status is not None:
            return f"it ended with status {status}"
        if self.engine.standby() != self._command:
            return "the program has been installed anew"
        return None
