"""Timing of a streamed answer, for the dialects that state it."""

from __future__ import annotations

from mlxproxy.dialects.form import Clock, Timing


class Stopwatch:
    """A stopwatch for one answer; only the first call of each method counts.

    Args:
        clock: returns seconds since any fixed moment.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started = clock()
        self._begun: float | None = None
        self._first: float | None = None

    def begun(self) -> None:
        """Note that the backend has the request."""
        if self._begun is None:
            self._begun = self._clock()

    def token(self) -> None:
        """Note that a part of the answer has arrived."""
        if self._first is None:
            self.begun()
            self._first = self._clock()

    def timing(self) -> Timing:
        """Return the time that the answer has taken so far."""
        end = self._clock()
        begun = end if self._begun is None else self._begun
        first = end if self._first is None else self._first
        return Timing(
            waited=begun - self._started,
            prompt=first - begun,
            generation=end - first,
        )
