"""Several models: clients that alternate between two of them, and what many loaded ones cost."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import load, wire
from benchmarks.contestants import MODEL, Proxy, standin_in
from benchmarks.figures import Figure, Goal
from benchmarks.load import RECV_BYTES, Work
from benchmarks.part import Place
from benchmarks.sheet import Sheet, spread

# Two clients, each with a model of its own, of which one fits: each sends its next request as soon
# as it has its answer. A load takes at least that long, as it does for a small model.
ALTERNATING = (MODEL, "bench/beta")
LOAD_SECONDS = 0.5
SECONDS = 8.0
ANSWER = {"events": 10, "interval": 10, "from_now": True}
RULES = {"turns": "mlxproxy", "first come": "benchmarks.first_come"}  # and the module that has it
ALTERNATION_ROUNDS = 2

RESIDENTS = (1, 2, 4)
NAMES = (MODEL, "bench/beta", "bench/gamma", "bench/delta")
WORK = Work(streams=12, events=150, interval=10, model=MODEL)
REQUESTS, TOKENS = 200, 8  # of the short answers whose time is measured
RESIDENT_ROUNDS = 8

NOTE = f"""\
The two clients each want a model of their own, of which one fits into memory, and send their next
request as soon as they have their answer. A load takes {LOAD_SECONDS} s and the start of a process.
"First come" is the same program with turns of no length: it swaps for each request that names the
other model, in order of arrival. What several loaded models cost is measured with requests to one
of them, the proxies side by side: {WORK.streams} streams through each, then short requests through
each in turn. "x one" is the median of the rounds' own quotients."""


@dataclass(frozen=True)
class Alternation:
    """The outcome of one round with alternating clients.

    Attributes:
        swaps: starts of a backend.
        longest_wait: seconds from a request to the first byte of its answer, at most.
    """

    answers: int
    swaps: int
    longest_wait: float

    @property
    def swaps_per_answer(self) -> float:
        return self.swaps / self.answers


@dataclass(frozen=True)
class Resident:
    """The cost of requests to one of the models that are loaded.

    Attributes:
        cpu_per_event: microseconds of the proxy's processor time.
        event: microseconds from the backend's sending of an event to its arrival, p50.
        request: milliseconds of a short request that is not streamed, p50.
    """

    cpu_per_event: float
    event: float
    request: float


@dataclass
class Several:
    """One value from each round, by the rule, and by the number of loaded models."""

    alternation: dict[str, list[Alternation]] = field(default_factory=dict)
    residents: dict[int, list[Resident]] = field(default_factory=dict)
    day: str = field(default_factory=lambda: date.today().isoformat())

    NAME: ClassVar = "several"
    ALWAYS: ClassVar = True
    NOTE: ClassVar = NOTE

    @classmethod
    def measure(cls, place: Place, quick: bool) -> Several:
        """Measure everything."""
        folder, models = place.folder, place.models
        measured = cls()
        place.say("two clients that alternate between two models")
        for number in range(1 if quick else ALTERNATION_ROUNDS):
            for rule, program in list(RULES.items())[:: -1 if number % 2 else 1]:
                own = _made(folder / f"{program}{number}")
                outcome = _alternate(own, models, program, 2.0 if quick else SECONDS)
                measured.alternation.setdefault(rule, []).append(outcome)
        place.say(f"{', '.join(map(str, RESIDENTS))} loaded models")
        rounds = 1 if quick else RESIDENT_ROUNDS
        measured.residents = _residents(_made(folder / "residents"), models, rounds)
        return measured

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Several:
        """Return what `dataclasses.asdict` and JSON have converted."""
        return cls(
            {
                rule: [Alternation(**one) for one in some]
                for rule, some in stored["alternation"].items()
            },
            {
                int(number): [Resident(**one) for one in some]
                for number, some in stored["residents"].items()
            },
            stored["day"],
        )

    def alternating(self, rule: str, attribute: str) -> Figure:
        return Figure([getattr(one, attribute) for one in self.alternation.get(rule, [])])

    def resident(self, number: int, attribute: str) -> Figure:
        return Figure([getattr(one, attribute) for one in self.residents.get(number, [])])

    def against_one(self, number: int, attribute: str) -> Figure:
        """Return a cost divided by the cost with one model, round by round."""
        return self.resident(number, attribute).over(self.resident(1, attribute))

    def goals(self) -> Iterator[Goal]:
        """Yield the goals."""
        swaps, strictly = (self.alternating(rule, "swaps_per_answer") for rule in RULES)
        yield Goal("swaps per answer, by turns", swaps.ratio(strictly), 0.5, "x first come")
        for what, attribute in (
            ("processor time, several loaded", "cpu_per_event"),
            ("a short request, several loaded", "request"),
        ):
            most = max(self.against_one(it, attribute).median for it in RESIDENTS[1:])
            yield Goal(what, most, 1.05, "x one")

    def sheets(self) -> Iterator[Sheet]:
        """Yield the tables."""
        table = Sheet(
            f"Two clients with two models that do not fit together, {SECONDS:g} s ({self.day})",
            ("", *RULES),
        )
        for head, attribute, digits in (
            ("answers", "answers", 0),
            ("swaps", "swaps", 0),
            ("swaps per answer", "swaps_per_answer", 2),
            ("longest wait for an answer, s", "longest_wait", 2),
        ):
            figures = (self.alternating(rule, attribute) for rule in RULES)
            table.add(head, *(spread(figure, digits) for figure in figures))
        yield table
        costs = ("CPU per\nevent, µs", "x one", "event\np50, µs", "short request\np50, ms", "x one")
        table = Sheet(
            f"Requests to a loaded model, by the number of loaded models ({self.day})",
            ("models", *costs),
        )
        for number in RESIDENTS:
            cpu, request = (
                self.against_one(number, it).median for it in ("cpu_per_event", "request")
            )
            table.add(
                str(number),
                spread(self.resident(number, "cpu_per_event"), 1),
                "" if number == 1 else f"{cpu:.2f}",
                spread(self.resident(number, "event"), 0),
                spread(self.resident(number, "request"), 2),
                "" if number == 1 else f"{request:.2f}",
            )
        yield table


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


# -- two clients that alternate


def _alternate(folder: Path, models: Path, program: str, seconds: float) -> Alternation:
    starts = folder / "starts"
    server = standin_in(folder, f'echo >> "{starts}"; sleep {LOAD_SECONDS}')
    with Proxy(folder, models, server, program=program).running() as proxy:
        proxy.load(ALTERNATING[0])
        before = _lines(starts)
        waits: list[float] = []
        until = time.monotonic() + seconds
        clients = [
            threading.Thread(target=_client, args=(proxy.port, model, until, waits))
            for model in ALTERNATING
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        return Alternation(len(waits), _lines(starts) - before, max(waits))


def _lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def _client(port: int, model: str, until: float, waits: list[float]) -> None:
    """Request one answer after another; add how long each was waited for."""
    request = wire.request(port, ANSWER, stream=True, model=model)
    while (begin := time.monotonic()) < until:
        wait = None
        raw = b""
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(request)
            while data := connection.recv(RECV_BYTES):
                raw += data
                if wait is None and b"data: {" in raw:
                    wait = time.monotonic() - begin
        if wait is None or b"data: [DONE]" not in raw:
            raise RuntimeError(f"no answer from {model}: {raw[:300]!r}")
        waits.append(wait)


# -- the cost of having several loaded


def _residents(folder: Path, models: Path, rounds: int) -> dict[int, list[Resident]]:
    """Measure all of them at the same time, so that whatever else happens concerns them all."""
    with (
        contextlib.ExitStack() as stack,
        ProcessPoolExecutor(len(RESIDENTS), mp_context=get_context("spawn")) as pool,
    ):
        them = [stack.enter_context(_with(number, folder, models)) for number in RESIDENTS]
        ports = [proxy.port for proxy in them]
        pids = [(proxy.pid,) for proxy in them]
        measured: dict[int, list[Resident]] = {number: [] for number in RESIDENTS}
        for round_number in range(rounds + 1):
            streams = list(pool.map(load.run, ports, pids, [WORK] * len(RESIDENTS)))
            if broken := sum(outcome.broken for outcome in streams):
                raise RuntimeError(f"{broken} streams were not whole")
            asked = (load.whole_answers_in_turns, ports, REQUESTS, TOKENS, 0, MODEL)
            requests = pool.submit(*asked).result()
            for number, outcome, request in zip(RESIDENTS, streams, requests, strict=True):
                if round_number:  # in the first, the load generators start
                    cost = Resident(outcome.cpu_per_event, outcome.p50, request)
                    measured[number].append(cost)
        return measured


@contextlib.contextmanager
def _with(number: int, folder: Path, models: Path) -> Iterator[Proxy]:
    """Run a proxy with this many models; one alone is the default."""
    place = _made(folder / str(number))
    with Proxy(place, models, standin_in(place), MAX_LOADED=number).running() as proxy:
        for name in NAMES[:number]:
            proxy.load(name)
        yield proxy
