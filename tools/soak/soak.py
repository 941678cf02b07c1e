"""A soak: all phases with one kind of backend, and the checks of the state that remains."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from mlxproxy.backend.ports import is_free
from mlxproxy.catalog.model import DEFAULT_CONTEXT
from tests.support import scripted_server, tiny_models
from tests.support.ports import free_range
from tests.support.proxy import Proxy
from tests.support.server_process import SERVER_BIN
from tools.soak.chaos import BASE, Chaos
from tools.soak.clients import Clients, warm_up
from tools.soak.ledger import Json, Ledger
from tools.soak.phases import (
    BROKEN,
    IDLE,
    LARGE,
    MODEL_MB,
    MODELS,
    PHASES,
    PLACES,
    QUEUE,
    REAL_MODEL_MB,
    Phase,
)
from tools.soak.processes import Figures, Samples, alive, backends

QUIET_LIMIT = 30.0  # seconds after the last client within which everything must have come to rest
STOP_LIMIT = 20.0
BUDGET_MODELS = 3.25  # three of the small models fit together, or the large one beside one of them
FLOAT_BYTES = 4
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


def becomes_true(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


class Soak:
    """All phases with one kind of backend, in one folder."""

    def __init__(self, folder: Path, options: argparse.Namespace, console: Console) -> None:
        self.folder = folder
        self.options = options
        self.console = console
        self.ledger = Ledger()
        self.program: Path | None = None
        self.models = folder / "models"
        unit = REAL_MODEL_MB if options.real else MODEL_MB
        self.budget = int(BUDGET_MODELS * unit) << 20
        for name in (*MODELS, BROKEN):
            size = _of_size(2 * unit if name == LARGE else unit)
            tiny_models.build(self.models / "tiny" / name, says=name, config=size)
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
            "PROXY_PORT": free_range(1),
            "MLX_BACKEND_PORT": free_range(self.options.max_loaded),
            "MAX_LOADED": self.options.max_loaded,
            "MEMORY_BUDGET": self.budget,
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
        for name in MODELS:  # so that each slot has opened its log
            proxy.load(f"tiny/{name}")
        warm_up(clients)
        self._await_quiet(phase, proxy)
        base = Figures.at_rest(process)
        samples = Samples(proxy, process, self.options.max_loaded, self.budget)
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
        evictions = sum(
            map(int, re.findall(r"swap_seconds_count\{.*\} (\d+)", proxy.get("/metrics").text))
        )
        self.ledger.fact(phase.name, "models evicted for another", str(evictions))
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
        """Wait until no lease or queued request is left, then for the idle unload of all."""
        told: Json = {}

        def at_rest() -> bool:
            told.update(proxy.health())
            return not (told["in_flight"] or told["waiting"] or told["transition"])

        if not becomes_true(at_rest, QUIET_LIMIT):
            self.ledger.wrong(phase.name, "leases", f"there is no rest: {told}")
        there = len(proxy.loaded()["models"])
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
            "most models at a time": f"{samples.models} of {self.options.max_loaded}",
            "their memory, at most": f"{samples.memory / 1e6:.0f} of {self.budget / 1e6:.0f} MB",
        }
        for name, value in facts.items():
            self.ledger.fact(phase.name, name, value)

    def _require_nothing_runs_on(self, phase: Phase) -> None:
        """Check the stand-in's record: each request came once, and ended when its client left."""
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
        # The last backend was unloaded when idle: whatever it was still doing, it did for nobody.
        last = [it["pid"] for it in entries if it["event"] == "terminated"][-1]
        for it in sent:
            if it["pid"] == last and (last, it["number"]) not in ended:
                self.ledger.wrong(phase.name, it["body"]["messages"][0]["content"], "runs on")
        started = {it["pid"] for it in entries if it["event"] == "started"}
        self.ledger.fact(phase.name, "backends started so far", str(len(started)))

    def _stop(self, phase: Phase, proxy: Proxy, clients: Clients) -> None:
        """Stop by SIGTERM with streams in flight: they get errors, the status is 0, none stays."""
        if self.program is not None:
            scripted_server.change(self.program, interval=0.03)
        proxy.load(f"tiny/{MODELS[0]}")
        family = alive(proxy)
        asked = [clients.at_the_stop(tokens) for tokens in (900, 900, 60, 120)]
        # A tiny model ends the short ones within a tenth of a second: wait only for the long ones.
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
        ports = range(proxy.backend_port, proxy.backend_port + self.options.max_loaded)
        left += [f"port {it}" for it in (proxy.port, *ports) if not is_free(it)]
        left += [str(it) for it in proxy.instance.glob("*-*.json")]
        if status != 0 or left:
            self.ledger.wrong(phase.name, "the stop", f"status {status}, left behind: {left}")
        if "Traceback" in proxy.said():
            self.ledger.wrong(phase.name, "the proxy's log", f"a traceback in {proxy.output}")


def _of_size(megabytes: int) -> Json:
    """Return the entry of a config by which a tiny model is estimated to take that much memory.

    It makes the values of the key-value cache wide, which mlx-lm does not read for these models.
    """
    bytes_per_token = (megabytes << 20) // DEFAULT_CONTEXT
    return {"v_head_dim": bytes_per_token // FLOAT_BYTES - tiny_models.HEAD}
