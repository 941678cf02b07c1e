"""One request to the backend and its answer back, read until it is whole.

A stream is passed on byte for byte as the socket gives it, up to its `data: [DONE]`; nothing is
collected, no event is parsed. A whole answer is asked for as a stream too and put together here, so
that a client that leaves ends the generation (the backend never notices it by itself), and a hang
can be told.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from mlxproxy import sse
from mlxproxy.backend.connection import BackendConnection, ReadTimeout, parsed
from mlxproxy.controller import Lease
from mlxproxy.engines.mlx_lm.completion import Completion, usage_of
from mlxproxy.errors import (
    BackendFailed,
    InternalError,
    InvalidRequest,
    ProxyError,
)

log = logging.getLogger("mlxproxy.relay")

HEARTBEAT = sse.comment("waiting for the backend")
OPENING = sse.comment()
INTERVAL = 5.0  # seconds of silence after which a stream's client gets a comment
WAIT_SILENTLY = 2.0  # seconds for which a stream waits before it commits to a status of 200

_PROMPT_TOKENS = re.compile(rb": keepalive \d+/(\d{1,18})\n")

Prepare = Callable[[Lease], bytes]


@dataclass
class AnswerStats:
    """What is known of one answer, for the log and the metrics (times are monotonic seconds)."""

    started: float = field(default_factory=time.monotonic)
    granted: float | None = None
    first_byte: float | None = None
    ended: float | None = None
    model: str | None = None
    tokens_in: int | None = None
    tokens_out: int = 0
    outcome: str = "pending"  # then: done, client_gone, or an error's code
    on_end: Callable[[AnswerStats], None] = lambda _: None

    def end(self) -> None:
        """The answer has ended, however it did."""
        self.ended = time.monotonic()
        self.on_end(self)

    def figures(self) -> dict[str, Any]:
        """Counts, and times in seconds, as far as they are known."""
        first, ended = self.first_byte, self.ended or time.monotonic()
        generating = ended - first if first is not None else 0.0
        return {
            "model": self.model,
            "outcome": self.outcome,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "waited": _rounded(self.granted, self.started),
            "first_token": _rounded(first, self.started),
            "tokens_per_second": round(self.tokens_out / generating, 1)
            if generating > 0 and self.tokens_out
            else None,
        }

    def usage(self, usage: object) -> None:
        """Takes the backend's own count, which is better than counting events."""
        if isinstance(usage, dict):
            self.tokens_in = _count(usage.get("prompt_tokens")) or self.tokens_in
            self.tokens_out = _count(usage.get("completion_tokens")) or self.tokens_out


def stream(
    lease: Lease, path: str, prepare: Prepare, stats: AnswerStats
) -> Generator[bytes, None, None]:
    """The body of a streamed answer.

    The first item is empty and means that the status is decided: 200. An error before it is
    raised, an error after it is the stream's last event. Closing the generator ends everything.

    Args:
        lease: the request's place, perhaps still waiting.
        path: the backend's path.
        prepare: makes the request body for what the lease was granted on.

    Raises:
        ProxyError: before the first item.
    """
    committed = False
    events = 0
    try:
        try:
            patience = WAIT_SILENTLY
            while not lease.wait(patience):
                if not committed:
                    committed = True
                    yield b""
                yield lease.comment()
                patience = INTERVAL
            stats.granted = time.monotonic()
            stats.model = lease.spec.model_id
            connection = lease.connect(INTERVAL)
            connection.send(path, prepare(lease))
            while not _head(connection, lease):
                if not committed:
                    committed = True
                    yield b""
                yield HEARTBEAT
            if connection.status != 200:
                raise _translated(connection, lease)
            if not committed:
                committed = True
                yield b""
            yield OPENING  # carries the head now: the first token may be minutes away
            backend = lease.backend
            assert backend is not None
            read, monotonic = connection.read, time.monotonic
            whole_events = sse.Events()
            take, pending = whole_events.take, whole_events.pending
            while not whole_events.done:
                try:
                    data = read()
                except ReadTimeout:
                    if error := lease.stalled():
                        raise error from None
                    yield HEARTBEAT
                    continue
                if not data:
                    raise _cut_off(lease)
                # As nearly always: all there is is one event of one line, which is not the end.
                one = not pending and data.find(b"\n") + 2 == len(data) and data.endswith(b"}\n\n")
                if not one:
                    # With half an event before it, no client could read the error that follows.
                    data = take(data)
                if not events:
                    _opening(stats, data)
                if data:
                    yield data  # before the rest of what is to be noted
                lease.last_byte_at = backend.last_byte_at = monotonic()
                stats.tokens_out = events = events + (1 if one else data.count(b"data: {"))
            stats.outcome = "done"
        except ProxyError as error:
            stats.outcome = "client_gone" if lease.disconnect.gone else error.code
            if not committed:
                raise
            yield sse.event(error.body())
    except GeneratorExit:
        if stats.outcome == "pending":
            stats.outcome = "client_gone"
        raise
    finally:
        stats.tokens_out = max(0, events - 1)  # the last chunk carries the finish reason alone
        lease.release(finished=stats.outcome == "done")
        stats.end()


def whole(lease: Lease, path: str, prepare: Prepare, stats: AnswerStats, plain: bool) -> bytes:
    """A whole answer, exactly as the backend would have sent it.

    Args:
        plain: ask the backend for the whole instead (its stream carries no log probabilities).
        prepare: makes the request body; for a stream with usage unless `plain`.

    Raises:
        ProxyError: why there is none.
    """
    try:
        lease.wait()
        stats.granted = time.monotonic()
        stats.model = lease.spec.model_id
        lease.unstreamed = plain
        connection = lease.connect(INTERVAL)
        connection.send(path, prepare(lease))
        while not _head(connection, lease):
            pass
        if connection.status != 200:
            raise _translated(connection, lease)
        answer = (_passed_on if plain else _put_together)(connection, lease, stats)
        stats.outcome = "done"
        return answer
    except ProxyError as error:
        stats.outcome = "client_gone" if lease.disconnect.gone else error.code
        raise
    finally:
        lease.release(finished=stats.outcome == "done")
        stats.end()


def _rounded(moment: float | None, start: float) -> float | None:
    return None if moment is None else round(moment - start, 3)


def _head(connection: BackendConnection, lease: Lease) -> bool:
    """Waits for the backend's head for one interval; whether it has come.

    Raises:
        ProxyError: the connection ended, or the backend is taken for dead.
    """
    try:
        connection.read_head()
    except ReadTimeout:
        if error := lease.stalled():
            raise error from None
        return False
    except BackendFailed as error:
        raise lease.fault(error) from None
    return True


def _opening(stats: AnswerStats, data: bytes) -> None:
    """The prompt's length from the keepalives, and when the first token came."""
    if match := _PROMPT_TOKENS.match(data):
        stats.tokens_in = int(match[1])
    if stats.first_byte is None and b"data: " in data:
        stats.first_byte = time.monotonic()


def _cut_off(lease: Lease) -> ProxyError:
    return lease.fault(
        BackendFailed(f"The backend closed the connection before the answer was complete. {_AGAIN}")
    )


def _count(value: object) -> int:
    """The value if it is a number of tokens that a metric can add up (it is a float); else 0."""
    return value if type(value) is int and 0 < value < 1 << 53 else 0


def _put_together(connection: BackendConnection, lease: Lease, stats: AnswerStats) -> bytes:
    """The whole answer that the events amount to."""
    assembly, events = Completion(), sse.Events()
    for data in _pieces(connection, lease, stats):
        assembly.add(events.take(data))
        if events.done:
            stats.usage(assembly.usage)
            return assembly.answer()
    raise _cut_off(lease)


def _passed_on(connection: BackendConnection, lease: Lease, stats: AnswerStats) -> bytes:
    """A whole answer of the backend's own: all of its bytes, and JSON."""
    body = b"".join(_pieces(connection, lease, stats))
    if not body or not connection.whole:
        raise _cut_off(lease)
    try:
        stats.usage(usage_of(body))
    except BackendFailed as error:
        raise lease.fault(error) from None
    return body


def _pieces(connection: BackendConnection, lease: Lease, stats: AnswerStats) -> Iterator[bytes]:
    """The body as it comes."""
    backend = lease.backend
    assert backend is not None
    while True:
        try:
            data = connection.read()
        except ReadTimeout:
            if error := lease.stalled():
                raise error from None
            continue
        if not data:
            return
        lease.last_byte_at = backend.last_byte_at = time.monotonic()
        if stats.first_byte is None:
            _opening(stats, data)
        yield data


def _translated(connection: BackendConnection, lease: Lease) -> ProxyError:
    """The backend's own error in the contract's shape, with a status that tells the truth.

    It answers 404 for whatever goes wrong in a generation, with a text that may hold paths.
    """
    body = connection.read_rest(1 << 16, INTERVAL)
    try:
        text = parsed(body)["error"]
    except (ValueError, KeyError, TypeError):
        text = None
    if lease.error is not None:
        return lease.error
    if not isinstance(text, str):
        return lease.fault(BackendFailed(f"The backend failed without giving a reason. {_AGAIN}"))
    if "generation thread died" in text:
        return lease.fault(BackendFailed("The backend can no longer generate text. Try again."))
    log.debug("the backend answered %d: %s", connection.status, text)  # may quote a prompt
    if connection.status == 400:
        return InvalidRequest(_told("The backend rejected this request", text, _VALIDATION))
    if connection.status == 404 and _PROMPT.fullmatch(text):
        return InvalidRequest(f"{text[0].upper()}{text[1:]}. {_ADVICE[text.startswith(_EMPTY)]}")
    if connection.status == 404 and _TEMPLATE.search(text):
        what = "The model's chat template rejected these messages"
        return InvalidRequest(_told(what, text, _PLAIN))
    if connection.status == 404:
        return InternalError(f"The backend could not answer this request. {_WHY}")
    return BackendFailed(f"The backend failed to answer this request. {_WHY}")


# What the backend says may hold paths of this machine, or a client's own words, in whatever form:
# only sentences of a known kind are passed on.
_TEMPLATE = re.compile(
    r"[Cc]onversation|\broles?\b|[Uu]ser query|template|has no attribute|Only '?text"
)
_EMPTY = "the prompt has no tokens"
_PROMPT = re.compile(
    rf"{_EMPTY}|the prompt has (?:more than )?\d+ tokens, and the model's context is \d+"
)
_ADVICE = {True: "Send some text.", False: "Send less."}
_VALIDATION = re.compile(r"[a-z_]+ must be [A-Za-z0-9 ,.()']{1,100}")
_AGAIN = "Try again; if the same request fails again, see the backend's log."
_WHY = "With LOG_LEVEL=DEBUG, the log shows the reason."  # its own does not
_PLAIN = re.compile(r"[A-Za-z][A-Za-z ,'/-]{0,120}\.?")


def _told(what: str, text: str, known: re.Pattern[str]) -> str:
    """A sentence with the backend's own words, if they are of the known kind."""
    return f"{what}: {text.rstrip('.')}." if known.fullmatch(text) else f"{what}."
