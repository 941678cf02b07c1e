"""Server-sent events: written, and read in linear time from the pieces that a socket returns."""

from __future__ import annotations

import json
from typing import Any

from mlxproxy.errors import BackendFailed

MEDIA_TYPE = "text/event-stream"
HEADERS = {
    "Content-Type": f"{MEDIA_TYPE}; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # otherwise nginx would buffer the stream
}
BLANK = b"\n\n"  # the end of an event
DONE = b"data: [DONE]\n\n"  # the event that ends an answer
# The largest event is a tool call, which `mlx_lm.server` sends in one piece: even a million tokens
# are about 4 MB. Without a limit, an event that never ends would use up the memory.
EVENT_LIMIT = 16 << 20


def event(data: dict[str, Any], kind: str | None = None) -> bytes:
    """Return an event with JSON as its data."""
    line = b"data: " + json.dumps(data).encode() + BLANK
    return line if kind is None else b"event: " + kind.encode() + b"\n" + line


def text(lines: str) -> bytes:
    """Return an event with text as its data."""
    return "".join(f"data: {line}\n" for line in lines.splitlines()).encode() + b"\n"


def comment(words: str = "") -> bytes:
    """Return a comment, which tells a reader only that the sender is still there."""
    return f": {words}".rstrip().encode() + BLANK


class Events:
    """The events received so far from a stream.

    Bytes that :meth:`take` would return unchanged need not be passed to it: if nothing is pending,
    those that end with :data:`BLANK` and do not contain :data:`DONE`.

    Attributes:
        pending: the beginning of an event whose end has not arrived.
        done: whether the end of the answer has arrived, as an event of its own: the same words in a
            model's text are never one, since JSON contains no bare newline.
    """

    def __init__(self) -> None:
        self.pending = bytearray()
        self.done = False

    def take(self, data: bytes) -> bytes:
        """Return the events that these bytes complete, up to the end of the answer.

        Each byte is examined when it arrives, and copied once more when its event is complete.

        Raises:
            BackendFailed: an event is larger than :data:`EVENT_LIMIT`.
        """
        pending = self.pending
        if self.done:
            return b""
        end = data.rfind(BLANK) + len(BLANK)
        if end < len(BLANK):  # not found, unless a newline came before these bytes
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
            # These bytes begin after the end of another event.
            at = (BLANK + whole).find(BLANK + DONE)
            if at >= 0:
                self.done = True
                pending.clear()
                return whole[: at + len(DONE)]
        return whole
