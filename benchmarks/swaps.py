"""The time of a swap, with and without a standby, beside a start of `mlx_lm.server` alone."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, Final

from benchmarks.contestants import Proxy
from benchmarks.figures import Figure, Goal
from benchmarks.part import Place
from benchmarks.processes import accepts, free_port, running, until
from benchmarks.sheet import Sheet, spread
from mlxproxy.demo import provide
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

NOTE = """\
A swap is measured from the request for another model to its first token, stop and start included;
"by itself" is a start of the backend's program alone, in the same rounds. The weights are in the
page cache."""


@dataclass
class Swaps:
    """The seconds of each round, by model, then by way."""

    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    day: str = field(default_factory=lambda: date.today().isoformat())

    NAME: ClassVar = "swaps"
    ALWAYS: ClassVar = True
    NOTE: ClassVar = NOTE

    @classmethod
    def measure(cls, place: Place, quick: bool) -> Swaps:
        """Measure everything; `quick`: the tiny model alone."""
        pairs = {TINY: (place.models / "bench" / "alpha", place.models / "bench" / "beta")}
        if not quick:
            pairs |= dict(_larger(place))
        measured = cls()
        for number, (name, pair) in enumerate(pairs.items()):
            place.say(f"swaps of {name}")
            measured.seconds[name] = _swap(place.folder / str(number), pair, 1 if quick else 3)
        return measured

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Swaps:
        """Return what `dataclasses.asdict` and JSON have converted."""
        return cls(**stored)

    def figure(self, model: str, way: str) -> Figure:
        return Figure(self.seconds.get(model, {}).get(way, []))

    def goals(self) -> Iterator[Goal]:
        """Yield the goals."""
        for model, limit in ((TINY, 0.25), (SMOL, 0.45)):
            ratio = self.figure(model, STANDBY).ratio(self.figure(model, BARE))
            yield Goal(f"swap of {model}", ratio, limit, f"x {BARE}")

    def sheets(self) -> Iterator[Sheet]:
        """Yield the table."""
        title = f"From a request for another model to its first token, s ({self.day})"
        table = Sheet(title, ("", *WAYS, f"{STANDBY},\nx {BARE}"))
        for model in self.seconds:
            quotient = self.figure(model, STANDBY).ratio(self.figure(model, BARE))
            spreads = (spread(self.figure(model, way), 2) for way in WAYS)
            table.add(model, *spreads, f"{quotient:.2f}")
        yield table


def _larger(place: Place) -> Iterator[tuple[str, tuple[Path, Path]]]:
    try:
        provide.ensure(place.demo)
    except provide.DemoUnavailable as error:
        place.say(str(error))
    else:
        folder = place.folder / "models" / "demo"
        yield (
            SMOL,
            (
                _twin(place.demo / provide.NAME, folder / "one"),
                _twin(place.demo / provide.NAME, folder / "two"),
            ),
        )
    folder = place.folder / "models" / "big"
    big = tiny_models.build(folder / "one", layers=10, hidden=2048, says="big")
    yield BIG, (big, _twin(big, folder / "two"))


def _twin(model: Path, folder: Path) -> Path:
    """Return a folder that counts as another model, with the same files."""
    folder.mkdir(parents=True)
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def _swap(folder: Path, pair: tuple[Path, Path], rounds: int) -> dict[str, list[float]]:
    """Take the ways in turn, so that whatever else happens concerns them all."""
    measured: dict[str, list[float]] = {way: [] for way in WAYS}
    names = [f"{path.parent.name}/{path.name}" for path in pair]
    root = pair[0].parents[1]
    with contextlib.ExitStack() as stack:
        proxies = {}
        for way, wanted in ((STANDBY, True), (ALONE, False)):
            (own := folder / str(wanted)).mkdir(parents=True)
            proxies[way] = stack.enter_context(Proxy(own, root, STANDBY=wanted).running())
            proxies[way].load(names[0])
        for number in range(1, rounds + 1):
            until(lambda: _has_standby(proxies[STANDBY]), STANDBY_SECONDS, "a standby", pause=0.1)
            for way, proxy in proxies.items():
                begin = time.monotonic()
                proxy.load(names[number % 2])
                _first_token(proxy.port, names[number % 2])
                measured[way].append(time.monotonic() - begin)
            measured[BARE].append(_bare(pair[number % 2]))
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
