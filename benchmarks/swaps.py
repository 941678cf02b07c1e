"""The time of a swap, with and without a standby, beside a start of `mlx_lm.server` by itself.

`python -m benchmarks.swaps` measures nothing else.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from benchmarks.contestants import Proxy
from benchmarks.processes import accepts, free_port, running, until
from mlxproxy import settings
from mlxproxy.demo.provide import NAME as DEMO
from mlxproxy.engines.mlx_lm.program import server_program
from tests.support import tiny_models

TINY: Final = "a tiny model"
SMOL: Final = "SmolLM2-135M 4-bit"
BIG: Final = "1 GB of random weights"
STANDBY: Final = "with a standby"
ALONE: Final = "without"
BARE: Final = "mlx_lm.server by itself"
WAYS: Final = (STANDBY, ALONE, BARE)
STANDBY_SECONDS = 60.0  # until there is one

Seconds = dict[str, dict[str, list[float]]]
"""By model, then by way: the seconds of each round."""


def measure(folder: Path, models: Path, quick: bool, say: Callable[[str], None]) -> Seconds:
    """Measure from a request for another model to its first token.

    Args:
        folder: where files are created.
        models: a models folder with `bench/alpha` and `bench/beta`.
    """
    pairs = {TINY: (models / "bench" / "alpha", models / "bench" / "beta")}
    if not quick:
        pairs |= dict(_larger(folder / "models", say))
    return {
        name: _measure_pair(folder / str(number), pair, 1 if quick else 3, name, say)
        for number, (name, pair) in enumerate(pairs.items())
    }


def _larger(folder: Path, say: Callable[[str], None]) -> Iterator[tuple[str, tuple[Path, Path]]]:
    demo = settings.load().instance.models / DEMO
    if demo.is_dir():
        yield SMOL, (_twin(demo, folder / "demo" / "one"), _twin(demo, folder / "demo" / "two"))
    else:
        say(f"no swap of {SMOL}: the demo model has not been downloaded")
    big = tiny_models.build(folder / "big" / "one", layers=10, hidden=2048, says="big")
    yield BIG, (big, _twin(big, folder / "big" / "two"))


def _twin(model: Path, folder: Path) -> Path:
    """Return a folder that counts as another model, with the same files."""
    folder.mkdir(parents=True)
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def _measure_pair(
    folder: Path, pair: tuple[Path, Path], rounds: int, name: str, say: Callable[[str], None]
) -> Mapping[str, list[float]]:
    measured: dict[str, list[float]] = {way: [] for way in WAYS}
    for way, wanted in ((STANDBY, True), (ALONE, False)):
        say(f"swaps of {name}, {way}")
        own = folder / ("standby" if wanted else "alone")
        own.mkdir(parents=True)
        with Proxy(own, pair[0].parents[1], STANDBY=wanted).running() as proxy:
            models = [f"{path.parent.name}/{path.name}" for path in pair]
            proxy.load(models[0])
            for number in range(rounds):
                model = models[(number + 1) % 2]
                if wanted:
                    until(lambda: _has_standby(proxy), STANDBY_SECONDS, "a standby", pause=0.1)
                begin = time.monotonic()
                proxy.load(model)
                _first_token(proxy.port, model)
                measured[way].append(time.monotonic() - begin)
                if not wanted:
                    measured[BARE].append(_bare(pair[(number + 1) % 2]))
    return measured


def _has_standby(proxy: Proxy) -> bool:
    standby = proxy.call("GET", "/v1/models/loaded")[1]["standby"]
    return bool(standby and standby["ready"])


def _bare(model: Path) -> float:
    port = free_port()
    command = [str(server_program(None)), "--model", str(model), "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    begin = time.monotonic()
    with (
        open(os.devnull, "w") as nowhere,
        running(command, env=environment, stdout=nowhere, stderr=nowhere),
    ):
        until(lambda: accepts(port), 60, "mlx_lm.server's start")
        _first_token(port, str(model))
        return time.monotonic() - begin


def _first_token(port: int, model: str) -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    body = {"model": model, "messages": messages, "max_tokens": 2, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        response = connection.getresponse()
        while line := response.readline():
            if line.startswith(b"data: {"):
                return
    raise RuntimeError(f"no token from {model}")


def main() -> None:
    """Measure the swaps alone, and print the seconds of each round."""
    with tempfile.TemporaryDirectory(prefix="mlxproxy-bench-") as name:
        models = Path(name) / "models"
        for model in ("alpha", "beta"):
            tiny_models.build(models / "bench" / model, says=model)
        seconds = measure(Path(name) / "swaps", models, False, print)
    for model, ways in seconds.items():
        bare = statistics.median(ways[BARE])
        for way, rounds in ways.items():
            each = " ".join(f"{value:.2f}" for value in rounds)
            ratio = statistics.median(rounds) / bare
            print(f"{model}, {way}: {each} s, {ratio:.2f} x {BARE}")


if __name__ == "__main__":
    main()
