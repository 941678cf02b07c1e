"""The answers under way: who gets them, how far they are, and a way to end one."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlxproxy.relay.statistics import AnswerStats

SHOWN = ("tokens_in", "tokens_out", "waited", "first_token", "tokens_per_second")


@dataclass(frozen=True)
class UnderWay:
    """One answer under way, or a request that waits for one.

    Attributes:
        who: the request's `id`, `client`, `method` and `path`.
        stats: its figures, which change while the answer goes on.
        wanted: the id of the model that the request waits for, if that is known.
        abort: ends the answer; its client gets an error that says so.
    """

    who: Mapping[str, Any]
    stats: AnswerStats
    wanted: str | None
    abort: Callable[[], None]


class Answers:
    """The answers of one proxy that are under way. May be used by many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, UnderWay] = {}

    def begin(self, answer: UnderWay) -> str:
        """Add an answer, and return a name for it that no other answer has had."""
        name = os.urandom(8).hex()
        with self._lock:
            self._open[name] = answer
        return name

    def end(self, name: str | None) -> None:
        """Remove an answer, if it is still there."""
        with self._lock:
            self._open.pop(name or "", None)

    def abort(self, name: str) -> bool:
        """End an answer; return False if there is none of this name (it may just have ended)."""
        answer = self._under_way().get(name)
        if answer is None:
            return False
        answer.abort()
        return True

    def stats(self) -> list[AnswerStats]:
        """Return the figures of the answers under way."""
        return [answer.stats for answer in self._under_way().values()]

    def describe(self) -> list[dict[str, Any]]:
        """Return the answers under way as JSON objects, the oldest first."""
        now = time.monotonic()
        return [_told(name, answer, now) for name, answer in self._under_way().items()]

    def _under_way(self) -> dict[str, UnderWay]:
        # An answer whose head could not be sent has ended, although nothing has recorded that.
        with self._lock:
            for name in [name for name, it in self._open.items() if it.stats.ended is not None]:
                del self._open[name]
            return dict(self._open)


def _told(name: str, answer: UnderWay, now: float) -> dict[str, Any]:
    stats, figures = answer.stats, answer.stats.figures()
    waits, reads = stats.granted is None, stats.first_byte is None
    return {
        "name": name,
        **{key: answer.who[key] for key in ("id", "client", "method", "path")},
        "model": stats.model or answer.wanted,
        "phase": "waiting" if waits else "reading" if reads else "answering",
        "seconds": round(now - stats.started, 1),
        **{key: figures[key] for key in SHOWN},
    }
