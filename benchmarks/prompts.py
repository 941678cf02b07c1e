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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.contestants import Proxy
from benchmarks.figures import Figure
from mlxproxy.demo import provide

TOKENS = 1000
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


@dataclass
class Prompts:
    """Seconds to the first token, by the length of the prompt in tokens."""

    cold: dict[int, list[float]] = field(default_factory=dict)
    memory: dict[int, list[float]] = field(default_factory=dict)
    disk: dict[int, list[float]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, stored: dict[str, dict[str, list[float]]]) -> Prompts:
        """Return what `dataclasses.asdict` and JSON have converted."""
        return cls(
            **{
                name: {int(tokens): values for tokens, values in by_tokens.items()}
                for name, by_tokens in stored.items()
            }
        )

    def figure(self, name: str, tokens: int) -> Figure:
        return Figure(getattr(self, name).get(tokens, []))


def measure(
    folder: Path,
    models: Path,
    demo: Path,
    lengths: Sequence[int],
    rounds: int,
    say: Callable[[str], None],
) -> Prompts:
    """Measure everything.

    Args:
        folder: where files are created.
        models: a models folder with the model OTHER.
        demo: the models folder of the demo model; it is downloaded if it is missing.
        lengths: of the prompts, in tokens.
        rounds: at most ROUNDS.

    Returns:
        Nothing measured if there is no demo model.
    """
    measured = Prompts()
    try:
        provide.ensure(demo)
    except provide.DemoUnavailable as error:
        say(str(error))
        return measured
    folder.mkdir()
    with Proxy(folder, models, MODELS_ROOT=f"{models}:{demo}", MAX_TOKENS=8).running() as proxy:
        for tokens in lengths:
            say(f"a conversation of {tokens} tokens, before and after a swap")
            _converse(proxy, tokens, rounds, measured)
    return measured


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
