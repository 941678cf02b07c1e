"""Requests as the load generator sends them, and the analysis of the bytes that came back."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

Piece = tuple[int, bytes]  # when it was received (nanoseconds), and its bytes

_EVENT = re.compile(rb'^data: .*"content": "(\d+) (\d+) (\d+) ".*\n\n', re.M)
_LENGTH = re.compile(rb"^content-length: (\d+)", re.M | re.I)


@dataclass(frozen=True)
class Event:
    """One event of the stand-in as it arrived; times in nanoseconds."""

    stream: int
    number: int
    sent: int
    received: int

    @property
    def latency(self) -> int:
        return self.received - self.sent


@dataclass(frozen=True)
class Answer:
    """A streamed answer.

    Attributes:
        first_byte: when its first byte arrived; None if none did.
        done: whether `data: [DONE]` was the last event.
        clean: whether its end was marked as the end (of a chunked body), or needed no mark.
    """

    status: int
    first_byte: int | None
    events: Sequence[Event]
    done: bool
    clean: bool

    def is_whole(self, stream: int, events: int) -> bool:
        """Return whether it is this stream's, with each event once, in order, and a proper end."""
        expected = [(stream, number) for number in range(events)]
        got = [(event.stream, event.number) for event in self.events]
        return self.status == 200 and got == expected and self.done and self.clean


def request(port: int, wish: Mapping[str, Any], *, stream: bool, model: str = "bench") -> bytes:
    """Return a chat request; the wish is for the stand-in."""
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": "Hello!"}],
            "max_tokens": 4096,
            "stream": stream,
            "bench": dict(wish),
        }
    )
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def is_answered(raw: bytes) -> bool:
    """Return whether this is a whole answer of its declared length, which a client waits for."""
    head, end, body = raw.partition(b"\r\n\r\n")
    length = _LENGTH.search(head)
    good = end and length and head.startswith((b"HTTP/1.0 200", b"HTTP/1.1 200"))
    return bool(good) and len(body) >= int(length[1])


def answer(pieces: Sequence[Piece]) -> Answer:
    """Return the answer that the pieces of one connection amount to."""
    raw = b"".join(data for _, data in pieces)
    head, end, _ = raw.partition(b"\r\n\r\n")
    if not end:
        return Answer(0, pieces[0][0] if raw else None, [], False, False)
    start = len(head) + len(end)
    if b"transfer-encoding: chunked" in head.lower():
        body, places, clean = _dechunked(raw, start)
    else:
        body, places, clean = raw[start:], [(0, start)], True
    ends = list(accumulate(len(data) for _, data in pieces))

    def received(offset: int) -> int:
        """Return when the byte before this offset of the body arrived."""
        where, place = places[bisect_left(places, (offset, 0)) - 1]
        return pieces[bisect_left(ends, place + offset - where)][0]

    events = [
        Event(int(match[1]), int(match[2]), int(match[3]), received(match.end()))
        for match in _EVENT.finditer(body)
    ]
    done = body.endswith(b"data: [DONE]\n\n")
    return Answer(int(head.split(b" ", 2)[1]), pieces[0][0], events, done, clean)


def _dechunked(raw: bytes, start: int) -> tuple[bytes, list[tuple[int, int]], bool]:
    """Return the body without chunk framing, where each chunk's data was, and whether it ended."""
    parts: list[bytes] = []
    places: list[tuple[int, int]] = []  # in the body, in the raw bytes
    length = 0
    while True:
        line = raw.find(b"\r\n", start)
        if line < 0:
            return b"".join(parts), places, False
        size = int(raw[start:line], 16)
        start = line + 2
        if not size:
            return b"".join(parts), places, raw[start:] == b"\r\n"
        if raw[start + size : start + size + 2] != b"\r\n":
            return b"".join(parts), places, False
        parts.append(raw[start : start + size])
        places.append((length, start))
        length += size
        start += size + 2
