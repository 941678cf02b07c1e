"""The proxy's own costs: its start, its memory, a schema, a large library."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.contestants import Proxy
from benchmarks.figures import Figure, percentile
from benchmarks.processes import resident_bytes, until
from mlxproxy.catalog import Catalog
from mlxproxy.engines.mlx_lm.inspection import Inspector
from mlxproxy.engines.mlx_lm.package import Package
from tests.support import tiny_models

LIBRARY = 2000  # model folders
PUBLISHERS = 40
LISTINGS = 20
TOKENS = 400  # of an answer with a schema, and of one without
TEXT = {"type": "json_schema", "json_schema": {"name": "text", "schema": {"type": "string"}}}


@dataclass
class Lifecycle:
    """Seconds, megabytes and milliseconds as the names say; one value from each round."""

    start_seconds: list[float] = field(default_factory=list)
    idle_megabytes: list[float] = field(default_factory=list)
    free_token_milliseconds: list[float] = field(default_factory=list)
    schema_token_milliseconds: list[float] = field(default_factory=list)
    scan_seconds: list[float] = field(default_factory=list)
    listing_milliseconds: list[float] = field(default_factory=list)
    library: int = LIBRARY

    def figure(self, name: str) -> Figure:
        return Figure(getattr(self, name))


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
    say("answers with a schema and without")
    _schema(_made(folder / "schema"), models, 1 if quick else 5, measured)
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


def _schema(folder: Path, models: Path, rounds: int, measured: Lifecycle) -> None:
    """Measure a token of a tiny model, free and in a text that a schema demands."""
    with Proxy(folder, models).running() as proxy:
        proxy.load("bench/alpha")
        for values, fields in (
            (measured.free_token_milliseconds, {}),
            (measured.schema_token_milliseconds, {"response_format": TEXT}),
        ):
            _answer_milliseconds(proxy, fields)  # the first one compiles
            values.extend(_answer_milliseconds(proxy, fields) / TOKENS for _ in range(rounds))


def _answer_milliseconds(proxy: Proxy, fields: dict[str, object]) -> float:
    messages = [{"role": "user", "content": "Hello!"}]
    body = {"messages": messages, "max_tokens": TOKENS, "temperature": 0, **fields}
    begin = time.monotonic()
    status, answer = proxy.call("POST", "/v1/chat/completions", body)
    taken = (time.monotonic() - begin) * 1000
    if status != 200 or answer["usage"]["completion_tokens"] != TOKENS:
        raise RuntimeError(f"an answer of {TOKENS} tokens failed: {status} {answer}")
    return taken


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
    """Return a models folder with four tiny models that really answer."""
    for name in ("alpha", "beta", "gamma", "delta"):
        tiny_models.build(root / "bench" / name, says=name)
    return root
