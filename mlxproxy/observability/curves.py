"""Each model's speed and time to first token over the last minutes, second by second.

Nothing is sampled: an answer is added once, at its end, its tokens spread evenly over its time. So
neither a token nor a second that passes costs anything. Answers under way are not included: whoever
follows the events has their figures.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Any

from mlxproxy.relay.statistics import AnswerStats

SECONDS = 300  # that the curves show
PLACES = SECONDS + 1  # the last whole seconds, and the one that is not over
MODELS = 32  # with curves of their own; of more, those longest unused have none
SHORTEST_SECONDS = 0.05  # from the first token to the last; else they came all together


@dataclass
class _Curve:
    """One model's seconds, in a ring.

    Attributes:
        stamps: which second a place is about; the other lists are about that one.
        tokens: that came in it.
        waits: the times to first token that ended in it, added up.
        firsts: how many these are.
    """

    stamps: list[int] = field(default_factory=lambda: [-1] * PLACES)
    tokens: list[float] = field(default_factory=lambda: [0.0] * PLACES)
    waits: list[float] = field(default_factory=lambda: [0.0] * PLACES)
    firsts: list[int] = field(default_factory=lambda: [0] * PLACES)
    newest: int = -1

    def add(self, stats: AnswerStats, ended: float) -> None:
        """Add an answer."""
        if stats.first_byte is None:
            return
        if (place := self._place(math.floor(stats.first_byte))) is not None:
            self.waits[place] += stats.first_byte - stats.started
            self.firsts[place] += 1
        begin = stats.prompt_read or stats.first_byte
        if ended - begin < SHORTEST_SECONDS:
            begin = stats.granted or stats.started
        last = math.floor(ended)
        rate = stats.tokens_out / max(ended - begin, SHORTEST_SECONDS)
        for second in range(max(math.floor(begin), last - SECONDS), last + 1):
            if (place := self._place(second)) is not None:
                self.tokens[place] += rate * (min(ended, second + 1) - max(begin, second))

    def describe(self, until: int) -> dict[str, list[float | None]]:
        """Return the seconds before `until`, the oldest first."""
        speed: list[float | None] = []
        first: list[float | None] = []
        for second in range(until - SECONDS, until):
            place = second % PLACES
            is_known = self.stamps[place] == second
            count = self.firsts[place] if is_known else 0
            speed.append(round(self.tokens[place], 1) if is_known else 0.0)
            first.append(round(self.waits[place] / count, 3) if count else None)
        return {"tokens_per_second": speed, "first_token": first}

    def _place(self, second: int) -> int | None:
        """Return the place of a second, emptied if it is new; None if it is too long ago."""
        place = second % PLACES
        if self.stamps[place] > second:
            return None
        if self.stamps[place] < second:
            self.stamps[place] = second
            self.tokens[place], self.waits[place], self.firsts[place] = 0.0, 0.0, 0
        self.newest = max(self.newest, second)
        return place


class Curves:
    """The curves of one proxy's models. May be used by many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._curves: dict[str, _Curve] = {}  # by the model's id, the last used at the end

    def add(self, stats: AnswerStats) -> None:
        """Add an answer that has ended."""
        if stats.model is None or stats.ended is None:
            return
        with self._lock:
            curve = self._curves.pop(stats.model, None) or _Curve()
            self._curves[stats.model] = curve
            curve.add(stats, stats.ended)
            if len(self._curves) > MODELS:
                del self._curves[next(iter(self._curves))]

    def describe(self, now: float) -> dict[str, Any]:
        """Return the last whole seconds of each model by its id, as JSON, the oldest first.

        Args:
            now: monotonic seconds.
        """
        until = math.floor(now)
        with self._lock:
            return {
                model: curve.describe(until)
                for model, curve in self._curves.items()
                if curve.newest >= until - SECONDS
            }
