"""The statistics of one answer, for the log and the metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class AnswerStats:
    """One answer's times (monotonic seconds) and counts, as far as they are known.

    Attributes:
        tokens_in: the length of the prompt, cached tokens included.
        cached_tokens: how many of these were in the backend's prompt cache.
        tokens_out: while an answer is in progress, the number of events that have arrived.
        prompt_read: when the last keepalive before the first token came: from then on, the backend
            generates. None if there was none.
        tokens_unmeasured: tokens that had arrived by then, at an unknown speed.
        outcome: ``pending``; then ``done``, ``client_gone``, or an error's code.
    """

    started: float = field(default_factory=time.monotonic)
    granted: float | None = None
    prompt_read: float | None = None
    tokens_unmeasured: int = 0
    first_byte: float | None = None
    ended: float | None = None
    model: str | None = None
    tokens_in: int | None = None
    cached_tokens: int | None = None
    tokens_out: int = 0
    outcome: str = "pending"

    def end(self, outcome: str) -> None:
        """Record that the answer has ended, and how."""
        self.ended = time.monotonic()
        self.outcome = outcome

    def figures(self) -> dict[str, Any]:
        """Return the counts, and the times in seconds, as far as they are known."""
        ended = self.ended or time.monotonic()
        return {
            "model": self.model,
            "outcome": self.outcome,
            "tokens_in": self.tokens_in,
            "cached_tokens": self.cached_tokens,
            "tokens_out": self.tokens_out,
            "waited": _rounded(self.granted, self.started),
            "first_token": _rounded(self.first_byte, self.started),
            "tokens_per_second": self._tokens_per_second(ended),
        }

    def _tokens_per_second(self, ended: float) -> float | None:
        # Not from the first byte on: the tokens of a tool call arrive all together, at its end.
        tokens = self.tokens_out - self.tokens_unmeasured
        if self.prompt_read is None or self.prompt_read >= ended or tokens <= 0:
            return None
        return round(tokens / (ended - self.prompt_read), 1)

    def usage(self, usage: object) -> None:
        """Use the backend's own count, which is better than counting events."""
        if not isinstance(usage, dict):
            return
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and type(details.get("cached_tokens")) is int:
            self.cached_tokens = _count(details["cached_tokens"])
        self.tokens_in = _count(usage.get("prompt_tokens")) or self.tokens_in
        self.tokens_out = _count(usage.get("completion_tokens")) or self.tokens_out


def _rounded(moment: float | None, start: float) -> float | None:
    return None if moment is None else round(moment - start, 3)


def _count(value: object) -> int:
    """Return the value if a metric, which is a float, can add it up; else 0."""
    return value if type(value) is int and 0 < value < 1 << 53 else 0
