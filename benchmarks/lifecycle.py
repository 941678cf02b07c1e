"""The proxy's own costs: its start, its memory, a swap, a large library."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import swaps
from benchmarks.contestants import Proxy
from benchmarks.figures import Figure, percentile
from benchmarks.processes import resident_bytes, until
from benchmarks.swaps import Seconds
from mlxproxy.catalog import Catalog
from mlxproxy.engines.mlx_lm.inspection import Inspector
from mlxproxy.engines.mlx_lm.package import Package
from tests.support import tiny_models

LIBRARY = 2000  # model folders
PUBLISHERS = 40
LISTINGS = 20


@dataclass
class Lifecycle:
    """Seconds, megabytes and milliseconds as the names say; one value from each round.

    Attributes:
        swaps: see :mod:`benchmarks.swaps`.
    """

    start_seconds: list[float] = field(default_factory=list)
    idle_megabytes: list[float] = field(default_factory=list)
    scan_seconds: list[float] = field(default_factory=list)
    listing_milliseconds: list[float] = field(default_factory=list)
    swaps: Seconds = field(default_factory=dict)
    library: int = LIBRARY

    def figure(self, name: str) -> Figure:
        return Figure(getattr(self, name))

    def swap(self, model: str, way: str) -> Figure:
        """Return the seconds of the swaps of a model."""
        return Figure(self.swaps.get(model, {}).get(way, []))


def measure(folder: Path, models: Path, quick: bool, say: Callable[[str], None]) -> Lifecycle:
    """Measure everything.

    Args:
        folder: where files are created.
        models: a models folder with the two models `bench/alpha` and `bench/beta`.
    """
    measured = Lifecycle(library=200 if quick else LIBRARY)
    say("starts of the proxy")
    for number in range(1 if quick else 5):
        _start(_made(folder / f"start{number}"), models, measured)
    measured.swaps = swaps.measure(_made(folder / "swaps"), models, quick, say)
    say(f"a library of {measured.library} models")
    _library(_made(folder / "library"), models, measured)
    return measured


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _start(folder: Path, models: Path, measured: Lifecycle) -> None:
    begin = time.monotonic()
    with Proxy(folder, models).running() as proxy:
        measured.start_seconds.append(time.monotonic() - begin)
        measured.idle_megabytes.append(resident_bytes([proxy.pid]) / (1 << 20))


def _library(folder: Path, models: Path, measured: Lifecycle) -> None:
    root = folder / "models"
    generate(root, models / "bench" / "alpha", measured.library)
    begin = time.monotonic()
    listed = Catalog((root,), Inspector(Package(None)), patience=60).models()
    measured.scan_seconds.append(time.monotonic() - begin)
    if not len(listed) == sum(model.loadable for model in listed) == measured.library:
        raise RuntimeError(f"{len(listed)} models listed, or not all loadable")
    with Proxy(folder, root).running() as proxy:
        until(lambda: len(_models(proxy)) == measured.library, 60, "the listing", pause=0.05)
        measured.listing_milliseconds.append(
            percentile([_listing(proxy.port) for _ in range(LISTINGS)], 50)
        )


def _models(proxy: Proxy) -> list[object]:
    """Return the models listed so far: a long scan does not delay the answer."""
    listed: list[object] = proxy.call("GET", "/v1/models")[1].get("data", [])
    return listed


def _listing(port: int) -> float:
    """Return the milliseconds that one GET /v1/models takes."""
    begin = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/v1/models")
        connection.getresponse().read()
    return (time.monotonic() - begin) * 1000


def generate(root: Path, like: Path, count: int) -> None:
    """Create model folders, each with its own configuration; all share the weights of one model."""
    config = json.loads((like / "config.json").read_text())
    for number in range(count):
        folder = root / f"publisher{number % PUBLISHERS}" / f"Model-{number}-4bit"
        folder.mkdir(parents=True)
        for file in like.iterdir():
            if file.name == "config.json":
                own = {**config, "max_position_embeddings": 4096 + number}
                (folder / file.name).write_text(json.dumps(own))
            else:
                os.link(file, folder / file.name)


def build_models(root: Path) -> Path:
    """Return a models folder with two tiny models that really answer."""
    tiny_models.build(root / "bench" / "alpha", says="alpha")
    tiny_models.build(root / "bench" / "beta", says="beta")
    return root
