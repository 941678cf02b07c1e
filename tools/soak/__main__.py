"""The soak: clients do everything at once while backends die, and at the end the books balance.

    python -m tools.soak [--seconds N] [--seed N] [--clients N] [--real]

Each phase starts a proxy, lets clients loose on it, waits for quiet and looks at what is left. The
backend is the scripted stand-in; with ``--real`` it is `mlx_lm.server` with tiny models. The exit
status is 1, and the logs are kept, if anything was wrong; each problem names its request's id.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import requests
from rich.console import Console

from mlxproxy.backend.ports import is_free
from tests.support import scripted_server, tiny_models
from tests.support.proxy import Proxy
from tests.support.server_process import SERVER_BIN
from tools.soak.ledger import STATUS, Json, Ledger, Seen, Shape

MODELS = ("alpha", "beta", "gamma")
BROKEN = "broken"  # its load always fails
CLIENTS = 10
PLACES, QUEUE = 8, 16
IDLE = 5.0  # seconds
LOOK_LIMIT = 1.0  # seconds for /health and the listings, whatever else is going on
QUIET_LIMIT = 30.0  # seconds after the last client in which all must have come to rest
STOP_LIMIT = 20.0
SAMPLE = 0.25
RSS_GROWTH = 16 << 20  # bytes that the second half of a phase may add to the first

SETTINGS: dict[str, Any] = {
    "MAX_CONCURRENT": PLACES,
    "MAX_QUEUE": QUEUE,
    "DRAIN_TIMEOUT": 3,
    "STALL_TIMEOUT": 8,
    "STOP_TIMEOUT": 2,
    "SHUTDOWN_TIMEOUT": 5,
    "IDLE_TTL": IDLE,
}

# Nobody unloads and nothing dies: no other error has a cause.
CALM = frozenset({"too_many_requests", "model_swapped", "load_failed", "no_model_loaded"})
ANY = frozenset(STATUS) - {"shutting_down"}


@dataclass(frozen=True)
class Phase:
    """One life of a proxy: whether backends die and somebody unloads, and the errors that may be.

    Attributes:
        selection: the setting MODEL_SELECTION.
        codes: of the errors that clients may get.
    """

    name: str
    selection: str
    faults: bool
    codes: frozenset[str]


PHASES = (
    Phase("swaps", "requested", False, CALM),
    Phase("faults-requested", "requested", True, ANY),
    Phase("faults-loaded", "loaded", True, ANY),
)

# What the stand-in is made to do for a second or so.
FAULTS: tuple[Json, ...] = (
    {"die_after": 3},
    {"die_after": 0, "die_by": "exit"},
    {"drop_after": 0},
    {"drop_after": 4},
    {"generation_dies_after": 2},
    {"hang_after": 3},
    {"empty": True},
    {"mute": True},
    {"error": "something odd", "error_status": 500},
    {"load_failure": "Missing 12 parameters: x", "load_seconds": 0.3},
    {"load_seconds": 1.5},
    {"open_after": 0.7},
    {"exit_code": 2},
    {"ignore_sigterm": True},
    {"log_megabytes": 5.0},
    {"silent_seconds": 3.0},
    {"prefill_seconds": 3.0},
)
WEATHER: tuple[Json, ...] = (
    {"interval": 0.0},
    {"interval": 0.005},
    {"interval": 0.03},
    {"interval": 0.0, "event_bytes": 4000},
)
BASE: Json = {
    "events": 1_000_000,  # more than anybody asks for: `max_tokens` alone decides
    "interval": 0.005,
    "models": {BROKEN: {"load_failure": "Model type x not supported."}},
}


class Request:
    """One request on a connection of its own, read strictly and to its end, or left.

    Args:
        leave: seconds after which the client goes, wherever the answer is; None: never.
        slow: seconds for which it reads hardly anything.
        abrupt: whether it goes with a reset.
    """

    def __init__(
        self,
        port: int,
        seen: Seen,
        leave: float | None = None,
        slow: float = 0.0,
        abrupt: bool = False,
    ) -> None:
        self.seen = seen
        self._leave = leave
        self._slow = slow
        self._abrupt = abrupt
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._answer: http.client.HTTPResponse | None = None
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if slow:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    def send(self, method: str, path: str, body: Json | None = None) -> Request:
        """Connects and sends."""
        raw = None if body is None else json.dumps(body).encode()
        try:
            self._socket.settimeout(self.seen.limit)
            self._socket.connect(("127.0.0.1", self._connection.port))
            self._connection.sock = self._socket
            self._connection.request(method, path, raw, {"X-Request-Id": self.seen.request_id})
        except OSError as error:
            self.seen.trouble = f"not taken: {error!r}"
        return self

    def read(self) -> Seen:
        """Reads the answer to its end, and closes."""
        seen = self.seen
        try:
            if not seen.trouble:
                self._read(seen)
        except TimeoutError:
            if self._leave is not None:
                seen.left = True
            else:
                seen.trouble = f"no end within {seen.limit:g} s, {len(seen.body)} bytes came"
        except (OSError, http.client.HTTPException) as error:
            seen.trouble = f"{error!r} after {len(seen.body)} bytes: {seen.body[-120:]!r}"
        finally:
            seen.seconds = time.monotonic() - seen.begun
            self._close()
        return seen

    def _read(self, seen: Seen) -> None:
        self._arm()
        answer = self._answer = self._connection.getresponse()
        seen.status = answer.status
        seen.headers = {name.lower(): value for name, value in answer.getheaders()}
        while data := self._next(answer):
            seen.body += data
        # http.client raises where chunks end without their terminator, not at a missing length.
        seen.ended = answer.chunked or answer.length == 0

    def _next(self, answer: http.client.HTTPResponse) -> bytes:
        if self._slow > 0:
            pause = min(0.25, self._slow)
            self._slow -= pause
            time.sleep(pause)
            self._arm()
            return answer.read1(512)
        self._arm()
        return answer.read1(1 << 16)

    def _arm(self) -> None:
        limit = self.seen.limit if self._leave is None else self._leave
        left = self.seen.begun + limit - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _close(self) -> None:
        if self._abrupt:
            with contextlib.suppress(OSError):
                linger = struct.pack("ii", 1, 0)
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if self._answer is not None:
            self._answer.close()
        self._connection.close()
        self._socket.close()


class Clients:
    """Random clients of one proxy, each in a thread, until they are told to end."""

    def __init__(self, phase: Phase, proxy: Proxy, ledger: Ledger, real: bool) -> None:
        self.phase = phase
        self.proxy = proxy
        self.ledger = ledger
        self.real = real
        self.over = threading.Event()
        self._numbers = count(1)
        self._threads: list[threading.Thread] = []

    def start(self, number: int, seed: int) -> None:
        """Lets so many clients loose, and one that only looks."""
        for client in range(number):
            self._thread(self._client, random.Random(f"{seed} {self.phase.name} {client}"))
        self._thread(self._look_on)

    def stop(self) -> list[threading.Thread]:
        """Waits for the answers under way; returns the threads that do not end."""
        self.over.set()
        deadline = time.monotonic() + 120
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [thread for thread in self._threads if thread.is_alive()]

    def _thread(self, target: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def _client(self, dice: random.Random) -> None:
        acts: list[tuple[float, Callable[[random.Random], None]]] = [
            (30, self.stream),
            (12, self.whole),
            (10, self.stream_left),
            (8, self.whole_left),
            (4, self.slow_reader),
            (3, self.logprobs),
            (2, self.alone),
            (4, self.load),
            (3, self.load_watched),
            (2, self.load_left),
            (2, self.load_unwaited),
            (1, self.broken),
            (0.3, self.burst),
        ]
        if self.phase.faults:
            acts += [(2, self.unload), (1, self.unload_left)]
        weights, calls = [weight for weight, _ in acts], [call for _, call in acts]
        while not self.over.is_set():
            dice.choices(calls, weights)[0](dice)
            self.over.wait(dice.choice((0, 0, 0.05, 0.5)))

    # -- what a client does

    def stream(self, dice: random.Random) -> None:
        self._chat(dice, "stream")

    def stream_left(self, dice: random.Random) -> None:
        self._chat(dice, "stream, left", tokens=1000, leave=dice.uniform(0, 1.5))

    def slow_reader(self, dice: random.Random) -> None:
        self._chat(dice, "stream, read slowly", tokens=900, slow=dice.uniform(1, 8))

    def alone(self, dice: random.Random) -> None:
        self._chat(dice, "stream, alone", seed=dice.randrange(100), temperature=0.5)

    def whole(self, dice: random.Random) -> None:
        self._chat(dice, "whole", stream=False)

    def whole_left(self, dice: random.Random) -> None:
        self._chat(dice, "whole, left", stream=False, tokens=1000, leave=dice.uniform(0, 1.5))

    def logprobs(self, dice: random.Random) -> None:
        self._chat(dice, "whole, with logprobs", stream=False, logprobs=True)

    def load(self, dice: random.Random) -> None:
        self._load(dice, "load")

    def load_watched(self, dice: random.Random) -> None:
        self._load(dice, "load, watched", shape="progress", stream=True)

    def load_left(self, dice: random.Random) -> None:
        shape: Shape = dice.choice(("plain", "progress"))
        stream = shape == "progress"
        self._load(dice, "load, left", shape, leave=dice.uniform(0, 0.5), stream=stream)

    def load_unwaited(self, dice: random.Random) -> None:
        self._load(dice, "load, not waited for", wait=False)

    def broken(self, dice: random.Random) -> None:
        self._ask("load of a broken one", "/v1/models/load", {"model_id": f"tiny/{BROKEN}"})

    def unload(self, dice: random.Random) -> None:
        self._ask("unload", "/v1/models/unload", {})

    def unload_left(self, dice: random.Random) -> None:
        self._ask("unload, left", "/v1/models/unload", {}, leave=dice.uniform(0, 0.2))

    def burst(self, dice: random.Random) -> None:
        """More requests at once than there are places."""
        asked = []
        for _ in range(PLACES + QUEUE + 6):
            body, seen = self._chat_request(dice, "burst", stream=dice.random() < 0.7, tokens=5)
            asked.append(Request(self.proxy.port, seen).send("POST", "/v1/chat/completions", body))
        for request in asked:
            self._enter(request.read())

    def at_the_stop(self, tokens: int) -> Request:
        """A stream that is under way when the proxy is told to stop."""
        body, seen = self._chat_request(random.Random(0), "stream, at the stop", True, tokens)
        seen.model = None
        return Request(self.proxy.port, seen).send(
            "POST", "/v1/chat/completions", {**body, "model": f"tiny/{MODELS[0]}"}
        )

    # -- requests

    def _chat(
        self,
        dice: random.Random,
        row: str,
        *,
        stream: bool = True,
        tokens: int = 0,
        leave: float | None = None,
        slow: float = 0.0,
        **fields: Any,
    ) -> None:
        body, seen = self._chat_request(dice, row, stream, tokens, **fields)
        request = Request(self.proxy.port, seen, leave, slow, abrupt=dice.random() < 0.3)
        self._enter(request.send("POST", "/v1/chat/completions", body).read())

    def _chat_request(
        self, dice: random.Random, row: str, stream: bool, tokens: int, **fields: Any
    ) -> tuple[Json, Seen]:
        tokens = min(tokens or dice.randint(1, 80), 900 if self.real else 1000)
        # Most want the same model: with a swap for each request nothing would be answered.
        (name,) = dice.choices((*MODELS, None), (6, 1, 1, 1))
        seen = self._seen(row, "stream" if stream else "whole", tokens=tokens)
        if self.phase.selection == "requested":
            seen.model = name
        body = {
            "model": "no such model" if name is None else f"tiny/{name}",
            "messages": [{"role": "user", "content": seen.request_id}],
            "max_tokens": tokens,
            "stream": stream,
            **fields,
        }
        if stream:
            body["stream_options"] = {"include_usage": True}
        return body, seen

    def _load(
        self,
        dice: random.Random,
        row: str,
        shape: Shape = "plain",
        leave: float | None = None,
        **fields: Any,
    ) -> None:
        name = dice.choice((MODELS[0], *MODELS))
        thinking = not self.real and dice.random() < 0.2
        body = {"model_id": f"tiny/{name}", "enable_thinking": thinking, **fields}
        self._ask(row, "/v1/models/load", body, shape, leave)

    def _ask(
        self,
        row: str,
        path: str,
        body: Json,
        shape: Shape = "plain",
        leave: float | None = None,
    ) -> None:
        request = Request(self.proxy.port, self._seen(row, shape), leave)
        self._enter(request.send("POST", path, body).read())

    def _look_on(self) -> None:
        while not self.over.wait(0.1):
            for path in ("/health", "/v1/models", "/v1/models/loaded"):
                seen = self._seen(f"look at {path}", limit=LOOK_LIMIT)
                self._enter(Request(self.proxy.port, seen).send("GET", path).read())

    def _seen(self, row: str, shape: Shape = "plain", **facts: Any) -> Seen:
        return Seen(row, f"{self.phase.name}-{next(self._numbers)}", shape, **facts)

    def _enter(self, seen: Seen) -> None:
        self.enter(seen, self.phase.codes)

    def enter(self, seen: Seen, codes: frozenset[str]) -> None:
        """Has the ledger judge an answer; keeps the bytes of a wrong one."""
        if self.ledger.enter(self.phase.name, seen, codes).outcome == "wrong":
            (self.proxy.instance.parent / f"{seen.request_id}.body").write_bytes(seen.body)


class Meanwhile:
    """What goes on in a thread of its own until it is told to end."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.over.set()
        self._thread.join()

    def _run(self) -> None:
        raise NotImplementedError


class Chaos(Meanwhile):
    """What happens to the backend."""

    def __init__(self, proxy: Proxy, program: Path | None, faults: bool, seed: str) -> None:
        self._proxy = proxy
        self._program = program
        self._faults = faults
        self._dice = random.Random(seed)
        self.done: Counter[str] = Counter()
        super().__init__()

    def _run(self) -> None:
        while not self.over.wait(self._dice.uniform(0.5, 3.0)):
            with contextlib.suppress(psutil.Error, OSError, requests.RequestException):
                self._strike()
        self._script()

    def _strike(self) -> None:
        dice = self._dice
        if not self._faults:
            self._script(**dice.choice(WEATHER))
        elif dice.random() < 0.3:
            for backend in backends(self._proxy):
                number = dice.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
                backend.send_signal(number)
                self.done[number.name] += 1
        elif self._program is None:
            self.done["generation thread killed"] += self._kill_generation()
        else:
            fault = dice.choice(FAULTS)
            self._script(**{**dice.choice(WEATHER), **fault})
            self.done[next(iter(fault))] += 1
            self.over.wait(dice.uniform(0.2, 1.5))
            self._script(**dice.choice(WEATHER))

    def _kill_generation(self) -> bool:
        """On the backend's own port, past the guard: what ends its generation thread."""
        model = self._proxy.loaded().get("model_id")
        url = f"http://127.0.0.1:{self._proxy.backend_port}/v1/completions"
        body = {"model": model, "prompt": ["a"], "max_tokens": 1}
        with contextlib.suppress(requests.ReadTimeout):
            requests.post(url, json=body, timeout=2)
        return model is not None

    def _script(self, **changes: Any) -> None:
        if self._program is not None:
            scripted_server.change(self._program, **{**scripted_server.SCRIPT, **BASE, **changes})


@dataclass
class Figures:
    """What the proxy's process holds."""

    threads: int
    files: int
    sockets: int
    rss: int

    @classmethod
    def of(cls, process: psutil.Process) -> Figures:
        with process.oneshot():
            return cls(
                process.num_threads(),
                process.num_fds(),
                len(process.net_connections("all")),
                process.memory_info().rss,
            )

    @classmethod
    def at_rest(cls, process: psutil.Process) -> Figures:
        """The figures once they have stood still for a second."""
        figures, since = cls.of(process), time.monotonic()
        while time.monotonic() - since < 1:
            time.sleep(0.1)
            if (now := cls.of(process)).held() != figures.held():
                figures, since = now, time.monotonic()
        return figures

    def held(self) -> tuple[int, int, int]:
        """What must be the same again when nothing goes on."""
        return self.threads, self.files, self.sockets


@dataclass
class Samples(Meanwhile):
    """The proxy, looked at from outside all the while."""

    proxy: Proxy
    process: psutil.Process
    rss: list[int] = field(default_factory=list)
    threads: int = 0
    files: int = 0
    excess: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def _run(self) -> None:
        while not self.over.wait(SAMPLE):
            with contextlib.suppress(psutil.Error):
                self.rss.append(self.process.memory_info().rss)
                self.threads = max(self.threads, self.process.num_threads())
                self.files = max(self.files, self.process.num_fds())
                if len(running := backends(self.proxy)) > 1:
                    self.excess.append(f"{len(running)} backends at once: {running}")


def alive(proxy: Proxy) -> list[psutil.Process]:
    """The processes that the proxy has started, and theirs in turn, if they are no corpses."""
    found = []
    for child in proxy.children():
        with contextlib.suppress(psutil.Error):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def backends(proxy: Proxy) -> list[psutil.Process]:
    """The backends alone: the proxy's own children, and not the compilers that MLX starts."""
    assert proxy.process is not None
    found = []
    for process in alive(proxy):
        with contextlib.suppress(psutil.Error):
            if process.ppid() == proxy.process.pid:
                found.append(process)
    return found


def becomes_true(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


class Soak:
    """All phases over one kind of backend, in one folder."""

    def __init__(self, folder: Path, options: argparse.Namespace, console: Console) -> None:
        self.folder = folder
        self.options = options
        self.console = console
        self.ledger = Ledger()
        self.program: Path | None = None
        self.models = folder / "models"
        for name in (*MODELS, BROKEN):
            tiny_models.build(self.models / "tiny" / name, says=name)
        if options.real:
            tiny_models.break_model(self.models / "tiny" / BROKEN, "raising_template")
        else:
            self.program = scripted_server.install(folder / "standin", **BASE)

    def run(self) -> Ledger:
        phases = PHASES[1:] if self.options.real else PHASES
        for phase in phases:
            seconds = self.options.seconds / len(phases)
            self.console.print(f"{phase.name}: {seconds:.0f} s with seed {self.options.seed}")
            with self._proxy(phase) as proxy:
                self._run(phase, proxy, seconds)
        return self.ledger

    @contextlib.contextmanager
    def _proxy(self, phase: Phase) -> Iterator[Proxy]:
        settings = {
            **SETTINGS,
            "MODEL_SELECTION": phase.selection,
            "LOAD_TIMEOUT": 30 if self.options.real else 6,
            "MLX_SERVER_BIN": self.program or SERVER_BIN,
            "PROXY_PORT": quiet_port(),
            "MLX_BACKEND_PORT": quiet_port(),
        }
        instance = self.folder / phase.name / "instance"
        instance.mkdir(parents=True)
        proxy = Proxy(instance, self.models, **settings)
        try:
            yield proxy.start()
        finally:
            proxy.clean_up()

    def _run(self, phase: Phase, proxy: Proxy, seconds: float) -> None:
        assert proxy.process is not None
        process = psutil.Process(proxy.process.pid)
        clients = Clients(phase, proxy, self.ledger, self.options.real)
        warm_up(clients)
        self._await_quiet(phase, proxy)
        base = Figures.at_rest(process)
        samples = Samples(proxy, process)
        chaos = Chaos(proxy, self.program, phase.faults, f"{self.options.seed} {phase.name}")
        clients.start(self.options.clients, self.options.seed)
        server = proxy.process
        becomes_true(lambda: server.poll() is not None, seconds)
        chaos.stop()
        for thread in clients.stop():
            self.ledger.wrong(phase.name, thread.name, "a client does not come to an end")
        samples.stop()
        if proxy.process.poll() is not None:
            self.ledger.wrong(phase.name, "the proxy", f"ended with {proxy.process.returncode}")
            return
        self.ledger.require_unloads(phase.name)
        for sentence in samples.excess:
            self.ledger.wrong(phase.name, "processes", sentence)
        self._await_quiet(phase, proxy)
        self._require_base(phase, process, base)
        self._require_flat(phase, base, samples, Figures.of(process))
        self._require_nothing_runs_on(phase)
        self._stop(phase, proxy, clients)
        for name, times in sorted(chaos.done.items()):
            self.ledger.fact(phase.name, f"fault: {name}", str(times))

    def _await_quiet(self, phase: Phase, proxy: Proxy) -> None:
        """No lease, nobody waiting; then the idle unload, and no process at all."""
        told: Json = {}

        def at_rest() -> bool:
            told.update(proxy.health())
            return not (told["in_flight"] or told["waiting"] or told["transition"])

        if not becomes_true(at_rest, QUIET_LIMIT):
            self.ledger.wrong(phase.name, "leases", f"there is no rest: {told}")
        there = 1 if proxy.loaded()["loaded"] else 0
        if len(running := backends(proxy)) != there:
            self.ledger.wrong(phase.name, "processes", f"{running} where {there} should be")
        if not becomes_true(lambda: not alive(proxy), IDLE + QUIET_LIMIT):
            self.ledger.wrong(phase.name, "idle", f"not unloaded: {proxy.loaded()}")

    def _require_base(self, phase: Phase, process: psutil.Process, base: Figures) -> None:
        if not becomes_true(lambda: Figures.of(process).held() == base.held(), QUIET_LIMIT):
            now = Figures.of(process)
            self.ledger.wrong(
                phase.name,
                "threads, files, sockets",
                f"{base.held()} before, {now.held()} after: {process.net_connections('all')}",
            )

    def _require_flat(self, phase: Phase, base: Figures, samples: Samples, end: Figures) -> None:
        half = len(samples.rss) // 2
        first = statistics.median(samples.rss[half // 2 : half])
        second = statistics.median(samples.rss[-(half // 2) :])
        if second - first > RSS_GROWTH:
            self.ledger.wrong(phase.name, "memory", f"grows from {first:,} to {second:,} bytes")
        rss = [base.rss, int(first), int(second), max(samples.rss), end.rss]
        shown = " ".join(f"{value / 1e6:.0f}" for value in rss)
        facts = {
            "RSS: start, half, late, peak, end": f"{shown} MB",
            "threads: start, peak, end": f"{base.threads} {samples.threads} {end.threads}",
            "files: start, peak, end": f"{base.files} {samples.files} {end.files}",
            "sockets: start, end": f"{base.sockets} {end.sockets}",
        }
        for name, value in facts.items():
            self.ledger.fact(phase.name, name, value)

    def _require_nothing_runs_on(self, phase: Phase) -> None:
        """The stand-in's record: each request was made once, and ended when its client had gone."""
        if self.program is None:
            return
        entries = scripted_server.record(self.program)
        sent = [it for it in entries if it["event"] == "request"]
        asked = Counter(
            message["content"] for it in sent for message in it["body"].get("messages", ())
        )
        for name, times in asked.items():
            if times > 1 and name.startswith(phase.name):
                self.ledger.wrong(phase.name, name, f"was sent to the backend {times} times")
        ended = {(it["pid"], it["number"]) for it in entries if it["event"] == "finished"}
        # The last one was unloaded when it was idle: whatever it still did, it did for nobody.
        last = [it["pid"] for it in entries if it["event"] == "terminated"][-1]
        for it in sent:
            if it["pid"] == last and (last, it["number"]) not in ended:
                self.ledger.wrong(phase.name, it["body"]["messages"][0]["content"], "runs on")
        started = {it["pid"] for it in entries if it["event"] == "started"}
        self.ledger.fact(phase.name, "backends started so far", str(len(started)))

    def _stop(self, phase: Phase, proxy: Proxy, clients: Clients) -> None:
        """SIGTERM with streams under way: told how they end, exit status 0, and nothing left."""
        if self.program is not None:
            scripted_server.change(self.program, interval=0.03)
        proxy.load(f"tiny/{MODELS[0]}")
        family = alive(proxy)
        asked = [clients.at_the_stop(tokens) for tokens in (900, 900, 60, 120)]
        # A tiny model needs no tenth of a second for the short ones: the long ones will do.
        if not becomes_true(lambda: proxy.loaded()["in_flight"] >= 2, QUIET_LIMIT):
            self.ledger.wrong(phase.name, "the stop", f"no streams: {proxy.loaded()}")
        readers = [threading.Thread(target=request.read) for request in asked]
        for reader in readers:
            reader.start()
        begun = time.monotonic()
        try:
            status = proxy.stop(signal.SIGTERM, STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self.ledger.wrong(phase.name, "the stop", f"not ended within {STOP_LIMIT:g} s")
            return
        self.ledger.fact(phase.name, "stopped within", f"{time.monotonic() - begun:.1f} s")
        for reader, request in zip(readers, asked, strict=True):
            reader.join()
            clients.enter(request.seen, frozenset({"shutting_down"}))
        left = [str(it) for it in family if it.is_running()]
        left += [f"port {it}" for it in (proxy.port, proxy.backend_port) if not is_free(it)]
        left += [str(it) for it in proxy.instance.glob("*-*.json")]
        if status != 0 or left:
            self.ledger.wrong(phase.name, "the stop", f"status {status}, left behind: {left}")
        if "Traceback" in proxy.said():
            self.ledger.wrong(phase.name, "the proxy's log", f"a traceback in {proxy.output}")


def warm_up(clients: Clients) -> None:
    """All that is made once: every thread has run, every kind of answer has been given."""
    dice = random.Random(0)
    clients.load(dice)
    for _ in range(3):
        clients.burst(dice)
    clients.stream(dice)
    clients.whole(dice)
    clients.load_watched(dice)


def quiet_port() -> int:
    """A free port that the system gives to no outgoing connection while its owner is away."""
    while True:
        port = random.randint(20000, 32000)
        if is_free(port):
            return port


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.soak.__main__", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="for all phases together")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000))
    parser.add_argument("--clients", type=int, help=f"default {CLIENTS}, 4 with --real")
    parser.add_argument("--real", action="store_true", help="over mlx_lm.server and tiny models")
    options = parser.parse_args(arguments)
    options.clients = options.clients or (4 if options.real else CLIENTS)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the soak; returns the exit status."""
    options = parsed(arguments)
    console = Console(width=None if sys.stdout.isatty() else 110)
    folder = Path(tempfile.mkdtemp(prefix="mlxproxy-soak-"))
    ledger = Soak(folder, options, console).run()
    ledger.print(console)
    if ledger.balanced:
        shutil.rmtree(folder, ignore_errors=True)
        console.print("The ledger balances.")
        return 0
    console.print(f"The ledger does not balance. The logs are in {folder}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
