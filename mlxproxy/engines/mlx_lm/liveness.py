"""Tell a long silence from a hang, using what the backend's own process reports.

During a tool call of ten minutes, while a long prompt is read, or on a slow machine, nothing
reaches the client, but the backend's steps go on. A generation thread that hangs makes no step; a
process that hangs as a whole no longer even reports that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

SILENT_SECONDS: Final = 20.0
# However short the stall limit: a beat comes each second, and later on a busy machine.
MISSED_BEATS_SECONDS: Final = 3.0
"""No beat for this long while a request waits: the process stands still as a whole. Beats come
every second; a machine that pages heavily delays them by some."""
STUCK_SECONDS: Final = 10.0
"""No step, no processor time and no page from the disk for this long, where a step needs them."""
STUCK_BESIDE_GPU_SECONDS: Final = 30.0
"""The same between two steps on a GPU: it may be the GPU that is waited for."""
IDLE_SHARE: Final = 0.05
"""A processor's share below which a process does not compute: its watcher alone needs less."""


@dataclass(frozen=True)
class Beat:
    """A report of the backend on its generation thread (see `inside/report.py`)."""

    steps: int
    doing: str | None
    busy: bool
    cpu: float
    faults: int

    @classmethod
    def from_json(cls, value: Any) -> Beat:
        """Return the beat in a report.

        Raises:
            ValueError, KeyError, TypeError: the report contains no beat.
        """
        doing = value["doing"]
        return cls(
            steps=int(value["steps"]),
            doing=None if doing is None else str(doing),
            busy=bool(value["busy"]),
            cpu=float(value["cpu"]),
            faults=int(value["faults"]),
        )


class Liveness:
    """The beats of one backend, and what follows from them. All times are monotonic seconds.

    Args:
        computes_on_cpu: whether a step uses processor time of the backend's process; on a GPU it
            does not.
    """

    def __init__(self, computes_on_cpu: bool) -> None:
        self._on_cpu = computes_on_cpu
        self._last: Beat | None = None
        self._beat_at = 0.0
        self._step_at = 0.0  # the last sign of progress
        self._used_at = 0.0  # the last sign of progress or of processor time

    def take(self, beat: Beat, now: float) -> None:
        """Take a beat that has arrived."""
        last, since = self._last, now - self._beat_at
        # Beats pause while there are no requests.
        paused = last is None or not (last.busy and beat.busy) or since > SILENT_SECONDS
        if last is None or paused or beat.steps != last.steps:
            self._step_at = self._used_at = now
        elif beat.cpu - last.cpu > IDLE_SHARE * since or beat.faults != last.faults:
            self._used_at = now
        self._last, self._beat_at = beat, now

    def hang(
        self, now: float, waiting_since: float, stall_timeout: float, load_timeout: float
    ) -> str | None:
        """Return why the backend hangs; None while it is alive.

        Args:
            waiting_since: when the request on whose behalf this is called began to wait.
            stall_timeout: seconds that one step may take.
            load_timeout: seconds that the load of an adapter or draft model may take.
        """
        last = self._last
        silent = now - max(self._beat_at, waiting_since)
        if silent > max(MISSED_BEATS_SECONDS, min(SILENT_SECONDS, stall_timeout)):
            return f"its process has shown no sign of life for {silent:.0f} s"
        if last is None or not last.busy:
            return None
        unused = self._beat_at - self._used_at
        if unused > self._stuck_after(last.doing):
            return f"its generation thread has been stalled for {unused:.0f} s"
        limit, name = stall_timeout, "STALL_TIMEOUT"
        if last.doing == "load":
            limit, name = load_timeout, "LOAD_TIMEOUT"
        if self._beat_at - self._step_at > limit:
            return f"one step of its work took more than {limit:g} s ({name})"
        return None

    def _stuck_after(self, doing: str | None) -> float:
        """Return after how many seconds without processor time this work must be stuck."""
        if doing == "load":
            return math.inf
        if self._on_cpu or doing == "tokenize":
            return STUCK_SECONDS
        return STUCK_BESIDE_GPU_SECONDS if doing is None else math.inf
