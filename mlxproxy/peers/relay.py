"""A request to a peer and its answer back, byte for byte, over the connection that backends use."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Final

from mlxproxy.backend.connection import BackendConnection, BrokenConnection, ReadTimeout, parsed
from mlxproxy.disconnect import Disconnect
from mlxproxy.errors import (
    InternalError,
    PeerUnavailable,
    ProxyError,
    ShuttingDown,
    TooManyRequests,
)
from mlxproxy.peers.directory import CONNECT_SECONDS, Listing, Poller, headers_for
from mlxproxy.peers.route import RETRY_SECONDS, There
from mlxproxy.relay.stall import Silence, Verdict, judge
from mlxproxy.relay.statistics import AnswerStats
from mlxproxy.settings import Peer

INTERVAL_SECONDS: Final = 1.0  # between two looks at a silence
LOST_SECONDS: Final = 10.0  # without a byte and without a list: the peer sleeps or is gone
ANSWER_BYTES: Final = 64 << 20  # of a whole answer
ENDS: Final = {"text/event-stream": b"\n\n", "application/x-ndjson": b"\n"}
"""The types of streams, and what ends each of their parts."""


@dataclass(frozen=True)
class Question:
    """A request for a peer.

    Attributes:
        body: JSON.
        failed: returns the last part of a stream that ends with this error.
        changes: whether the peer's list is another one afterwards (a load).
    """

    path: str
    body: bytes
    request_id: str
    failed: Callable[[ProxyError], bytes]
    changes: bool = False


class PeerAnswer:
    """One answer of a peer. :meth:`close` must be called, even if nobody reads it.

    Args:
        listing: returns what is known about the peer now.
        on_end: called once, at the end.

    Attributes:
        status, mimetype, retry_after: those of the answer, once it is open.
        error: why the answer has been aborted here.
        changes: see :class:`Question`.
    """

    def __init__(
        self,
        question: Question,
        listing: Callable[[], Listing],
        disconnect: Disconnect,
        stall_timeout: float,
        stats: AnswerStats,
        on_end: Callable[[PeerAnswer], None],
    ) -> None:
        self.status = 0
        self.mimetype = ""
        self.warning: str | None = None
        self.retry_after: str | None = None
        self.error: ProxyError | None = None
        self.changes = question.changes
        self._question = question
        self._listing = listing
        self._peer: Peer = listing().peer
        self._disconnect = disconnect
        self._stall_timeout = stall_timeout
        self._stats = stats
        self._on_end = on_end
        self._begun = self._last_byte_at = time.monotonic()
        self._connection: BackendConnection | None = None
        self._body = self._stream()

    @property
    def streamed(self) -> bool:
        return self.status == 200 and self.mimetype in ENDS

    def open(self) -> None:
        """Send the request and wait for the answer's head.

        Raises:
            ProxyError: none comes.
        """
        try:
            self._open()
        except BaseException as error:
            self._end(self._outcome(error))
            raise

    def whole(self) -> bytes:
        """Return the whole answer, and end it.

        Raises:
            ProxyError: it does not come to its end.
        """
        outcome = InternalError.code
        try:
            pieces, size = [], 0
            while piece := self._read():
                pieces.append(piece)
                size += len(piece)
                if size > ANSWER_BYTES:
                    raise self._unavailable(f"sent an answer of more than {ANSWER_BYTES:,} bytes")
            body = b"".join(pieces)
            outcome = "done" if self.status < 400 else "peer_error"
            return body if self.status < 400 else named_error(body, self._peer.name)
        except ProxyError as error:
            outcome = self._outcome(error)
            raise
        finally:
            self._end(outcome)

    def abort(self, error: ProxyError) -> None:
        """End the answer with this error, from any thread."""
        self.error = self.error or error
        if self._connection is not None:
            self._connection.abort()

    def __iter__(self) -> Iterator[bytes]:
        return self._body

    def close(self) -> None:
        """End the answer, whatever its progress: the peer notices that nobody reads it."""
        self._body.close()
        self._end("client_gone")

    def _open(self) -> None:
        listing = self._listing()
        if listing.address is None:
            raise self._unavailable("has not been reached yet")
        try:
            self._connection = connection = BackendConnection(
                listing.address, INTERVAL_SECONDS, connect_seconds=CONNECT_SECONDS
            )
            self._disconnect.on_leave(connection.abort)
            self._stats.granted = time.monotonic()
            question = self._question
            connection.send(
                question.path,
                question.body,
                self._peer.authorization,
                headers_for(question.request_id),
            )
            while not self._has_head(connection):
                self._check()
        except BrokenConnection as error:
            raise self.error or self._unavailable(error.what) from None
        if connection.status == 401:  # the client's own key is not the one at fault
            raise self._unavailable('rejects the key: check its "key" in PEERS')
        self.status = connection.status
        self.mimetype = connection.headers.get("content-type", "").partition(";")[0].strip()
        self.retry_after = _printable(connection.headers.get("retry-after"))
        self.warning = _printable(connection.headers.get("x-mlxproxy-warning"))

    @staticmethod
    def _has_head(connection: BackendConnection) -> bool:
        try:
            connection.read_head()
        except ReadTimeout:
            return False
        return True

    def _read(self) -> bytes:
        """Return the next bytes of the answer, ``b""`` at its proper end."""
        connection = self._connection
        assert connection is not None
        while True:
            try:
                piece = connection.read()
            except ReadTimeout:
                self._check()
                continue
            except BrokenConnection as error:
                raise self.error or self._unavailable(error.what) from None
            if self.error is not None:
                raise self.error
            if piece:
                self._last_byte_at = time.monotonic()
                if self._stats.first_byte is None:
                    self._stats.first_byte = self._last_byte_at
            elif not connection.whole:
                raise self._unavailable("closed the connection before the answer was complete")
            return piece

    def _stream(self) -> Generator[bytes, None, None]:
        """Yield the answer as it comes; of a part that is cut off, yield nothing."""
        end = ENDS[self.mimetype]
        rest, outcome = b"", "client_gone"
        try:
            while piece := self._read():
                whole, found, rest = (rest + piece).rpartition(end)
                if found:
                    yield whole + found
                elif len(rest) > ANSWER_BYTES:
                    raise self._unavailable("sent an endless event")
            if rest:
                yield rest
            outcome = "done"
        except ProxyError as error:
            outcome = self._outcome(error)
            yield self._question.failed(error)
        except Exception:
            outcome = InternalError.code
            raise
        finally:
            self._end(outcome)

    def _check(self) -> None:
        """Return if a silent answer is worth waiting for.

        Raises:
            ProxyError: it has been aborted, or has been silent for too long.
        """
        if self.error is not None:
            raise self.error
        now, heard_at, limit = time.monotonic(), self._listing().heard_at, self._stall_timeout
        last = max(self._begun, self._last_byte_at, heard_at)
        if now - last > LOST_SECONDS:
            raise self._unavailable(f"has not answered for {now - last:.0f} s")
        silence = Silence(
            granted=self._begun,
            last_byte_at=self._last_byte_at,
            backend_last_byte_at=heard_at,
            alive=False,
            unstreamed=not self.streamed,
            exclusive=False,
        )
        if judge(silence, now, limit) is not Verdict.WAIT:
            raise self._unavailable(
                f"sent nothing for this answer for {now - self._last_byte_at:.0f} s "
                "(STALL_TIMEOUT), though it answers others"
            )

    def _unavailable(self, what: str) -> PeerUnavailable:
        return PeerUnavailable(
            f"The peer {self._peer.name} ({self._peer.url}) {what}. Try again; if the same request "
            "fails again, see mlxproxy's log there.",
            retry_after=RETRY_SECONDS,
            peer=self._peer.name,
        )

    def _outcome(self, error: BaseException) -> str:
        if self._disconnect.gone:
            return "client_gone"
        return error.code if isinstance(error, ProxyError) else InternalError.code

    def _end(self, outcome: str) -> None:
        """Close the connection and record how the answer ended; only the first call counts."""
        if self._stats.ended is None:
            self._stats.end(outcome)
            self._disconnect.on_leave(None)
            if self._connection is not None:
                self._connection.close()
            self._on_end(self)


def _printable(value: str | None) -> str | None:
    """Return the value of a header if it is one that can be sent again."""
    return value if value is not None and value.isprintable() else None


def named_error(body: bytes, peer: str) -> bytes:
    """Return a peer's error, of any dialect, with the peer's name in its message."""
    try:
        value = parsed(body)
        error = value["error"]
        if isinstance(error, str):
            value["error"] = f"{peer}: {error}"
        else:
            error["message"] = f"{peer}: {error['message']}"
    except (ValueError, KeyError, TypeError):
        text = f"The peer {peer} answered with an error that is not mlxproxy's."
        return json.dumps(PeerUnavailable(text, peer=peer).body()).encode()
    return json.dumps(value).encode()


class Peers:
    """All peers of one proxy, and the answers that come from them.

    Args:
        most: answers at a time from one peer.
        stall_timeout: in seconds.
    """

    def __init__(self, peers: tuple[Peer, ...], most: int, stall_timeout: float) -> None:
        self._pollers = {peer.name: Poller(peer) for peer in peers}
        self._most = most
        self._stall_timeout = stall_timeout
        self._changed = threading.Condition()
        self._open: dict[PeerAnswer, str] = {}
        self._closed = self._hurries = False

    def start(self) -> None:
        """Begin to ask the peers what they offer."""
        for poller in self._pollers.values():
            poller.start()

    def listings(self) -> list[Listing]:
        """Return what is known about each peer, in the order of the setting."""
        return [poller.listing for poller in self._pollers.values()]

    def in_flight(self) -> dict[str, int]:
        """Return the number of answers in flight from each peer."""
        with self._changed:
            names = list(self._open.values())
        return {name: names.count(name) for name in self._pollers}

    def answer(
        self, there: There, question: Question, disconnect: Disconnect, stats: AnswerStats
    ) -> PeerAnswer:
        """Return an answer of a peer, which is not open yet.

        Raises:
            ProxyError: too many are in flight, or this proxy is shutting down.
        """
        peer = there.listing.peer
        poller = self._pollers[peer.name]
        answer = PeerAnswer(
            question, lambda: poller.listing, disconnect, self._stall_timeout, stats, self._forget
        )
        with self._changed:
            if self._closed:
                raise ShuttingDown("mlxproxy is stopping. Try again once it has restarted.")
            if list(self._open.values()).count(peer.name) >= self._most:
                raise TooManyRequests(
                    f"{self._most} answers of the peer {peer.name} are in flight (MAX_CONCURRENT). "
                    "Try again when one of them has ended.",
                    retry_after=RETRY_SECONDS,
                )
            self._open[answer] = peer.name
        return answer

    def refuse(self) -> None:
        """Accept no further request."""
        with self._changed:
            self._closed = True

    def close(self, seconds: float) -> None:
        """Let answers finish for so long, then end them; stop to ask the peers."""
        self.refuse()
        for poller in self._pollers.values():
            poller.close()
        with self._changed:
            self._changed.wait_for(lambda: not self._open or self._hurries, seconds)
            left = list(self._open)
        for answer in left:
            answer.abort(ShuttingDown("The answer was aborted: mlxproxy is stopping."))

    def force_stop(self) -> None:
        """End the answers now that :meth:`close` waits for."""
        with self._changed:
            self._hurries = True
            self._changed.notify_all()

    def _forget(self, answer: PeerAnswer) -> None:
        with self._changed:
            name = self._open.pop(answer)
            self._changed.notify_all()
        if answer.changes:
            self._pollers[name].refresh()
