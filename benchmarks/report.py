"""The measurements of one run, compared with the goals."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import Any

from benchmarks.allin import AllIn
from benchmarks.figures import Figure, Goal
from benchmarks.lifecycle import Lifecycle
from benchmarks.page import Page
from benchmarks.part import Part, to_json
from benchmarks.prompts import Prompts
from benchmarks.rounds import MAIN, Rounds
from benchmarks.several import Several
from benchmarks.swaps import Swaps
from mlxproxy import __version__

GO = 1.7  # processor time of Go's httputil.ReverseProxy at this work, x nginx (measured once)
MANY = 256
PARTS: Mapping[str, type[Part]] = {
    part.NAME: part for part in (AllIn, Several, Swaps, Page, Prompts)
}


def machine() -> str:
    """Return a description of the machine."""
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}"
    )


@dataclass(frozen=True)
class Report:
    """The figures of one run.

    Attributes:
        contestants: their names in order; nginx may be missing.
        parts: those that have been measured, by their names.
        version: the version of mlxproxy.
        machine: the machine of the measurement.
        day: the date, as in ISO 8601.
    """

    contestants: Sequence[str]
    rounds: Rounds
    lifecycle: Lifecycle
    parts: Mapping[str, Part] = field(default_factory=dict)
    version: str = __version__
    machine: str = field(default_factory=machine)
    day: str = field(default_factory=lambda: date.today().isoformat())

    @property
    def origin(self) -> str:
        """The origin of the figures, for the head of a table or the foot of a picture."""
        return f"mlxproxy {self.version}, {self.machine}, {self.day}"

    def added(self, name: str, attribute: str, streams: int = MAIN) -> Figure:
        """Return the microseconds by which an event is later than by a direct connection."""
        direct = self.rounds.of(streams, "direct", attribute)
        return self.rounds.of(streams, name, attribute).above(direct)

    def whole_added(self, name: str) -> Figure:
        """Return the milliseconds by which a whole answer is later than by a direct connection."""
        return self.rounds.whole_answer(name).above(self.rounds.whole_answer("direct"))

    def whole_at_once_added(self, name: str) -> Figure:
        """Return the same for an answer whose tokens all arrive together, which no model does."""
        direct = self.rounds.whole_answer_at_once("direct")
        return self.rounds.whole_answer_at_once(name).above(direct)

    def goals(self) -> list[Goal]:
        """Return the goals, each with the measured value; NaN if nginx is not there to compare."""
        rounds, life = self.rounds, self.lifecycle

        def against_nginx(attribute: str) -> float:
            ours, nginx = (rounds.of(MAIN, it, attribute) for it in ("mlxproxy", "nginx"))
            return ours.ratio(nginx)

        cpu = against_nginx("cpu_per_event")
        first = rounds.first_byte("mlxproxy").ratio(rounds.first_byte("nginx"))
        broken = sum(
            outcome.broken
            for works in (*rounds.streams.values(), rounds.together)
            for outcome in works["mlxproxy"]
        )
        resident = rounds.of(MANY, "mlxproxy", "resident").high
        return [
            Goal("processor time per event", cpu, 2.0, "x nginx"),
            Goal(f"the same, at most 1.2 x Go's ({GO} x nginx)", cpu, 1.2 * GO, "x nginx"),
            Goal("event p50", against_nginx("p50"), 1.2, "x nginx"),
            Goal("event p99", against_nginx("p99"), 1.5, "x nginx"),
            Goal(f"first byte, {MAIN} starting at once", first, 3.0, "x nginx"),
            Goal("streams not whole, of all", broken, 0, ""),
            Goal(f"memory with {MANY} streams", resident, 90, "MB"),
            Goal("added to a whole answer", self.whole_added("mlxproxy").median, 1.5, "ms"),
            Goal("start, to the first answer", life.figure("start_seconds").median, 0.5, "s"),
            Goal("memory when idle", life.figure("idle_megabytes").high, 80, "MB"),
            Goal(
                f"first scan of {life.library} models", life.figure("scan_seconds").median, 2, "s"
            ),
            Goal("GET /v1/models of them", life.figure("listing_milliseconds").median, 50, "ms"),
            *(goal for part in self.parts.values() for goal in part.goals()),
        ]

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Report:
        """Return the report that `to_json` stored."""
        return cls(
            stored["contestants"],
            Rounds.from_json(stored["rounds"]),
            Lifecycle(**stored["lifecycle"]),
            {name: PARTS[name].from_json(it) for name, it in stored["parts"].items()},
            stored["mlxproxy"],
            stored["machine"],
            stored["day"],
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything, including the values of each round."""
        return {
            "mlxproxy": self.version,
            "machine": self.machine,
            "day": self.day,
            "contestants": list(self.contestants),
            "rounds": asdict(self.rounds),
            "lifecycle": asdict(self.lifecycle),
            "parts": {name: to_json(part) for name, part in self.parts.items()},
            "goals": [
                {
                    **asdict(goal),
                    "value": None if math.isnan(goal.value) else goal.value,
                    "verdict": goal.verdict,
                }
                for goal in self.goals()
            ],
        }
