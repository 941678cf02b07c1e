"""One `mlx_lm.server` process: its command line, start, readiness, end."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from mlxproxy.backend import ports, processes
from mlxproxy.backend.connection import BackendConnection, ReadTimeout, parsed
from mlxproxy.backend.output import Listener, OutputPump
from mlxproxy.backend.processes import Mark, ask
from mlxproxy.backend.protocol import Wire
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.engines.mlx_lm.link import Link
from mlxproxy.engines.mlx_lm.wire import MlxLmWire
from mlxproxy.errors import (
    BackendFailed,
    LoadCancelled,
    LoadFailed,
    LoadTimeout,
    PortInUse,
    ProxyError,
)
from mlxproxy.logfile import LogFile

log = logging.getLogger("mlxproxy.backend")

LOG_LINES_IN_ERRORS = 12
MAKES_OWN = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "API_KEY", "API_KEY_FILE")
KILL_TIMEOUT = 5.0  # seconds from SIGKILL to the end; a process that waits for a lost disk has none
POLL = 0.05
_FRAME = re.compile(r"\s|Traceback \(most recent")  # lines of a traceback
# What is quoted and has a slash; else from a first slash to the last: folders have spaces in their
# names. What follows a letter is no path (user/assistant), nor is an endpoint.
_PATH = re.compile(r"""(['"])[^'"]*/[^'"]*\1|(?<![\w.])/(?!v1/)[^'":,;()\n]*/[^\s'":,;()]*""")
INSIDE = Path(__file__).parent.parent / "engines" / "mlx_lm" / "inside" / "start.py"
INSIDE_OPTIONS = "MLXPROXY_INSIDE"
# The first line of a script that pip has made; the first two, where the path has a space.
_PYTHON = re.compile(
    rb"#! ?(?:/bin/sh\n'''exec' [\"']?)?(/[^\n\"']*/(?:python|pypy)[\w.]*)"
    rb"(?: ?\n|[\"']? \"\$0\" \"\$@\"\n)"
)
HEALTH_TIMEOUT = 2.0
FIRST_CHAT: tuple[str, dict[str, object]] = (
    "/v1/chat/completions",
    {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
)
VERDICT = 0.5  # seconds in which the reason of a death follows the end of a connection


@dataclass(frozen=True)
class BackendConfig:
    """What is the same for every backend of one proxy."""

    server_bin: Path | None
    port: int
    max_tokens: int
    load_timeout: float
    stop_timeout: float
    log_file: LogFile
    mark: Mark
    on_log: Listener = field(default=lambda _: None)


class Backend:
    """One process that serves one load, from its start to its reaping.

    Args:
        on_end: called once, from any thread, when the process has ended or can no longer
            generate, with the reason; not called for an end that :meth:`stop` brought about.
    """

    def __init__(
        self, spec: ModelSpec, config: BackendConfig, on_end: Callable[[str], None]
    ) -> None:
        self.spec = spec
        self.config = config
        self.last_byte_at = time.monotonic()  # when the last byte of any answer came
        self.hung = False  # taken for dead because it sent nothing
        self._on_end = on_end
        self._lock = threading.Lock()
        self._stopping = False
        self._ended: str | None = None
        self._end = threading.Event()
        self._exited = threading.Event()
        self._probe: BackendConnection | None = None
        self._read_before: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._leader: psutil.Process | None = None  # the same, as psutil knows it
        self._drain: OutputPump | None = None
        self._link: Link | None = None
        self._serving = False  # clients' requests may be in what it logs from now on
        self._checking = threading.Lock()
        self._probing = threading.Lock()

    # -- what others may ask

    @property
    def port(self) -> int:
        return self.config.port

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def wire(self) -> Wire:
        """How the engine spells requests and answers."""
        return MlxLmWire(counts_cached=self.has("progress"))

    @property
    def ended(self) -> str | None:
        """Why the backend can no longer generate, or None while it can."""
        return self._ended

    def has(self, feature: str) -> bool:
        """Return whether the process has armed a feature of `engines/mlx_lm/inside/`."""
        return self._link is not None and self._link.has(feature)

    def hang(self, waiting_since: float, stall_timeout: float) -> str | None:
        """Return why the process hangs, as it says itself; None while it lives.

        Args:
            waiting_since: since when the request has waited that asks, in monotonic seconds.
            stall_timeout: seconds that one step of its work may take.
        """
        if self._link is None:
            return None
        return self._link.hang(waiting_since, stall_timeout, self.config.load_timeout)

    def last_words(self) -> list[str]:
        """Return the last lines of a load's log, fit for a client: no traceback, no paths.

        Once requests are served there are none: the log may hold what others said.
        """
        if self._drain is None or self._serving:
            return []
        lines = (line.replace(self.spec.path, self.spec.model_id) for line in self._drain.tail())
        told = [without_paths(line)[:500] for line in lines if not _FRAME.match(line)]
        return told[-LOG_LINES_IN_ERRORS:]

    def command(self) -> list[str]:
        """The command line. Clients that stream from the backend's port rely on its options."""
        return [
            *program_command(server_program(self.config.server_bin)),
            *("--model", self.spec.path),
            *("--host", "127.0.0.1"),
            *("--port", str(self.config.port)),
            # Its own default is 512, which ends an answer of today's models in mid-thought.
            *("--max-tokens", str(self._max_tokens())),
            "--chat-template-args",
            json.dumps({"enable_thinking": self.spec.enable_thinking}),
        ]

    def _max_tokens(self) -> int:
        context = self.spec.model.max_context_length
        return min(self.config.max_tokens, context or self.config.max_tokens)

    def bytes_read(self) -> int | None:
        """Bytes read since the load began, where the system tells (Linux)."""
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
        """Resident memory in bytes (on macOS without what Metal holds), None if it is gone."""
        pid = self.pid
        return ask(lambda: int(psutil.Process(pid).memory_info().rss)) if pid else None

    # -- its life

    def start(self) -> None:
        """Starts the process.

        Raises:
            LoadFailed: the program is missing or cannot be executed.
            PortInUse: another process holds the port.
        """
        command = self.command()
        if not ports.is_free(self.port):
            holder = ports.describe(ports.listener(self.port))
            raise PortInUse(
                f"Port {self.port} on 127.0.0.1 is in use by {holder}, which does not belong to "
                "this proxy. Stop it, or set MLX_BACKEND_PORT to a free port."
            )
        read_end, write_end = os.pipe()
        environment = {**_environment(), **self.config.mark.environment()}
        link: Link | None = None
        if str(INSIDE) in command:
            link = Link(self._ends)
            options = {"context": self.spec.model.max_context_length}
            environment[INSIDE_OPTIONS] = json.dumps(options)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=link.theirs.fileno() if link else subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                env=environment,
                # A session of its own: Ctrl-C at the terminal is ours to handle, and a stop
                # reaches whatever the backend has started (`mlx.launch` does).
                start_new_session=True,
            )
        except OSError as error:
            os.close(read_end)
            if link:
                link.close()
            reason = error.strerror or str(error)
            log.error("%s cannot be started: %s", command[0], reason)
            raise LoadFailed(
                f"mlx_lm.server cannot be started: {reason}. Set MLX_SERVER_BIN to a working "
                "mlx_lm.server (`pip install mlx-lm` provides one)."
            ) from None
        finally:
            os.close(write_end)
        self._leader = processes.at(self._process.pid)
        log.info("backend started: pid %d, %s", self._process.pid, self.spec.model_id)
        if link:
            link.open()
            self._link = link
        self._drain = OutputPump(
            read_end, self.config.log_file, self._death_logged, self.config.on_log
        )
        threading.Thread(target=self._wait, name="backend-wait", daemon=True).start()

    def wait_ready(
        self, cancelled: threading.Event, on_phase: Callable[[str], None] = lambda _: None
    ) -> None:
        """Returns when a chat of one token has been answered by our own process.

        `/health` and the open port say nothing: both are there before the model is.

        Args:
            cancelled: set by others to end the wait.
            on_phase: told ``starting``, ``loading`` and ``warming``.

        Raises:
            LoadFailed, LoadTimeout, LoadCancelled, PortInUse: why it will not be ready.
        """
        deadline = time.monotonic() + self.config.load_timeout
        on_phase("starting")
        while not ports.answers(self.port):
            self._check(cancelled, deadline)
            self._end.wait(POLL)
        self._check_owner()
        self._read_before = self._counted()  # Python's own imports
        on_phase("loading")
        # Queued behind the load and then refused: it tells the end of the load, not its success.
        self._ask("/v1/completions", {"prompt": None, "max_tokens": 1}, cancelled, deadline)
        on_phase("warming")
        status, answer = self._ask(*FIRST_CHAT, cancelled, deadline)
        if status != 200:
            if b"generation thread died" in answer:
                self._end.wait(VERDICT)  # the log tells of what, a moment later
                self._check(cancelled, deadline)
            raise self.failure(f"its first chat failed: {_error_text(answer) or status}")
        with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
            if parsed(answer)["choices"][0]["message"]["role"] == "assistant":
                self._serving = True
                if self._link:
                    self._link.let_clients_in()
                return
        raise self.failure("its answer to the first chat is incomplete")

    def stop(self) -> None:
        """End the process and all it has started, and reap it: SIGTERM, then SIGKILL.

        Children with a session of their own, or whose parent has left them, are ended too. What
        the system cannot end stays behind, with a line in the log.
        """
        with self._lock:
            self._stopping = True
        self._abort_probe()
        process = self._process
        if process is None:
            return
        family = self._family()  # now: once its parent has ended, a child may not be found
        deadline = time.monotonic() + self.config.stop_timeout
        process.terminate()  # beside psutil, which may see no process at all
        processes.terminate(family)
        ended = self._exited.wait(self.config.stop_timeout)
        if processes.wait(family, deadline) or not ended:
            log.warning(
                "backend pid %d did not exit within %g s of SIGTERM: killed",
                process.pid,
                self.config.stop_timeout,
            )
        process.kill()
        left = processes.kill(lambda: family | self._family(), KILL_TIMEOUT)
        self._exited.wait(KILL_TIMEOUT if not left else 0)
        if left or not self._exited.is_set():
            pids = ", ".join(str(it.pid) for it in left) or str(process.pid)
            log.error("backend stopped, but the system cannot kill pid %s", pids)
            return
        if self._drain:
            self._drain.join(0.5)
        log.info("backend stopped: pid %d", process.pid)

    def _family(self) -> set[psutil.Process]:
        return processes.family(self._leader, self.config.mark)

    def check(self) -> str | None:
        """Asks the backend's own health check; returns why it cannot generate, if it cannot.

        For a connection that ended without a reason: the generation thread may be gone.
        """
        if self._ended is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HEALTH_TIMEOUT)
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == 503:
                    self._ends("its generation thread has crashed")
            except (OSError, http.client.HTTPException):
                self._end.wait(VERDICT)  # going down: the thread that reaps it tells how
            finally:
                connection.close()
        return self._ended

    def answers_probe(self, patience: float) -> bool:
        """Return whether it answers a chat of one token within so many seconds.

        One at a time is asked: while another thread waits for that answer, return True at once.
        """
        if not self._probing.acquire(blocking=False):
            return True
        try:
            deadline = time.monotonic() + patience
            answered = self._ask(*FIRST_CHAT, threading.Event(), deadline)[0] == 200
        except ProxyError:
            return False
        finally:
            self._probing.release()
        if answered:
            self.last_byte_at = time.monotonic()
        return answered

    def declare_hung(self, reason: str) -> None:
        """Takes the backend for dead, for a reason that only its users can see: it hangs."""
        self.hung = True
        self._ends(reason)

    # -- inside

    def _wait(self) -> None:
        assert self._process is not None
        code = self._process.wait()
        self._exited.set()
        if self._drain and not self._stopping:
            self._drain.join(0.5)  # its last words
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with status {code}"
        self._ends(f"it {how}")

    def _death_logged(self, reason: str) -> None:
        """The log says that the generation thread has died. Once requests are served, a model may
        have written such a line: the process is asked, and the line not believed."""
        if not self._serving:
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
        self._abort_probe()
        if first and not stopping:
            self._on_end(reason)

    def _check(self, cancelled: threading.Event, deadline: float) -> None:
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
        """The process that answers on the port must be our child or one that it has started."""
        holder = ports.listener(self.port)
        if holder is None or holder.pid == self.pid or Mark.of(holder) == self.config.mark:
            return
        if any(parent.pid == self.pid for parent in ask(holder.parents) or ()):
            return
        raise PortInUse(
            f"{ports.describe(holder)} took port {self.port} before the backend could. Stop it, "
            "or set MLX_BACKEND_PORT to a free port."
        )

    def _ask(
        self, path: str, body: dict[str, object], cancelled: threading.Event, deadline: float
    ) -> tuple[int, bytes]:
        """One request of our own: its status and body."""
        try:
            probe = BackendConnection(self.port, interval=POLL * 4)
        except BackendFailed as error:
            self._check(cancelled, deadline)
            raise self.failure(error.message) from None
        with self._lock:
            self._probe = probe
        answer = b""
        try:
            probe.send(path, json.dumps({**body, "model": self.spec.path}).encode())
            read: Callable[[], bytes | None] = probe.read_head
            while True:
                self._check(cancelled, deadline)
                try:
                    data = read()
                except ReadTimeout:
                    continue
                if read == probe.read_head:
                    read = probe.read
                elif data:
                    answer += data
                else:
                    return probe.status, answer
        except BackendFailed:
            self._end.wait(1.0)  # it has just ended: its own words are on their way
            self._check(cancelled, deadline)
            raise self.failure("it closed the connection without an answer") from None
        finally:
            with self._lock:
                self._probe = None
            probe.close()

    def _abort_probe(self) -> None:
        with self._lock:
            if self._probe is not None:
                self._probe.abort()

    def failure(self, reason: str) -> ProxyError:
        """A failed load in words, with the last lines of the backend's log."""
        lines = self.last_words()
        if any("Address already in use" in line for line in lines):
            return PortInUse(
                f"Another process took port {self.port} while the backend was starting. Stop it, "
                "or set MLX_BACKEND_PORT to a free port."
            )
        reason = without_paths(reason.replace(self.spec.path, self.spec.model_id))
        return LoadFailed(f"{self.spec.model_id}: {explain(reason, lines)}", log=lines)


# What the backend says, and what a person can do about it (measured, mlx-lm 0.31.3 and 0.32.2).
_REASONS: tuple[tuple[str, str], ...] = (
    (r"Model type (\S+) not supported", "the installed mlx-lm does not support the architecture "
     "{0}. Update mlx-lm, or choose another model."),
    (r"Missing \d+ parameters", "weights are missing. The download is incomplete: download the "
     "model again."),
    (r"invalid data offsets|Unable to read|header length|InvalidHeader|Incomplete",
     "a weights file is damaged or incomplete. Download the model again."),
    (r"Expected shape|Received \d+ parameters not in model", "the weights do not match the "
     "configuration. Download the model again, or choose another conversion."),
    (r"No safetensors found", "there are no weights in the folder. Download the model again."),
    (r"tokenizer", "its tokenizer files are missing or damaged. Download the model again."),
    (r"[Tt]emplate|jinja|raise_exception", "its chat template fails. Choose another conversion of "
     "the model."),
    (r"Insufficient Memory|[Oo]ut of memory|bad_alloc|Attempting to allocate|metal::malloc",
     "there is not enough memory. Quit other programs, or choose a smaller quantization."),
    (r"SIGKILL", "the system killed it, most likely because memory ran out. Choose a "
     "smaller quantization."),
    (r"its first chat failed", "it loads, but cannot chat, most likely because of its chat "
     "template. Choose another conversion of the model."),
    (r"config\.json", "config.json is missing or broken. Download the model again."),
    (r"Repo id must be|does not exist|No such file", "its files no longer exist. Is the "
     "disk mounted?"),
)  # fmt: skip


def explain(reason: str, lines: list[str]) -> str:
    """The reason as a sentence, with advice where the failure is a known one."""
    for text in (reason, "\n".join(lines)):
        for pattern, advice in _REASONS:
            if match := re.search(pattern, text):
                return f"{advice.format(*match.groups())} (mlx_lm.server: {reason})"
    return f"mlx_lm.server could not load it: {reason}"


def without_paths(text: str) -> str:
    """The text with each path of this machine as an ellipsis."""
    return _PATH.sub("…", text)


def server_program(configured: Path | None) -> Path:
    """The `mlx_lm.server` to run.

    Raises:
        LoadFailed: there is none.
    """
    if configured is not None:
        if configured.is_file() and os.access(configured, os.X_OK):
            return configured
        what = "is not executable" if configured.is_file() else "is not a file"
        log.error("MLX_SERVER_BIN = %s %s", configured, what)
        raise LoadFailed(
            f"The program that MLX_SERVER_BIN names {what}. Set it to the path of mlx_lm.server, "
            "or do not set it, to use the one next to the running Python."
        )
    beside = Path(sys.executable).parent / "mlx_lm.server"
    if beside.is_file():
        return beside
    found = shutil.which("mlx_lm.server")
    if found is None:
        raise LoadFailed(
            "There is no mlx_lm.server next to the running Python or on PATH. Run `pip install "
            "mlx-lm`, or set MLX_SERVER_BIN."
        )
    return Path(found)


def program_command(program: Path) -> list[str]:
    """How to start that `mlx_lm.server`: from inside (`engines/mlx_lm/inside/`), if it is the
    script that pip makes; a wrapper of another kind is run as it is."""
    try:
        with program.open("rb") as file:
            script = file.read(2048)
    except OSError:
        return [str(program)]
    shebang = _PYTHON.match(script)
    if shebang is None or b"mlx_lm.server" not in script:
        return [str(program)]
    return [os.fsdecode(shebang[1]), str(INSIDE), str(program)]


def _environment() -> dict[str, str]:
    """The backend's environment: offline, unbuffered, and without our settings (the keys)."""
    kept = {
        name: value
        for name, value in os.environ.items()
        # `make run API_KEY=…` leaves the key in make's own variables, too.
        if not name.startswith("MLXPROXY_") and name not in MAKES_OWN
    }
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def _error_text(answer: bytes) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        return str(parsed(answer)["error"])
    return answer[:200].decode("utf-8", "replace").strip()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
