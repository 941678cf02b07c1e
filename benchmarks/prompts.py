"""A long conversation that goes on after a swap: what was read of it need not be read again.

The demo model reads a prompt once. Then, in each round, a second question is asked while the prompt
is in memory, and another one after the model was swapped for another and back. As all questions
begin differently, about as much of either is left to read.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from typing import Any, ClassVar

from benchmarks.contestants import Proxy
from benchmarks.figures import Figure, Goal
from benchmarks.part import Place
from benchmarks.sheet import Sheet, spread
from mlxproxy.demo import provide

LENGTHS = (1000, 4000)  # tokens
SENTENCE = "{}: the quick brown fox jumps over the lazy dog.\n"
SENTENCE_TOKENS = 19
OTHER = "bench/alpha"
QUESTIONS = (  # two for each round, with different beginnings
    "Which animal is quick?",
    "Name the lazy animal.",
    "What does the fox do?",
    "Is the dog very lazy?",
    "How brown is the fox?",
    "Do foxes jump so high?",
)
ROUNDS = len(QUESTIONS) // 2
NOTE = """\
In the long conversation, "in memory" and "on disk" are about another question after the same long
beginning, which has been read once: before a swap, and after a swap to another model and back."""


@dataclass
class Prompts:
    """Seconds to the first token, by the length of the prompt in tokens."""

    cold: dict[int, list[float]] = field(default_factory=dict)
    memory: dict[int, list[float]] = field(default_factory=dict)
    disk: dict[int, list[float]] = field(default_factory=dict)

    day: str = field(default_factory=lambda: date.today().isoformat())

    NAME: ClassVar = "prompts"
    ALWAYS: ClassVar = False  # on a CPU, it takes minutes
    NOTE: ClassVar = NOTE

    @classmethod
    def measure(cls, place: Place, quick: bool) -> Prompts:
        """Measure everything; nothing if there is no demo model."""
        measured = cls()
        try:
            provide.ensure(place.demo)
        except provide.DemoUnavailable as error:
            place.say(str(error))
            return measured
        roots = f"{place.models}:{place.demo}"
        with Proxy(place.folder, place.models, MODELS_ROOT=roots, MAX_TOKENS=8).running() as proxy:
            for tokens in LENGTHS[:1] if quick else LENGTHS:
                place.say(f"a conversation of {tokens} tokens, before and after a swap")
                _converse(proxy, tokens, 1 if quick else ROUNDS, measured)
        return measured

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Prompts:
        """Return what `dataclasses.asdict` and JSON have converted."""
        figures = ("cold", "memory", "disk")
        return cls(
            *({int(tokens): it for tokens, it in stored[name].items()} for name in figures),
            stored["day"],
        )

    def figure(self, name: str, tokens: int) -> Figure:
        return Figure(getattr(self, name).get(tokens, []))

    def goals(self) -> Iterator[Goal]:
        """Yield the goals."""
        for tokens in self.disk:
            ratio = self.figure("disk", tokens).ratio(self.figure("memory", tokens))
            yield Goal(f"first token after a swap, {tokens} tokens", ratio, 1.5, "x in memory")

    def sheets(self) -> Iterator[Sheet]:
        """Yield the table."""
        table = Sheet(
            f"First token of the demo model in a long conversation, s ({self.day})",
            ("tokens", "read anew", "in memory", "on disk, after a swap and back", "x in memory"),
        )
        for tokens in self.disk:
            cold, memory, disk = (self.figure(it, tokens) for it in ("cold", "memory", "disk"))
            spreads = (spread(figure, 2) for figure in (cold, memory, disk))
            table.add(str(tokens), *spreads, f"{disk.ratio(memory):.2f}")
        yield table


def _converse(proxy: Proxy, tokens: int, rounds: int, measured: Prompts) -> None:
    lines = [SENTENCE.format(f"{tokens}.{line}") for line in range(tokens // SENTENCE_TOKENS)]
    messages = [{"role": "user", "content": "".join(lines)}]
    answered = {"role": "assistant", "content": "Yes."}
    questions = iter(QUESTIONS)

    def asked() -> float:
        question = {"role": "user", "content": next(questions)}
        return _first_token(proxy, [*messages, answered, question])

    proxy.load(provide.NAME)
    measured.cold[tokens] = [_first_token(proxy, messages)]
    measured.memory[tokens], measured.disk[tokens] = [], []
    for _ in range(rounds):
        measured.memory[tokens].append(asked())
        proxy.load(OTHER)
        proxy.load(provide.NAME)
        measured.disk[tokens].append(asked())


def _first_token(proxy: Proxy, messages: list[dict[str, str]]) -> float:
    """Return the seconds from the request to its first token; read the answer to its end."""
    body: dict[str, Any] = {"messages": messages, "stream": True, "temperature": 0}
    begin = time.monotonic()
    spent = None
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=600)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        response = connection.getresponse()
        while line := response.readline():
            if spent is None and line.startswith(b"data: {") and b'"content"' in line:
                spent = time.monotonic() - begin
    if spent is None:
        raise RuntimeError("the demo model gave no token")
    return spent
