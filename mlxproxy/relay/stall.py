"""The stall policy: how long an answer may be silent, and what is aborted after that."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from typing import Final

from mlxproxy.controller import Lease
from mlxproxy.controller.state import Process
from mlxproxy.errors import BackendTimeout, ProxyError

INTERVAL_SECONDS: Final = 5.0
"""Silence after which a stream's client gets a comment."""
INTERVALS: Final = 4
"""How often a silence is looked at before it has lasted for the stall timeout, at least."""
SILENT_FACTOR: Final = 12
"""Stall timeouts that an answer may take which would be silent anyhow."""


class Verdict(Enum):
    """The consequence of a silence."""

    WAIT = "wait"
    PROBE = "probe"  # the backend may hang: ask it for a short answer
    ABANDON = "abandon"  # this answer ends alone
    HUNG = "hung"  # the backend hangs, and all its answers end


@dataclass(frozen=True)
class Silence:
    """The known facts about a silent answer. All times are monotonic seconds.

    Attributes:
        granted: when the request got its place.
        last_byte_at: when the last byte of this answer came.
        backend_last_byte_at: when the last byte of any answer of the backend came.
        alive: whether the backend itself reports that its work goes on; one that reports otherwise
            hangs, whatever the silences.
        unstreamed: whether nothing of the answer comes before all of it does.
        exclusive: whether the backend answers nothing else meanwhile, not even a probe.
    """

    granted: float
    last_byte_at: float
    backend_last_byte_at: float
    alive: bool
    unstreamed: bool
    exclusive: bool


def judge(silence: Silence, now: float, stall_timeout: float) -> Verdict:
    """Return the verdict on a silence at `now`.

    A backend that reports that it is alive is believed. With any other, a silent answer is aborted
    alone while the backend sends bytes of others; an answer whose silence is expected goes on while
    the backend answers anything.
    """
    silent = now - max(silence.last_byte_at, silence.granted)
    if silent < stall_timeout:
        return Verdict.WAIT
    silent_anyhow = silence.alive or (silence.unstreamed and not silence.exclusive)
    all_silent = now - max(silence.backend_last_byte_at, silence.granted)
    if not silence.alive and all_silent >= stall_timeout:
        return Verdict.PROBE if silent_anyhow else Verdict.HUNG
    if silent_anyhow and silent < SILENT_FACTOR * stall_timeout:
        return Verdict.WAIT
    return Verdict.ABANDON


class Patience:
    """The policy, applied to one answer.

    Args:
        lease: the request's lease, which has been granted.
        backend: the process that answers it.
        stall_timeout: in seconds.
        unstreamed: whether nothing of the answer comes before all of it does.

    Attributes:
        interval: seconds of silence after which :meth:`check` is to be called, each time.
        last_byte_at: when the last byte of the answer came, in monotonic seconds.
    """

    def __init__(
        self, lease: Lease, backend: Process, stall_timeout: float, unstreamed: bool
    ) -> None:
        self.interval = min(INTERVAL_SECONDS, stall_timeout / INTERVALS)
        self.last_byte_at = 0.0
        self._lease = lease
        self._backend = backend
        self._stall_timeout = stall_timeout
        self._unstreamed = unstreamed

    def check(self) -> None:
        """Return if the answer is worth waiting for.

        Raises:
            ProxyError: it has been aborted, or has been silent for too long.
        """
        lease, backend, limit = self._lease, self._backend, self._stall_timeout
        if lease.error is not None:
            raise lease.error
        alive = backend.has("heartbeat")
        if alive and (reason := backend.hang(lease.granted, limit)) is not None:
            raise self._hung(reason)
        silence = Silence(
            granted=lease.granted,
            last_byte_at=self.last_byte_at,
            backend_last_byte_at=backend.last_byte_at,
            alive=alive,
            unstreamed=self._unstreamed,
            exclusive=lease.batch.is_alone,
        )
        verdict = judge(silence, time.monotonic(), limit)
        if verdict is Verdict.PROBE:
            verdict = Verdict.WAIT if backend.answers_probe(limit) else Verdict.HUNG
        if lease.error is not None:  # meanwhile
            raise lease.error
        if verdict is Verdict.HUNG:
            raise self._hung(f"it sent nothing for {limit:g} s (STALL_TIMEOUT)")
        if verdict is Verdict.ABANDON:
            raise BackendTimeout(
                f"The backend sent nothing for this answer for {limit:g} s (STALL_TIMEOUT), though "
                "it answers others. Try again."
            )

    def _hung(self, reason: str) -> ProxyError:
        self._backend.declare_hung(reason)
        return self._lease.error or BackendTimeout(
            f"The backend is considered dead: {reason}. Try again."
        )
