"""The price of a schema: a token of an answer that a schema allows, against a free one.

The tiny model's step takes under a millisecond, so nothing hides the price; a larger model computes
while the mask is made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from typing import Any, ClassVar

from benchmarks.contestants import Proxy
from benchmarks.figures import Figure, Goal
from benchmarks.part import Place
from benchmarks.sheet import Sheet, spread

MODEL = "bench/alpha"
STREAMS = (1, 8)
TOKENS = 800  # of each answer
ROUNDS = 5
TEXT = {"type": "json_schema", "json_schema": {"name": "text", "schema": {"type": "string"}}}
NOTE = """\
The price of a schema is that of one long text in JSON from the tiny model, of which each token is
masked. Its vocabulary has 1,300 tokens, and a mask takes longer with more; a larger model computes
its step meanwhile."""


@dataclass
class Schemas:
    """Milliseconds for a token of each answer, by the number of answers at once."""

    free: dict[int, list[float]] = field(default_factory=dict)
    schema: dict[int, list[float]] = field(default_factory=dict)

    day: str = field(default_factory=lambda: date.today().isoformat())

    NAME: ClassVar = "schemas"
    ALWAYS: ClassVar = True
    NOTE: ClassVar = NOTE

    @classmethod
    def measure(cls, place: Place, quick: bool) -> Schemas:
        """Measure everything, with and without a schema in turn."""
        measured = cls()
        with Proxy(place.folder, place.models).running() as proxy:
            proxy.load(MODEL)
            for streams in STREAMS:
                place.say(f"{streams} answers at once, with a schema and without")
                free = measured.free[streams] = []
                schema = measured.schema[streams] = []
                for number in range(2 if quick else ROUNDS + 1):
                    one = _token_milliseconds(proxy, streams, {})
                    other = _token_milliseconds(proxy, streams, {"response_format": TEXT})
                    if number:  # the first round compiles
                        free.append(one)
                        schema.append(other)
        return measured

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Schemas:
        """Return what `dataclasses.asdict` and JSON have converted."""
        return cls(
            *({int(n): it for n, it in stored[name].items()} for name in ("free", "schema")),
            stored["day"],
        )

    def figure(self, name: str, streams: int) -> Figure:
        return Figure(getattr(self, name).get(streams, []))

    def goals(self) -> Iterator[Goal]:
        """Yield none: what matters is the price beside a model's own step."""
        yield from ()

    def sheets(self) -> Iterator[Sheet]:
        """Yield the table."""
        table = Sheet(
            f"A token of the tiny model, ms ({self.day})",
            ("answers at once", "free", "that a schema allows", "added to each, ms"),
        )
        for streams in self.free:
            free, schema = self.figure("free", streams), self.figure("schema", streams)
            added = schema.above(free).median / streams
            table.add(str(streams), spread(free, 2), spread(schema, 2), f"{added:.2f}")
        yield table


def _token_milliseconds(proxy: Proxy, streams: int, fields: dict[str, Any]) -> float:
    """Return the milliseconds from token to token, of as many answers at once."""
    messages = [{"role": "user", "content": "Hello!"}]
    body = {"messages": messages, "max_tokens": TOKENS, "temperature": 0, **fields}

    def ask(_: int) -> None:
        status, answer = proxy.call("POST", "/v1/chat/completions", body)
        if status != 200 or answer["usage"]["completion_tokens"] != TOKENS:
            raise RuntimeError(f"an answer of {TOKENS} tokens failed: {status} {answer}")

    begin = time.monotonic()
    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(ask, range(streams)))
    return (time.monotonic() - begin) * 1000 / TOKENS
