"""One backend process of any engine: its start, its readiness, its end.

Everything specific to its program comes from its engine (`backend/protocol.py`).
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import psutil

from mlxproxy.backend import memory, ports, processes
from mlxproxy.backend.connection import BackendConnection, BrokenConnection, ReadTimeout
from mlxproxy.backend.output import Listener, OutputPump
from mlxproxy.backend.processes import Mark, ask, lives
from mlxproxy.backend.protocol import Address, Command, Engine, Fault, Fields, Link, Probe, Wire
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.errors import (
    LoadCancelled,
    LoadFailed,
    LoadTimeout,
    PortInUse,
    ProxyError,
)
from mlxproxy.logfile import LogFile
from mlxproxy.text import without_paths

log = logging.getLogger("mlxproxy.backend")

LOG_LINES_IN_ERRORS = 12
MAKE_VARIABLES = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "API_KEY", "API_KEY_FILE")
KILL_SECONDS = 5.0  # from SIGKILL to the exit; a process that waits for a lost disk never exits
POLL_SECONDS = 0.05
COUNT_SECONDS = 10.0  # that the count of a prompt may take
PROBE_INTERVAL_SECONDS = 0.1  # between two checks of what may end the wait for an answer
HEALTH_SECONDS = 2.0
EXIT_REASON_SECONDS = 0.5  # in which the reason of an exit arrives after the end of a connection
ANSWER_BYTES = 1 << 20  # of an answer to a probe
_FRAME = re.compile(r"\s|Traceback \(most recent")  # lines of a traceback
_PORT_TAKEN = os.strerror(errno.EADDRINUSE).lower()

T = TypeVar("T")


@dataclass(frozen=True)
class BackendConfig:
    """The settings of a backend, and the destination of its output."""

    load_timeout: float
    stop_timeout: float
    log_file: LogFile
    mark: Mark
    on_log: Listener = field(default=lambda _: None)


class Backend:
    """One process that serves one load, from its start until it is reaped.

    Args:
        spec: the load that it is started for.
        engine: its kind of backend.
        address: the address on this machine at which it will answer.
        on_end: called once, from any thread, when the process has exited or can no longer
            generate, with the reason; not called for an exit that :meth:`stop` caused.

    Attributes:
        last_byte_at: when the last byte of any answer came, in monotonic seconds.
        hung: whether it was declared dead because it sent nothing.
    """

    def __init__(
        self,
        spec: ModelSpec,
        engine: Engine,
        address: Address,
        config: BackendConfig,
        on_end: Callable[[str], None],
    ) -> None:
        self.spec = spec
        self.engine = engine
        self.address = address
        self.config = config
        self.last_byte_at = time.monotonic()
        self.hung = False
        self._on_end = on_end
        self._lock = threading.Lock()
        self._stopping = False
        self._ended: str | None = None
        self._end = threading.Event()
        self._exited = threading.Event()
        self._read_before: int | None = None
        self._launch: Command | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._leader: psutil.Process | None = None  # the same process, for psutil
        self._members: set[psutil.Process] = set()  # with a wrapper, those that it has started
        self._output: OutputPump | None = None
        self._link: Link | None = None
        self._oom_kills = 0  # the system's count before the start
        self._serving = False  # from now on, its log may contain clients' requests
        self._checking = threading.Lock()
        self._probing = threading.Lock()
        self._counting = threading.Lock()

    # -- queries

    @property
    def port(self) -> int:
        """The port at which it answers."""
        return self.address.port

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def wire(self) -> Wire:
        """The wire format of its engine's requests and answers."""
        return self.engine.wire(self.has)

    @property
    def ended(self) -> str | None:
        """The reason why the backend can no longer generate; None while it can."""
        return self._ended

    @property
    def features(self) -> Collection[str]:
        """The features that the process has enabled; see `protocol.Link`."""
        return () if self._link is None else self._link.features

    def has(self, feature: str) -> bool:
        """Return whether the process has a feature enabled; see `protocol.Link`."""
        return self._link is not None and self._link.has(feature)

    def hang(self, waiting_since: float, stall_timeout: float) -> str | None:
        """Return why the process hangs, as it reports itself; None while it lives.

        Args:
            waiting_since: since when the asking request has waited, in monotonic seconds.
            stall_timeout: seconds that one step of its work may take.
        """
        if self._link is None:
            return None
        return self._link.hang(waiting_since, stall_timeout, self.config.load_timeout)

    def last_words(self) -> list[str]:
        """Return the last lines of a load's log, fit for a client: no traceback, no paths.

        Once requests are served, return none: the log may contain other clients' texts.
        """
        if self._output is None or self._serving:
            return []
        lines = (line.replace(self.spec.path, self.spec.model_id) for line in self._output.tail())
        told = [without_paths(line)[:500] for line in lines if not _FRAME.match(line)]
        return told[-LOG_LINES_IN_ERRORS:]

    def command(self) -> list[str]:
        """Return the command line.

        Raises:
            LoadFailed: the program is missing.
        """
        return list(self._command().argv)

    def _command(self) -> Command:
        if self._launch is None:
            self._launch = self.engine.command(self.spec, self.address)
        return self._launch

    def bytes_read(self) -> int | None:
        """Return the bytes read since the load began, if the system tells (Linux)."""
        counted = self._counted()
        if counted is None:
            return None
        return 0 if self._read_before is None else counted - self._read_before

    def _counted(self) -> int | None:
        if self._process is None or not sys.platform.startswith("linux"):
            return None
        pid = self._process.pid
        return ask(lambda: int(psutil.Process(pid).io_counters().read_chars))

    def memory(self) -> int | None:
        """Return the bytes that it holds, all its processes together; None if it is gone."""
        if self.pid is None:
            return None
        others = (each.pid for each in self._members if each.pid != self.pid and lives(each))
        held = [memory.footprint(pid) for pid in (self.pid, *others)]
        return sum(each for each in held if each is not None) or None

    # -- lifecycle

    def start(self) -> None:
        """Start the process.

        Raises:
            LoadFailed: the program is missing or cannot be executed.
            PortInUse: another process holds the port.
        """
        command = self._command()
        self._require_free_port()
        self._oom_kills = memory.oom_kills()
        read_end, write_end = os.pipe()
        link = command.link(self._ends) if command.link is not None else None
        try:
            self._process = self._spawn(command, link, write_end)
        except OSError as error:
            os.close(read_end)
            if link:
                link.close()
            reason = error.strerror or str(error)
            log.error("%s cannot be started: %s", command.argv[0], reason)
            raise LoadFailed(
                f"{self.engine.name} cannot be started: {reason}. {command.remedy}"
            ) from None
        finally:
            os.close(write_end)
        self._leader = processes.at(self._process.pid)
        log.info("backend started: pid %d, %s", self._process.pid, self.spec.model_id)
        if link:
            link.open()
            self._link = link
        self._output = OutputPump(
            read_end, self.config.log_file, self._look_for_death, self.config.on_log
        )
        threading.Thread(target=self._wait, name="backend-wait", daemon=True).start()

    def _require_free_port(self) -> None:
        if not ports.is_free(self.port):
            holder = ports.describe(ports.listener(self.port))
            raise PortInUse(
                f"Port {self.port} on {self.address.host} is in use by {holder}, which does not "
                "belong to this proxy. Stop it, or set MLX_BACKEND_PORT to a free port."
            )

    def _spawn(self, command: Command, link: Link | None, output: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command.argv,
            stdin=link.fileno() if link else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**_environment(), **command.environment, **self.config.mark.environment()},
            # A session of its own: the proxy handles Ctrl-C at the terminal, and a stop reaches
            # whatever the backend has started (`mlx.launch` starts processes).
            start_new_session=True,
        )

    def wait_ready(
        self, cancelled: threading.Event, on_phase: Callable[[str], None] = lambda _: None
    ) -> None:
        """Wait until this process has answered all the probes of its engine.

        Args:
            cancelled: set by others to end the wait.
            on_phase: called with ``starting``, ``loading`` and ``warming``.

        Raises:
            LoadFailed, LoadTimeout, LoadCancelled, PortInUse: it will not become ready.
        """
        deadline = time.monotonic() + self.config.load_timeout

        def check() -> None:
            self._check_load(cancelled, deadline)

        on_phase("starting")
        while not ports.answers(self.port):
            check()
            self._end.wait(POLL_SECONDS)
        self._check_owner()
        self._read_before = self._counted()  # what the program itself has read
        for phase, probe in self.engine.stages(self.spec):
            on_phase(phase)
            if fault := self._fault(probe, check):
                if fault.is_final:
                    self._end.wait(EXIT_REASON_SECONDS)
                    check()
                raise self.failure(fault.reason)
        self._serving = True
        if self._link:
            self._link.let_clients_in()

    def stop(self) -> None:
        """Stop the process and all processes that it started, and reap it: SIGTERM, then SIGKILL.

        Children with a session of their own, or whose parent has exited, are stopped, too. A
        process that the system cannot end stays behind, with a line in the log.
        """
        with self._lock:
            self._stopping = True
        process = self._process
        if process is None:
            return
        family = self._family()  # now: once its parent has exited, a child may not be found
        deadline = time.monotonic() + self.config.stop_timeout
        process.terminate()  # besides psutil, which may see no process at all
        processes.terminate(family)
        ended = self._exited.wait(self.config.stop_timeout)
        if processes.wait(family, deadline) or not ended:
            log.warning(
                "backend pid %d did not exit within %g s of SIGTERM: killed",
                process.pid,
                self.config.stop_timeout,
            )
        process.kill()
        left = processes.kill(lambda: family | self._family(), KILL_SECONDS)
        self._exited.wait(KILL_SECONDS if not left else 0)
        if left or not self._exited.is_set():
            pids = ", ".join(str(each.pid) for each in left) or str(process.pid)
            log.error("backend stopped, but the system cannot kill pid %s", pids)
            return
        if self._output:
            self._output.join(EXIT_REASON_SECONDS)
        log.info("backend stopped: pid %d", process.pid)

    def _family(self) -> set[psutil.Process]:
        return processes.family(self._leader, self.config.mark)

    def check(self) -> str | None:
        """Ask the process whether it can generate; return why it cannot, or None.

        This is for a connection that ended without a reason: the generating thread may have died
        while the process lives on.
        """
        if self._ended is None:
            try:
                fault = self._ask(self.engine.health, HEALTH_SECONDS)
                if fault is not None and fault.is_final:
                    self._ends(fault.reason)
            except (BrokenConnection, ReadTimeout):
                self._end.wait(EXIT_REASON_SECONDS)  # going down: the reaping thread reports why
        return self._ended

    def answers_probe(self, patience: float) -> bool:
        """Return whether the model itself answers within `patience` seconds.

        Only one probe runs at a time: while another thread waits for it, return True immediately.
        """
        if not self._probing.acquire(blocking=False):
            return True
        try:
            probe = self.engine.stages(self.spec)[-1].probe
            answered = self._ask(probe, patience) is None
        except (BrokenConnection, ReadTimeout):
            return False
        finally:
            self._probing.release()
        if answered:
            self.last_byte_at = time.monotonic()
        return answered

    def count_tokens(self, fields: Fields) -> int | None:
        """Return how many tokens the prompt of a checked chat has.

        Only one prompt is counted at a time. The result is None if the process cannot count, or
        does not within COUNT_SECONDS.
        """
        wire, deadline = self.wire, time.monotonic() + COUNT_SECONDS
        if wire.count_path is None or not self._counting.acquire(timeout=COUNT_SECONDS):
            return None
        counted: list[int | None] = []

        def take(status: int, answer: bytes) -> Fault | None:
            counted.append(wire.count_in(answer) if status == 200 else None)
            return None

        try:
            probe = Probe(wire.count_path, take, body=fields)
            self._ask(probe, max(0.0, deadline - time.monotonic()))
        except (BrokenConnection, ReadTimeout):
            return None
        finally:
            self._counting.release()
        return counted[0]

    def declare_hung(self, reason: str) -> None:
        """Declare the process dead, for a reason that only its clients can observe: it hangs."""
        self.hung = True
        self._ends(reason)

    # -- internals

    def _wait(self) -> None:
        assert self._process is not None
        code = self._process.wait()
        self._exited.set()
        if self._output and not self._stopping:
            self._output.join(EXIT_REASON_SECONDS)  # its last lines of output
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with status {code}"
        if code == -signal.SIGKILL and not self._stopping and memory.ran_out(self._oom_kills):
            how += ", most likely because memory ran out"
        self._ends(f"it {how}")

    def _look_for_death(self, output: bytes) -> None:
        """Search whole lines of the output for a sign that the process can no longer generate."""
        reason = self.engine.death_in(output)
        if reason is None:
            return
        if self.engine.trusts_output or not self._serving:
            self._ends(reason)
        elif self._checking.acquire(blocking=False):
            threading.Thread(target=self._check_once, name="backend-check", daemon=True).start()

    def _check_once(self) -> None:
        try:
            self.check()
        finally:
            self._checking.release()

    def _ends(self, reason: str) -> None:
        with self._lock:
            first = self._ended is None
            if first:
                self._ended = reason
            stopping = self._stopping
        self._end.set()
        if first and not stopping:
            self._on_end(reason)

    def _check_load(self, cancelled: threading.Event, deadline: float) -> None:
        if cancelled.is_set():
            raise LoadCancelled(f"The load of {self.spec.model_id} was cancelled.")
        if self._ended is not None:
            raise self.failure(self._ended)
        if time.monotonic() > deadline:
            raise LoadTimeout(
                f"{self.spec.model_id} did not answer within {self.config.load_timeout:g} s "
                "(LOAD_TIMEOUT). Raise it if the model is large or the disk is slow.",
                log=self.last_words(),
            )

    def _check_owner(self) -> None:
        """Require that the process that answers on the port is our child or one of its descendants.

        Raises:
            PortInUse: it is another process.
        """
        holder = ports.listener(self.port)
        if holder is not None and holder.pid == self.pid:
            return
        self._members = self._family()
        if holder is None or Mark.of(holder) == self.config.mark:
            return
        if any(parent.pid == self.pid for parent in ask(holder.parents) or ()):
            return
        raise PortInUse(
            f"{ports.describe(holder)} took port {self.port} before the backend could. Stop it, "
            "or set MLX_BACKEND_PORT to a free port."
        )

    # -- the proxy's own requests

    def _fault(self, probe: Probe, check: Callable[[], None]) -> Fault | None:
        """Return what is wrong with the answer to a probe of the load; None if nothing is.

        Raises:
            ProxyError: raised by `check`, or because there is no answer.
        """
        try:
            while True:
                status, answer = self._exchange(probe, check)
                if status not in probe.not_yet:
                    return probe.judge(status, answer)
                check()
                self._end.wait(POLL_SECONDS)
        except BrokenConnection as error:
            self._end.wait(2 * EXIT_REASON_SECONDS)  # if it has just exited, its own reason arrives
            check()
            raise self.failure(f"it {error.what}") from None

    def _ask(self, probe: Probe, seconds: float) -> Fault | None:
        """Return what is wrong with the answer to a probe of a serving process; None if nothing is.

        Raises:
            BrokenConnection, ReadTimeout: there is no answer, or none within that time.
        """
        deadline = time.monotonic() + seconds

        def check() -> None:
            if self._ended is not None or time.monotonic() > deadline:
                raise ReadTimeout

        status, answer = self._exchange(probe, check, seconds)
        return probe.judge(status, answer)

    def _exchange(
        self, probe: Probe, check: Callable[[], None], connect_seconds: float | None = None
    ) -> tuple[int, bytes]:
        """Send a probe; return the status and body of the answer.

        Args:
            check: called repeatedly; raises to give up.

        Raises:
            BrokenConnection: the process does not accept it, or the answer is cut off or not HTTP.
        """
        connection = BackendConnection(
            self.address, PROBE_INTERVAL_SECONDS, connect_seconds=connect_seconds
        )
        try:
            body = None if probe.body is None else json.dumps(probe.body).encode()
            connection.send(probe.path, body, probe.authorization)
            _patiently(connection.read_head, check)
            answer = b""
            while len(answer) < ANSWER_BYTES and (data := _patiently(connection.read, check)):
                answer += data
            return connection.status, answer
        finally:
            connection.close()

    def failure(self, reason: str) -> ProxyError:
        """Return the error for a failed load, with the last lines of the backend's log."""
        lines = self.last_words()
        if any(_PORT_TAKEN in line.lower() for line in lines):
            return PortInUse(
                f"Another process took port {self.port} while the backend was starting. Stop it, "
                "or set MLX_BACKEND_PORT to a free port."
            )
        reason = without_paths(reason.replace(self.spec.path, self.spec.model_id))
        return LoadFailed(f"{self.spec.model_id}: {explain(self.engine, reason, lines)}", log=lines)


def explain(engine: Engine, reason: str, lines: Sequence[str]) -> str:
    """Return the reason as a sentence, with advice if the engine knows the failure."""
    for text in (reason, "\n".join(lines)):
        for pattern, advice in engine.advice:
            if match := re.search(pattern, text):
                return f"{advice.format(*match.groups())} ({engine.name}: {reason})"
    return f"{engine.name} could not load it: {reason}"


def _patiently(read: Callable[[], T], check: Callable[[], None]) -> T:
    """Return what was read; call `check`, which may raise, before each attempt."""
    while True:
        check()
        try:
            return read()
        except ReadTimeout:
            continue


def _environment() -> dict[str, str]:
    """Return the proxy's environment without its settings (which include the keys)."""
    return {
        name: value
        for name, value in os.environ.items()
        # `make run API_KEY=…` leaves the key in make's own variables, too.
        if not name.startswith("MLXPROXY_") and name not in MAKE_VARIABLES
    }


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
