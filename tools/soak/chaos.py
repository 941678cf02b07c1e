"""The faults that are injected into the backends."""

from __future__ import annotations

import contextlib
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.support import scripted_server
from tests.support.proxy import Proxy
from tools.soak.ledger import Json
from tools.soak.meanwhile import Meanwhile
from tools.soak.phases import BROKEN, LARGE, MODEL_MB, PROCESS_MB
from tools.soak.processes import backends

# The stand-in's faults, each for a second or so.
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
    "events": 1_000_000,  # more than anybody requests: only `max_tokens` limits an answer
    "interval": 0.005,
    "megabytes": MODEL_MB - PROCESS_MB,
    "models": {
        LARGE: {"megabytes": 2 * MODEL_MB - PROCESS_MB},
        BROKEN: {"load_failure": "Model type x not supported."},
    },
}


class Chaos(Meanwhile):
    """The faults that are injected into the backend."""

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
        """Kill the generation thread with a request to the backend's own port, past the guard."""
        model = self._proxy.loaded().get("model_id")
        url = f"http://127.0.0.1:{self._proxy.backend_port}/v1/completions"
        body = {"model": model, "prompt": ["a"], "max_tokens": 1}
        with contextlib.suppress(requests.ReadTimeout):
            requests.post(url, json=body, timeout=2)
        return model is not None

    def _script(self, **changes: Any) -> None:
        if self._program is not None:
            scripted_server.change(self._program, **{**scripted_server.SCRIPT, **BASE, **changes})
