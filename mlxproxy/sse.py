"""Server-sent events: written, and read from the pieces that a socket gives, in linear time."""

from __future__ import annotations

import json
from typing import Any

from mlxproxy.errors import BackendFailed

MEDIA_TYPE = "text/event-stream"
HEADERS = {
    "Content-Type": f"{MEDIA_TYPE}; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would collect the stream
}
BLANK = b"\n\n"  # what ends an event
DONE = b"data: [DONE]\n\n"  # the event that ends an answer
# The largest event is a tool call, which `mlx_lm.server` sends in one piece: even a million tokens
# are about 4 MB. What is larger would never end, and memory would.
EVENT_LIMIT = 16 << 20


def event(data: dict[str, Any], kind: str | None = None) -> bytes:
    """Return an event with JSON as its data."""
    line = b"data: " + json.dumps(data).encode() + BLANK
    return line if kind is None else b"event: " + kind.encode() + b"\n" + line


def text(lines: str) -> bytes:
    """Return an event with text as its data."""
    return "".join(f"data: {line}\n" for line in lines.splitlines()).encode() + b"\n"


def comment(words: str = "") -> bytes:
    """Return what means nothing to a reader, but that there is a sender."""
    return f": {words}".rstrip().encode() + BLANK


class Events:
    """What has come of a stream of events.

    Bytes that :meth:`take` would return as they are need not be given to it: with nothing pending,
    those that have :data:`BLANK` at their end and no :data:`DONE` in them.

    Attributes:
        pending: the beginning of an event whose end has not come.
        done: whether the answer's end has come, an event of its own: the words in a model's text
            never are one, since JSON has no bare newline.
    """

    def __init__(self) -> None:
        self.pending = bytearray()
        self.done = False

    def take(self, data: bytes) -> bytes:
        """Return the events that these bytes complete, up to the answer's end.

        Each byte is looked at when it comes, and copied once more when its event is whole.

        Raises:
            BackendFailed: an event is larger than :data:`EVENT_LIMIT`.
        """
        pending = self.pending
        if self.done:
            return b""
        end = data.rfind(BLANK) + len(BLANK)
        if end < len(BLANK):  # there is none, unless a newline came before these bytes
            end = int(data.startswith(b"\n") and (not pending or pending.endswith(b"\n")))
        if not end:
            pending += data
            if len(pending) > EVENT_LIMIT:
                raise BackendFailed(
                    f"The backend sent an event of more than {EVENT_LIMIT >> 20} MiB, which this "
                    "proxy does not pass on. Ask for a shorter answer."
                )
            return b""
        whole = bytes(pending) + data[:end]
        pending[:] = data[end:]
        if DONE in whole:
            # Before the first of these events, another has ended.
            at = (BLANK + whole).find(BLANK + DONE)
            if at >= 0:
                self.done = True
                pending.clear()
                return whole[: at + len(DONE)]
        return whole
