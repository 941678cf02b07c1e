"""Counts of what has happened since the start, cheap enough to be always on.

Nothing here depends on Prometheus; `prometheus` writes the counts in its format on request.
"""

from __future__ import annotations

import copy
import threading
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from mlxproxy.controller.state import Event, Exited, Loaded, SlotSnapshot, SlotState, Snapshot
from mlxproxy.relay.statistics import AnswerStats

FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)  # seconds
SPEED = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 50.0, 75.0, 100.0, 150.0, 250.0, 500.0)  # tokens/s
LOAD = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)  # seconds


class Histogram:
    """The number of observations up to each bound (and above the one before), and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last counts those above all bounds
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


def _histograms(bounds: Sequence[float]) -> Callable[[], dict[str, Histogram]]:
    """Return a factory for histograms by model, each made when its first value is added."""
    return lambda: defaultdict(partial(Histogram, bounds))


@dataclass
class Counts:
    """All figures since the start, each by the id of a model on disk, except the requests.

    Attributes:
        requests: by the route's pattern and the status; there are few of either.
        first_token: seconds from a request to its first token, waiting included.
        speed: tokens per second of each answer.
        loads: seconds from a backend's start to its first answer.
        swaps: seconds in which a slot answered nothing because this model replaced another.
    """

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    tokens_in: Counter[str] = field(default_factory=Counter)
    cached_tokens: Counter[str] = field(default_factory=Counter)
    tokens_out: Counter[str] = field(default_factory=Counter)
    first_token: dict[str, Histogram] = field(default_factory=_histograms(FIRST_TOKEN))
    speed: dict[str, Histogram] = field(default_factory=_histograms(SPEED))
    loads: dict[str, Histogram] = field(default_factory=_histograms(LOAD))
    swaps: dict[str, Histogram] = field(default_factory=_histograms(LOAD))
    deaths: Counter[str] = field(default_factory=Counter)


@dataclass
class _Place:
    """One slot, updated as its state changes.

    Attributes:
        left_ready: when the swap under way began, in monotonic seconds.
    """

    state: SlotState = SlotState.EMPTY
    left_ready: float | None = None


class Metrics:
    """The counts of one proxy. May be used by many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counts()
        self._last_speed: float | None = None
        self._last_speeds: dict[str, float] = {}
        self._places: defaultdict[int, _Place] = defaultdict(_Place)

    def counts(self) -> Counts:
        """Return a copy that no longer changes."""
        with self._lock:
            return copy.deepcopy(self._counts)

    def speed(
        self, under_way: Iterable[AnswerStats], model: str | None = None
    ) -> dict[str, float | None]:
        """Return tokens per second: of all answers in flight together, and of the last full answer.

        Args:
            under_way: the figures of the answers in flight.
            model: the id of the model whose answers count; None: all models.
        """
        with self._lock:
            last = self._last_speed if model is None else self._last_speeds.get(model)
        now = time.monotonic()
        rates = [
            it.tokens_out / (now - it.first_byte)
            for it in under_way
            if model in (None, it.model) and it.first_byte is not None and now > it.first_byte
        ]
        return {"now": round(sum(rates), 1) if rates else None, "last": last}

    def request(self, route: str, status: int, stats: AnswerStats | None) -> None:
        """Record that a request has ended; `stats` is given if a model was to answer it."""
        figures = stats.figures() if stats is not None else {}
        model = figures.get("model")
        with self._lock:
            counts = self._counts
            counts.requests[route, status] += 1
            if model is None:
                return
            counts.tokens_in[model] += figures["tokens_in"] or 0
            counts.cached_tokens[model] += figures["cached_tokens"] or 0
            counts.tokens_out[model] += figures["tokens_out"]
            if (seconds := figures["first_token"]) is not None:
                counts.first_token[model].add(seconds)
            if (speed := figures["tokens_per_second"]) is not None:
                counts.speed[model].add(speed)
                self._last_speed = self._last_speeds[model] = speed

    def event(self, event: Event) -> None:
        """Take one of the controller's events, in their order; never wait."""
        with self._lock:
            if isinstance(event, Loaded):
                self._counts.loads[event.spec.model_id].add(event.seconds)
                self._last_speed = None
                self._last_speeds.pop(event.spec.model_id, None)
            elif isinstance(event, Exited):
                self._counts.deaths[event.spec.model_id] += 1
            elif isinstance(event, Snapshot):
                for slot in event.slots:
                    self._enter(slot)

    def _enter(self, slot: SlotSnapshot) -> None:
        place, state = self._places[slot.id], slot.state
        before, place.state = place.state, state
        if state is SlotState.EMPTY or (state is SlotState.READY and before is SlotState.DRAINING):
            place.left_ready = None  # an unload, a failure, or a swap that was canceled
        elif before is SlotState.READY and state in (SlotState.DRAINING, SlotState.STOPPING):
            place.left_ready = time.monotonic()
        elif state is SlotState.READY and place.left_ready is not None and slot.spec is not None:
            self._counts.swaps[slot.spec.model_id].add(time.monotonic() - place.left_ready)
            place.left_ready = None
