"""From rounds to figures: medians, their noise, ratios, and the goals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that so many percent are not above; NaN for none."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass(frozen=True)
class Figure:
    """A figure's values, one of each round."""

    rounds: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds) if self.rounds else math.nan

    @property
    def low(self) -> float:
        return min(self.rounds, default=math.nan)

    @property
    def high(self) -> float:
        return max(self.rounds, default=math.nan)

    def above(self, other: Figure) -> Figure:
        """What it has more than another one, round by round."""
        return Figure([a - b for a, b in zip(self.rounds, other.rounds, strict=True)])

    def ratio(self, other: Figure) -> float:
        """How often the other one's median goes into this one's; NaN where that says nothing."""
        return self.median / other.median if other.median > 0 else math.nan


@dataclass(frozen=True)
class Goal:
    """What is to be reached, and what was: `limit` is the most that is allowed."""

    name: str
    value: float
    limit: float
    unit: str

    @property
    def verdict(self) -> str:
        """PASS or MISS, or `-` where it was not measured."""
        if math.isnan(self.value):
            return "-"
        return "PASS" if self.value <= self.limit else "MISS"
