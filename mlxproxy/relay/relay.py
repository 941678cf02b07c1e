"""One request to the backend and its answer back: wait for a place, open, pump.

A stream is passed on event by event as it arrives from the socket. A whole answer is also requested
as a stream, and assembled here, so that a client that disconnects ends the generation (the backend
never notices by itself), and a hang can be detected.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Final, TypeAlias

from mlxproxy import sse
from mlxproxy.backend.connection import BackendConnection
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.controller import Lease
from mlxproxy.errors import InternalError, ProxyError
from mlxproxy.relay.open import Connect, Exchange, Request
from mlxproxy.relay.pump import HEARTBEAT, collect, pump
from mlxproxy.relay.stall import INTERVAL_SECONDS
from mlxproxy.relay.statistics import AnswerStats

Begin: TypeAlias = Callable[[], Exchange | None]
"""What follows once a place has been granted: a request is sent; or nothing, if the model was only
to be loaded."""
OPENING: Final = sse.comment()
SILENT_WAIT_SECONDS: Final = 2.0
"""How long a stream waits for its place before it commits to a status of 200."""


class Relay:
    """The relay between backends and the requests that have a lease.

    Args:
        stall_timeout: seconds without a byte from the backend, see `stall.py`.
        connect: opens the connections to backends.
    """

    def __init__(self, stall_timeout: float, connect: Connect = BackendConnection) -> None:
        self._stall_timeout = stall_timeout
        self._connect = connect

    def stream(self, lease: Lease, request: Request, stats: AnswerStats) -> Stream:
        """Return a streamed answer as soon as its status is decided: 200.

        Raises:
            ProxyError: it has another status; the lease has been released.
        """
        answer = Stream(lease, stats, lambda: self.open(lease, request, stats, streamed=True))
        answer.open()
        return answer

    def load(self, lease: Lease, stats: AnswerStats, on_loaded: Callable[[], None]) -> Stream:
        """Return a stream of comments that ends when the lease's model is loaded.

        Args:
            on_loaded: called then, before the end.

        Raises:
            ProxyError: as for :meth:`stream`.
        """

        def begin() -> None:
            _note_place(lease, stats)
            on_loaded()

        answer = Stream(lease, stats, begin)
        answer.open()
        return answer

    def whole(self, lease: Lease, request: Request, stats: AnswerStats) -> bytes:
        """Return a whole answer, as the backend itself would send it, and release the lease.

        Raises:
            ProxyError: there is none, for this reason.
        """
        (answer,) = self.series(lease, lambda spec: (request,), stats)
        return answer

    def series(
        self, lease: Lease, requests: Callable[[ModelSpec], Iterable[Request]], stats: AnswerStats
    ) -> Generator[bytes, None, None]:
        """Yield the whole answers to several requests, one after the other, in one place.

        The lease is released at the end, or when the generator is closed.

        Args:
            requests: makes the requests for the model that answers.

        Raises:
            ProxyError: there is no answer, for this reason.
        """
        outcome = InternalError.code
        exchange = None
        try:
            lease.wait()
            for request in requests(lease.spec):
                if exchange is not None:  # the last connection is the lease's to close
                    exchange.connection.close()
                exchange = self.open(lease, request, stats, streamed=False)
                while not exchange.await_head():
                    pass
                answer = collect(exchange, stats)
                outcome = "done"  # if this is the last one that is wanted
                yield answer
                outcome = InternalError.code
            outcome = "done"
        except ProxyError as error:
            outcome = _outcome(lease, error)
            raise
        finally:
            lease.release(finished=outcome == "done")
            stats.end(outcome)

    def open(self, lease: Lease, request: Request, stats: AnswerStats, streamed: bool) -> Exchange:
        """Send the request to the backend that the lease was granted on.

        Raises:
            ProxyError: the request is rejected, or cannot be sent.
        """
        _note_place(lease, stats)
        return Exchange(lease, request, streamed, self._stall_timeout, self._connect)


class Stream:
    """A streamed answer: :meth:`open` decides its status, and iteration yields its body.

    :meth:`close` must be called, even if the answer has not begun: it gives the place back.

    Args:
        begin: called once, when the place has been granted.
    """

    def __init__(self, lease: Lease, stats: AnswerStats, begin: Begin) -> None:
        self._lease = lease
        self._stats = stats
        self._begin = begin
        self._has_begun = False
        self._exchange: Exchange | None = None
        self._comment: bytes | None = None  # for a client that waits
        self._body = self._answer()

    def open(self) -> None:
        """Wait until the status is decided: the answer has begun, or the wait for it is long.

        Raises:
            ProxyError: the answer is this error. Later ones are the stream's last event.
        """
        outcome: str | None = InternalError.code
        try:
            self._comment = self._wait(SILENT_WAIT_SECONDS)
            outcome = None
        except ProxyError as error:
            outcome = _outcome(self._lease, error)
            raise
        finally:
            if outcome is not None:
                self._end(outcome)

    def __iter__(self) -> Iterator[bytes]:
        return self._body

    def close(self) -> None:
        """End the answer, whatever its progress."""
        self._body.close()
        self._end("client_gone")  # if it had not begun

    def _wait(self, patience: float) -> bytes | None:
        """Wait for one interval; return a comment for the client, or None if the head has come.

        Args:
            patience: seconds to wait for the place.
        """
        if not self._has_begun:
            if not self._lease.wait(patience):
                return sse.comment(self._lease.waiting_for())
            self._has_begun = True
            self._exchange = self._begin()
        return None if self._exchange is None or self._exchange.await_head() else HEARTBEAT

    def _answer(self) -> Generator[bytes, None, None]:
        outcome = "client_gone"
        try:
            while self._comment is not None:
                yield self._comment
                self._comment = self._wait(INTERVAL_SECONDS)
            yield OPENING  # sends the head now: the first token may be minutes away
            if self._exchange is not None:
                yield from pump(self._exchange, self._stats)
            outcome = "done"
        except ProxyError as error:
            outcome = _outcome(self._lease, error)
            yield sse.event(error.body())
        except Exception:
            outcome = InternalError.code
            raise
        finally:
            self._end(outcome)

    def _end(self, outcome: str) -> None:
        """Give the place back and record how the answer ended; only the first call counts."""
        if self._stats.ended is None:
            self._lease.release(finished=outcome == "done")
            self._stats.end(outcome)


def _note_place(lease: Lease, stats: AnswerStats) -> None:
    stats.granted = time.monotonic()
    stats.model = lease.spec.model_id


def _outcome(lease: Lease, error: ProxyError) -> str:
    return "client_gone" if lease.disconnect.gone else error.code
