"""The program that runs `mlx_lm.server` with mlxproxy's features inside it (see `start.py`).

The environment variable `MLXPROXY_INSIDE` holds the options as a JSON object; standard input is the
channel to the proxy (see `report.py`). Without that variable, the features are still armed.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import json
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from . import (
    count,
    departures,
    detokenizer,
    gate,
    grammar,
    logprobs,
    pace,
    progress,
    prompt_cache,
    prompts,
    quiet,
    sampling,
    score,
    standby,
    stop,
    tool_calls,
)
from .disk import cache as disk_cache
from .gate import Unexpected
from .report import Pulse, Reporter

OPTIONS = "MLXPROXY_INSIDE"  # as in mlxproxy/engines/mlx_lm/engine.py
BEAT_SECONDS = 1.0


def arm(reporter: Reporter, pulse: Pulse, options: dict[str, Any]) -> None:
    """Arm each feature that suits this mlx-lm, and report which ones are armed."""
    import mlx.core as mx

    server, generate, sample_utils, tokenizer_utils, cache = (
        importlib.import_module(f"mlx_lm.{name}")
        for name in ("server", "generate", "sample_utils", "tokenizer_utils", "models.cache")
    )
    watched = departures.Departures(pulse)
    counter = prompts.Counter()
    # Each feature wraps those armed before it, so what it calls comes first.
    features: dict[str, Callable[[], None]] = {
        "prompt_cache": lambda: prompt_cache.arm(cache),
        **_prompt_cache_disk(server, cache, mx, reporter, pulse, options),
        "detokenizer": lambda: detokenizer.arm(tokenizer_utils),
        "sampling": lambda: sampling.arm(server, sample_utils, mx),
        "tool_calls": lambda: tool_calls.arm(server, watched.check_client),
        "logprobs": lambda: logprobs.arm(server, tokenizer_utils),
        "grammar": lambda: grammar.arm(server, mx),
        "stop": lambda: stop.arm(server),
        "count": lambda: count.arm(server, counter),
        "score": lambda: score.arm(server, cache, mx, pulse, options.get("context"), counter),
        "prompts": lambda: prompts.arm(server, options.get("context"), counter),
        "progress": lambda: progress.arm(server),
        "pace": lambda: pace.arm(server, generate),
        "departures": lambda: watched.arm(server, generate),
        # Its beats report what departures count; the thread that watches for those sends them.
        "heartbeat": lambda: _arm_heartbeat(server, reporter, pulse, watched),
        "death": lambda: quiet.arm_death(
            server, reporter.serving, lambda why: reporter.send(died=why)
        ),
    }
    armed, off = [], {}
    for name, enable in features.items():
        try:
            if name == "heartbeat" and "departures" in off:
                raise Unexpected("it needs departures")
            enable()
            armed.append(name)
        except (Unexpected, AttributeError, TypeError) as error:
            off[name] = str(error)
    reporter.send(features=armed, off=off, device=mx.default_device().type.name)


def _prompt_cache_disk(
    server: Any, cache: Any, mx: Any, reporter: Reporter, pulse: Pulse, options: dict[str, Any]
) -> dict[str, Callable[[], None]]:
    """Return the feature, or nothing if it is turned off."""
    name = "prompt_cache_disk"
    given = options.get(name)
    if given is None:
        return {}

    def enable() -> None:
        versions = {
            "mlx": mx.__version__,
            "mlx_lm": sys.modules["mlx_lm"].__version__,
            "device": str(mx.device_info()["architecture"]),
        }

        def off(why: str) -> None:
            reporter.send(off={name: why})

        disk_cache.arm(server, cache, mx, versions, given, lambda: pulse.active > 0, off)

    return {name: enable}


def _arm_heartbeat(
    server: Any, reporter: Reporter, pulse: Pulse, watched: departures.Departures
) -> None:
    names: gate.Names = {
        "ModelProvider._load": ("self",),
        "ResponseGenerator._run_generate": ("self",),
    }
    gate.require(server, names)
    provider, generator = server.ModelProvider, server.ResponseGenerator
    load, run = provider._load, generator._run_generate

    @functools.wraps(load)
    def load_model(self: Any, *arguments: Any, **named: Any) -> Any:
        with pulse.at("load"):
            return load(self, *arguments, **named)

    @functools.wraps(run)
    def run_and_watch(self: Any) -> None:
        threading.Thread(target=watch, args=(self,), name="watch", daemon=True).start()
        run(self)

    def watch(responses: Any) -> None:
        beaten = 0.0
        while True:
            watched.look()
            now = time.monotonic()
            if now - beaten >= BEAT_SECONDS:
                beaten = now
                reporter.send(beat=pulse.beat(responses.requests.qsize()))
            time.sleep(departures.INTERVAL_SECONDS)

    provider._load = load_model
    generator._run_generate = run_and_watch


def main() -> None:
    """Run the program that the command line names."""
    del sys.argv[0]
    if sys.argv[1:2] == [standby.FLAG]:
        standby.wait()
    given = os.environ.pop(OPTIONS, None)
    reporter = Reporter(None) if given is None else Reporter.of_standard_input()
    faulthandler.enable()  # if the process crashes, the log shows each thread's stack
    pulse = Pulse()
    quiet.arm(reporter.serving)
    try:
        arm(reporter, pulse, json.loads(given or "{}"))
    except ImportError as error:  # this mlx-lm has an entirely different layout
        reporter.send(features=[], off={"all": str(error)}, device="unknown")
    sys.path[0] = os.path.dirname(sys.argv[0])  # as if the program had been started by itself
    runpy.run_path(sys.argv[0], run_name="__main__")
