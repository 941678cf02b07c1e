"""The rounds: the contestants run every workload, in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, TypeVar

from benchmarks import load
from benchmarks.contestants import Contestant
from benchmarks.figures import Figure
from benchmarks.load import FirstBytes, Outcome, Work

T = TypeVar("T")
Say = Callable[[str], None]

# Up to 32 streams have an event every 10 ms; more of them share the same 3,200 events per second,
# which two cores can sustain with the backend and the load generator next to the contestant.
WORKS = {
    1: Work(streams=1, events=120, interval=10),
    8: Work(streams=8, events=120, interval=10),
    32: Work(streams=32, events=200, interval=10),
    128: Work(streams=128, events=60, interval=40, settle=1.0),
    256: Work(streams=256, events=32, interval=80, settle=1.2),
}
TOGETHER = Work(streams=32, events=150, interval=10, together=True)
ROUNDS = {1: 2, 8: 2, 32: 5, 128: 2, 256: 2}
MAIN = 32  # the number of streams that the goals refer to
WHOLE_TOKENS = 64
WHOLE_INTERVAL = 1  # milliseconds for each token
WHOLE_ANSWERS = 20
FIRST_BYTES_ROUNDS = 10


@dataclass
class Rounds:
    """The measurements by contestant, one value from each round."""

    streams: dict[int, dict[str, list[Outcome]]] = field(default_factory=dict)
    together: dict[str, list[Outcome]] = field(default_factory=dict)
    first_bytes: dict[str, list[FirstBytes]] = field(default_factory=dict)
    whole: dict[str, list[float]] = field(default_factory=dict)
    whole_at_once: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Rounds:
        """Return the rounds that `dataclasses.asdict` and JSON have converted."""

        def outcomes(by_name: dict[str, list[Any]]) -> dict[str, list[Outcome]]:
            return {name: [Outcome(**one) for one in some] for name, some in by_name.items()}

        return cls(
            streams={int(number): outcomes(some) for number, some in stored["streams"].items()},
            together=outcomes(stored["together"]),
            first_bytes={
                name: [FirstBytes(**one) for one in some]
                for name, some in stored["first_bytes"].items()
            },
            whole=stored["whole"],
            whole_at_once=stored["whole_at_once"],
        )

    def of(self, streams: int, name: str, attribute: str) -> Figure:
        """Return one attribute of a contestant's outcomes."""
        outcomes = self.streams.get(streams, {}).get(name, [])
        return Figure([getattr(outcome, attribute) for outcome in outcomes])

    def first_byte(self, name: str) -> Figure:
        return Figure([it.p50 for it in self.first_bytes.get(name, [])])

    def last_byte(self, name: str) -> Figure:
        return Figure([it.last for it in self.first_bytes.get(name, [])])

    def whole_answer(self, name: str) -> Figure:
        return Figure(self.whole.get(name, []))

    def whole_answer_at_once(self, name: str) -> Figure:
        return Figure(self.whole_at_once.get(name, []))


def measure(contestants: Sequence[Contestant], quick: bool, say: Say) -> Rounds:
    """Measure every workload and contestant; `quick` does one round of the least that is useful.

    The bare threads take part only in the workloads with goals: they are there for comparison.
    """
    main = [it for it in contestants if it.name != "threads"]
    measured = Rounds()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:

        def streams(work: Work) -> Callable[[Contestant], Outcome]:
            return lambda it: pool.submit(load.run, it.port, it.pids, work).result()

        def whole(interval: float) -> Callable[[Contestant], float]:
            asked = (WHOLE_ANSWERS, WHOLE_TOKENS, interval)
            return lambda it: pool.submit(load.whole_answers, it.port, *asked).result()

        for number, work in WORKS.items():
            if quick and number not in (MAIN, 256):
                continue
            say(f"{number} streams, one event every {work.interval:g} ms")
            who = contestants if number == MAIN else main
            measured.streams[number] = _turns(who, 1 if quick else ROUNDS[number], streams(work))
        say(f"{TOGETHER.streams} streams in step")
        measured.together = _turns(contestants, 1 if quick else 2, streams(TOGETHER))
        say(f"{MAIN} at once")
        measured.first_bytes = _turns(
            contestants,
            2 if quick else FIRST_BYTES_ROUNDS,
            lambda it: pool.submit(load.first_bytes, it.port, MAIN).result(),
        )
        say("whole answers")
        measured.whole = _turns(contestants, 1 if quick else 3, whole(WHOLE_INTERVAL))
        measured.whole_at_once = _turns(contestants, 1 if quick else 5, whole(0))
    return measured


def _turns(
    contestants: Sequence[Contestant], rounds: int, measure: Callable[[Contestant], T]
) -> dict[str, list[T]]:
    """Measure the given number of rounds, each begun by the next contestant."""
    results: dict[str, list[T]] = {contestant.name: [] for contestant in contestants}
    for number in range(rounds):
        first = number % len(contestants)
        for contestant in [*contestants[first:], *contestants[:first]]:
            results[contestant.name].append(measure(contestant))
    return results
