"""Clients that do everything at the same time."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from itertools import count
from typing import Any

from tests.support.proxy import Proxy
from tools.soak.ledger import Json, Ledger, Seen, Shape
from tools.soak.phases import BROKEN, MODELS, PLACES, QUEUE, Phase
from tools.soak.request import Request

LOOK_LIMIT = 1.0  # seconds for /health and the listings, whatever else is happening


class Clients:
    """Random clients of one proxy, each in a thread, until they are told to end."""

    def __init__(self, phase: Phase, proxy: Proxy, ledger: Ledger, real: bool) -> None:
        self.phase = phase
        self.proxy = proxy
        self.ledger = ledger
        self.real = real
        self.over = threading.Event()
        self._numbers = count(1)
        self._threads: list[threading.Thread] = []

    def start(self, number: int, seed: int) -> None:
        """Start this many random clients, and one that only reads the status."""
        for client in range(number):
            self._thread(self._client, random.Random(f"{seed} {self.phase.name} {client}"))
        self._thread(self._look_on)

    def stop(self) -> list[threading.Thread]:
        """Wait for the answers in flight; return the threads that do not end."""
        self.over.set()
        deadline = time.monotonic() + 120
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [thread for thread in self._threads if thread.is_alive()]

    def _thread(self, target: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def _client(self, dice: random.Random) -> None:
        acts: list[tuple[float, Callable[[random.Random], None]]] = [
            (30, self.stream),
            (12, self.whole),
            (10, self.stream_left),
            (8, self.whole_left),
            (4, self.slow_reader),
            (3, self.logprobs),
            (2, self.alone),
            (4, self.load),
            (3, self.load_watched),
            (2, self.load_left),
            (2, self.load_unwaited),
            (1, self.broken),
            (0.3, self.burst),
        ]
        if self.phase.faults:
            acts += [(2, self.unload), (1, self.unload_left)]
        weights, calls = [weight for weight, _ in acts], [call for _, call in acts]
        while not self.over.is_set():
            dice.choices(calls, weights)[0](dice)
            self.over.wait(dice.choice((0, 0, 0.05, 0.5)))

    # -- the actions of a client

    def stream(self, dice: random.Random) -> None:
        self._chat(dice, "stream")

    def stream_left(self, dice: random.Random) -> None:
        self._chat(dice, "stream, left", tokens=1000, leave=dice.uniform(0, 1.5))

    def slow_reader(self, dice: random.Random) -> None:
        self._chat(dice, "stream, read slowly", tokens=900, slow=dice.uniform(1, 8))

    def alone(self, dice: random.Random) -> None:
        self._chat(dice, "stream, alone", seed=dice.randrange(100), temperature=0.5)

    def whole(self, dice: random.Random) -> None:
        self._chat(dice, "whole", stream=False)

    def whole_left(self, dice: random.Random) -> None:
        self._chat(dice, "whole, left", stream=False, tokens=1000, leave=dice.uniform(0, 1.5))

    def logprobs(self, dice: random.Random) -> None:
        self._chat(dice, "whole, with logprobs", stream=False, logprobs=True)

    def load(self, dice: random.Random) -> None:
        self._load(dice, "load")

    def load_watched(self, dice: random.Random) -> None:
        self._load(dice, "load, watched", shape="progress", stream=True)

    def load_left(self, dice: random.Random) -> None:
        shape: Shape = dice.choice(("plain", "progress"))
        stream = shape == "progress"
        self._load(dice, "load, left", shape, leave=dice.uniform(0, 0.5), stream=stream)

    def load_unwaited(self, dice: random.Random) -> None:
        self._load(dice, "load, not waited for", wait=False)

    def broken(self, dice: random.Random) -> None:
        self._ask("load of a broken one", "/v1/models/load", {"model_id": f"tiny/{BROKEN}"})

    def unload(self, dice: random.Random) -> None:
        self._ask("unload", "/v1/models/unload", {})

    def unload_left(self, dice: random.Random) -> None:
        self._ask("unload, left", "/v1/models/unload", {}, leave=dice.uniform(0, 0.2))

    def burst(self, dice: random.Random) -> None:
        """Send more requests at the same time than the proxy accepts."""
        asked = []
        for _ in range(PLACES + QUEUE + 6):
            body, seen = self._chat_request(dice, "burst", stream=dice.random() < 0.7, tokens=5)
            asked.append(Request(self.proxy.port, seen).send("POST", "/v1/chat/completions", body))
        for request in asked:
            self._enter(request.read())

    def at_the_stop(self, tokens: int) -> Request:
        """Send a request whose stream is in flight when the proxy is told to stop."""
        body, seen = self._chat_request(random.Random(0), "stream, at the stop", True, tokens)
        seen.model = None
        return Request(self.proxy.port, seen).send(
            "POST", "/v1/chat/completions", {**body, "model": f"tiny/{MODELS[0]}"}
        )

    # -- requests

    def _chat(
        self,
        dice: random.Random,
        row: str,
        *,
        stream: bool = True,
        tokens: int = 0,
        leave: float | None = None,
        slow: float = 0.0,
        **fields: Any,
    ) -> None:
        body, seen = self._chat_request(dice, row, stream, tokens, **fields)
        request = Request(self.proxy.port, seen, leave, slow, abrupt=dice.random() < 0.3)
        self._enter(request.send("POST", "/v1/chat/completions", body).read())

    def _chat_request(
        self, dice: random.Random, row: str, stream: bool, tokens: int, **fields: Any
    ) -> tuple[Json, Seen]:
        tokens = min(tokens or dice.randint(1, 80), 900 if self.real else 1000)
        # Most requests want the same model: with a swap for each one, nothing would be answered.
        (name,) = dice.choices((*MODELS, None), (6, 1, 1, 1, 1))
        seen = self._seen(row, "stream" if stream else "whole", tokens=tokens)
        if self.phase.selection == "requested":
            seen.model = name
        body = {
            "model": "no such model" if name is None else f"tiny/{name}",
            "messages": [{"role": "user", "content": seen.request_id}],
            "max_tokens": tokens,
            "stream": stream,
            **fields,
        }
        if stream:
            body["stream_options"] = {"include_usage": True}
        return body, seen

    def _load(
        self,
        dice: random.Random,
        row: str,
        shape: Shape = "plain",
        leave: float | None = None,
        **fields: Any,
    ) -> None:
        name = dice.choice((MODELS[0], *MODELS))
        thinking = not self.real and dice.random() < 0.2
        body = {"model_id": f"tiny/{name}", "enable_thinking": thinking, **fields}
        self._ask(row, "/v1/models/load", body, shape, leave)

    def _ask(
        self,
        row: str,
        path: str,
        body: Json,
        shape: Shape = "plain",
        leave: float | None = None,
    ) -> None:
        request = Request(self.proxy.port, self._seen(row, shape), leave)
        self._enter(request.send("POST", path, body).read())

    def _look_on(self) -> None:
        while not self.over.wait(0.1):
            for path in ("/health", "/v1/models", "/v1/models/loaded"):
                seen = self._seen(f"look at {path}", limit=LOOK_LIMIT)
                self._enter(Request(self.proxy.port, seen).send("GET", path).read())

    def _seen(self, row: str, shape: Shape = "plain", **facts: Any) -> Seen:
        return Seen(row, f"{self.phase.name}-{next(self._numbers)}", shape, **facts)

    def _enter(self, seen: Seen) -> None:
        self.enter(seen, self.phase.codes)

    def enter(self, seen: Seen, codes: frozenset[str]) -> None:
        """Let the ledger judge an answer; keep the bytes of a wrong one."""
        if self.ledger.enter(self.phase.name, seen, codes).outcome == "wrong":
            (self.proxy.instance.parent / f"{seen.request_id}.body").write_bytes(seen.body)


def warm_up(clients: Clients) -> None:
    """Cause everything that happens only once: run every thread, get every kind of answer."""
    dice = random.Random(0)
    clients.load(dice)
    for _ in range(3):
        clients.burst(dice)
    clients.stream(dice)
    clients.whole(dice)
    clients.load_watched(dice)
