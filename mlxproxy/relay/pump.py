"""The body of an answer, from the backend's socket to its reader."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from mlxproxy import sse
from mlxproxy.backend.connection import ReadTimeout, parsed
from mlxproxy.relay.open import Exchange
from mlxproxy.relay.statistics import AnswerStats

HEARTBEAT = sse.comment("waiting for the backend")
_USAGE = b'"usage"'  # a key: in a text, its quotes are escaped


def pump(exchange: Exchange, stats: AnswerStats) -> Iterator[bytes]:
    """Yield a stream's whole events as they arrive, up to `data: [DONE]`, without collecting them.

    Raises:
        ProxyError: the answer ends before that.
    """
    backend, patience = exchange.backend, exchange.patience
    read, monotonic = exchange.connection.read, time.monotonic
    model_field, shown_field = exchange.model_field, exchange.shown_field
    chunk_end, reasoning_mark = exchange.wire.chunk_end, exchange.reasoning_mark
    without_role = exchange.without_role
    whole_events = sse.Events()
    take, pending = whole_events.take, whole_events.pending
    usage: Any = None
    events = 0
    while not whole_events.done:
        try:
            data = read()
        except ReadTimeout:
            patience.check()
            yield HEARTBEAT
            continue
        if not data:
            raise exchange.cut_off()
        # The usual case: exactly one event of one line, which is a part of the text.
        if not pending and data.find(b"\n") + 2 == len(data) and data.endswith(chunk_end):
            data = data.replace(model_field, shown_field, 1)
            # (From its end, where the text is: that takes a third of the time.)
            if reasoning_mark is not None and data.rfind(reasoning_mark) > 0:
                data = exchange.with_both_spellings(data)
            if events and without_role is not None:
                data = without_role(data)
            count = 1
        else:
            # After half an event, no client could read an error that follows.
            data = take(data)
            if (error := exchange.failure(data)) is not None:
                raise error
            if _USAGE in data:
                data, usage = _without_usage(data, usage, exchange.wants_usage)
            data = exchange.shown(data)
            count = data.count(b"data: {")
            if without_role is not None:
                data = _role_once(data, without_role, not events)
        if not events:
            _note_opening(data, exchange, stats)
        if data:
            yield data  # before the rest of the bookkeeping
        patience.last_byte_at = backend.last_byte_at = monotonic()
        stats.tokens_out = events = events + count
    stats.tokens_out = max(0, events - 1)  # the last chunk carries the finish reason alone
    stats.usage(usage)


def collect(exchange: Exchange, stats: AnswerStats) -> bytes:
    """Return a whole answer: assembled from events, or as the backend sent it.

    Raises:
        ProxyError: the answer ends before it is complete, or is invalid.
    """
    answer = (_put_together if exchange.streamed else _passed_on)(exchange, stats)
    return exchange.shown(answer)


def _put_together(exchange: Exchange, stats: AnswerStats) -> bytes:
    completion, events = exchange.wire.completion(), sse.Events()
    for data in _pieces(exchange, stats):
        stats.tokens_out += data.count(b"data: {")  # for those who watch; the usage corrects it
        completion.add(events.take(data))
        if events.done:
            stats.usage(completion.usage)
            return completion.answer()
    raise exchange.cut_off()


def _passed_on(exchange: Exchange, stats: AnswerStats) -> bytes:
    body = b"".join(_pieces(exchange, stats))
    if not body or not exchange.connection.whole:
        raise exchange.cut_off()
    stats.usage(exchange.usage_of(body))
    return body


def _pieces(exchange: Exchange, stats: AnswerStats) -> Iterator[bytes]:
    """Yield the body as it arrives."""
    while True:
        try:
            data = exchange.connection.read()
        except ReadTimeout:
            exchange.patience.check()
            continue
        if not data:
            return
        exchange.patience.last_byte_at = exchange.backend.last_byte_at = time.monotonic()
        if stats.first_byte is None:
            _note_opening(data, exchange, stats)
        yield data


def _note_opening(data: bytes, exchange: Exchange, stats: AnswerStats) -> None:
    """Record the prompt's length, when the prompt had been read, and when the first token came."""
    if (tokens := exchange.wire.prompt_tokens(data)) is not None:
        stats.tokens_in = tokens
    if stats.first_byte is not None:
        return
    if data.startswith(b":"):  # a keepalive
        stats.prompt_read = time.monotonic()
        stats.tokens_unmeasured = data.count(b"data: {")
    if b"data: " in data:
        stats.first_byte = time.monotonic()


def _role_once(events: bytes, without_role: Callable[[bytes], bytes], opens: bool) -> bytes:
    """Return these events without the role, which stays in the first event of a stream alone."""
    passed = []
    for event in events.split(sse.BLANK):
        is_first, opens = opens and event.startswith(b"data: "), opens and event.startswith(b":")
        passed.append(event if is_first else without_role(event))
    return sse.BLANK.join(passed)


def _without_usage(events: bytes, usage: Any, kept: bool) -> tuple[bytes, Any]:
    """Return these events, and the token count: the one in them, if there is one.

    Every stream is requested with it, so an event that carries nothing else is passed on only to
    clients that have asked for it themselves.
    """
    passed = []
    for event in events.split(sse.BLANK)[:-1]:
        found = _usage_of(event)
        if found is not None:
            usage, is_alone = found
            if is_alone and not kept:
                continue
        passed.append(event + sse.BLANK)
    return b"".join(passed), usage


def _usage_of(event: bytes) -> tuple[dict[str, Any], bool] | None:
    """Return the token count in an event, and whether the event contains no text besides it."""
    if _USAGE not in event:
        return None
    try:
        value = parsed(event.partition(b"data: ")[2])
    except ValueError:
        return None
    usage = value.get("usage") if isinstance(value, dict) else None
    return (usage, not value.get("choices")) if isinstance(usage, dict) else None
