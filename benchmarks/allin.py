"""The price of answers with that of their requests in it, which the steady state does not show.

The processor time counts from before the first connection until after the last one has ended.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from multiprocessing import get_context
from typing import Any, ClassVar

from benchmarks import contestants, load, wire
from benchmarks.figures import Figure, Goal
from benchmarks.load import RECV_BYTES, Work
from benchmarks.part import Place
from benchmarks.processes import cpu_seconds
from benchmarks.sheet import Sheet, spread

CLIENTS = 8  # of whole answers, each asking again as soon as it is answered
ENDED_SECONDS = 0.05  # in which a contestant closes what its clients have closed
# The same pace as in the steady state, see `rounds.WORKS`; each with the batches of a round.
STREAMED = {
    f"{streams} x {events}": (Work(streams=streams, events=events, interval=interval), batches)
    for streams, events, interval, batches in (
        (32, 20, 10, 4),
        (32, 60, 10, 2),
        (32, 100, 10, 2),
        (256, 60, 80, 1),
    )
}
WHOLE = {f"whole, {tokens} tokens": tokens for tokens in (20, 60, 100)}
ANSWERS = 400
MAIN, MANY, SHORT = "32 x 100", "256 x 60", "whole, 20 tokens"
ROUNDS = 3
NOTE = f"""\
With its request in it, a stream's price is divided by its events ("32 x 100": 32 at once, of 100
events each). Whole answers come all at once from the backend; {CLIENTS} clients ask for one after
another. "go" is the reverse proxy of Go's standard library."""


@dataclass(frozen=True)
class Price:
    """The price of some answers.

    Attributes:
        cpu: microseconds of processor time for each answer.
        rate: answers per second.
    """

    cpu: float
    rate: float


@dataclass
class AllIn:
    """The prices by workload and contestant, one from each round."""

    prices: dict[str, dict[str, list[Price]]] = field(default_factory=dict)
    day: str = field(default_factory=lambda: date.today().isoformat())

    NAME: ClassVar = "allin"
    ALWAYS: ClassVar = True
    NOTE: ClassVar = NOTE

    @classmethod
    def measure(cls, place: Place, quick: bool) -> AllIn:
        """Measure everything."""
        measured = cls({work: {} for work in (*STREAMED, *WHOLE)})
        with (
            contestants.all_of_them(place.folder, place.models, 0.0, place.say, go=True) as them,
            ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        ):
            them = them[1:]  # a direct connection has no price
            for work in (MAIN, SHORT) if quick else measured.prices:
                place.say(f"all in: {work}")
                for number in range(1 if quick else ROUNDS):
                    first = number % len(them)
                    for it in (*them[first:], *them[:first]):
                        if work in STREAMED:
                            asked = (streamed, it.port, it.pids, *STREAMED[work])
                        else:
                            asked = (whole, it.port, it.pids, WHOLE[work], ANSWERS)
                        price = pool.submit(*asked).result()
                        measured.prices[work].setdefault(it.name, []).append(price)
        return measured

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> AllIn:
        """Return what `dataclasses.asdict` and JSON have converted."""
        prices = {
            work: {name: [Price(**one) for one in some] for name, some in by_name.items()}
            for work, by_name in stored["prices"].items()
        }
        return cls(prices, stored["day"])

    def cpu(self, work: str, name: str) -> Figure:
        """Return the microseconds of an event, or of a whole answer."""
        events = STREAMED[work][0].events if work in STREAMED else 1
        return Figure([it.cpu / events for it in self.prices.get(work, {}).get(name, [])])

    def rate(self, work: str, name: str) -> Figure:
        """Return answers per second."""
        return Figure([it.rate for it in self.prices.get(work, {}).get(name, [])])

    def goals(self) -> Iterator[Goal]:
        """Yield the goals."""

        def ratio(work: str, name: str) -> float:
            return self.cpu(work, "mlxproxy").ratio(self.cpu(work, name))

        yield Goal(f"all in, {MAIN}: processor time", ratio(MAIN, "nginx"), 1.9, "x nginx")
        yield Goal(f"all in, {MAIN}: processor time", ratio(MAIN, "go"), 1.0, "x Go")
        yield Goal(f"all in, {MANY}: processor time", ratio(MANY, "nginx"), 2.2, "x nginx")
        yield Goal(f"{SHORT}: processor time", self.cpu(SHORT, "mlxproxy").median, 450, "µs")

    def sheets(self) -> Iterator[Sheet]:
        """Yield the tables."""
        names = list(self.prices.get(SHORT, {}))
        table = Sheet(
            f"Processor time with that of the requests in it, µs ({self.day})", ("", *names)
        )
        for work in self.prices:
            table.add(work, *(spread(self.cpu(work, name), 0) for name in names))
        yield table
        table = Sheet(f"Whole answers per second, {CLIENTS} clients ({self.day})", ("", *names))
        for work in WHOLE:
            table.add(work, *(spread(self.rate(work, name), 0) for name in names))
        yield table


def streamed(port: int, pids: Sequence[int], work: Work, batches: int) -> Price:
    """Return the price of streams, in batches that start at the same time.

    Raises:
        RuntimeError: a stream was not whole.
    """
    began, used = time.monotonic(), cpu_seconds(pids)
    for _ in range(batches):
        for number, pieces in enumerate(load.streams(port, work)):
            if not wire.answer(pieces).is_whole(number, work.events):
                raise RuntimeError("a stream is not whole")
    return _price(pids, began, used, batches * work.streams)


def whole(port: int, pids: Sequence[int], tokens: int, answers: int) -> Price:
    """Return the price of whole answers whose tokens are there at once, at saturation.

    Raises:
        RuntimeError: an answer was missing or incomplete.
    """
    request = wire.request(port, {"events": tokens, "interval": 0}, stream=False)
    began, used = time.monotonic(), cpu_seconds(pids)
    asked = 0
    with selectors.DefaultSelector() as selector:

        def ask() -> None:
            nonlocal asked
            asked += 1
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(request)
            selector.register(connection, selectors.EVENT_READ, bytearray())

        for _ in range(min(CLIENTS, answers)):
            ask()
        while selector.get_map():
            for key, _ in selector.select():
                connection, raw = key.fileobj, key.data
                assert isinstance(connection, socket.socket)
                data = connection.recv(RECV_BYTES)
                raw += data
                if not data:
                    raise RuntimeError(f"no whole answer: {bytes(raw[:300])!r}")
                if wire.is_answered(bytes(raw)):
                    selector.unregister(connection)
                    connection.close()
                    if asked < answers:
                        ask()
    return _price(pids, began, used, answers)


def _price(pids: Sequence[int], began: float, used: float, answers: int) -> Price:
    seconds = time.monotonic() - began
    time.sleep(ENDED_SECONDS)
    return Price((cpu_seconds(pids) - used) / answers * 1e6, answers / seconds)
