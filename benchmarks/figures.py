"""Figures from rounds: medians, their noise, ratios, and the goals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the smallest value that `percent` of the values do not exceed; NaN for no values."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass(frozen=True)
class Figure:
    """A figure's values, one from each round."""

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
        """Return the difference from another figure, round by round."""
        return Figure([a - b for a, b in zip(self.rounds, other.rounds, strict=True)])

    def over(self, other: Figure) -> Figure:
        """Return the quotient with another figure, round by round."""
        return Figure([a / b for a, b in zip(self.rounds, other.rounds, strict=True)])

    def ratio(self, other: Figure) -> float:
        """Return this median divided by the other figure's; NaN if that is meaningless."""
        return self.median / other.median if other.median > 0 else math.nan


@dataclass(frozen=True)
class Goal:
    """A goal and the measured value: `limit` is the highest value that is allowed."""

    name: str
    value: float
    limit: float
    unit: str

    @property
    def verdict(self) -> str:
        """PASS or MISS, or `-` if it was not measured."""
        if math.isnan(self.value):
            return "-"
        return "PASS" if self.value <= self.limit else "MISS"
