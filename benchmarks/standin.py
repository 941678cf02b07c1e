"""A stand-in for `mlx_lm.server`: its command line and its wire, without a model.

It has to be faster than everything that is measured in front of it: one thread, one loop, events
made beforehand but for their numbers and the time. What a request wants stands in its field
``bench``, which every proxy passes on: ``{"stream": 3, "events": 200, "interval": 10, "phase": 2}``
is 200 events, one each 10 ms, 2 ms after the full 10 ms, with the number 3 in each. With an
interval of 0 all come at once. The time in an event is that of its sending; with
``"together": true`` it is when it was due, as for a batch whose tokens are all there at once.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import json
import select
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

NANOSECONDS = 1_000_000  # in a millisecond

_EVENT = {
    "id": "chatcmpl-2f1c7f0e-8f0b-4c6e-9a55-6f3f0d0c2b11",
    "system_fingerprint": "0.32.2-0.32.4-macOS-15.5-arm64-applegpu_g14s",
    "object": "chat.completion.chunk",
    "model": "/models/mlx/Qwen3-4B-4bit",
    "created": 1790000000,
}
_TEXT = b"%d %d %d "  # stream, number of the event, nanoseconds of the clock: 330 bytes in all
_USAGE = {"prompt_tokens": 10, "completion_tokens": 0, "total_tokens": 10}
_STREAM_HEAD = (
    b"HTTP/1.0 200 OK\r\nServer: BaseHTTP/0.6 Python/3.12\r\nDate: Mon, 21 Sep 2026 14:13:20 GMT"
    b"\r\nContent-type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Access-Control-Allow-Origin: *\r\n"
    b"Access-Control-Allow-Methods: *\r\nAccess-Control-Allow-Headers: *\r\n\r\n"
)


def _chunk(finish_reason: str | None, delta: dict[str, str]) -> bytes:
    choice = {"index": 0, "finish_reason": finish_reason, "delta": {"role": "assistant", **delta}}
    return b"data: " + json.dumps({**_EVENT, "choices": [choice]}).encode() + b"\n\n"


_TOKEN = _chunk(None, {"content": "TEXT"}).replace(b"TEXT", _TEXT)
_LAST = _chunk("length", {})
_DONE = b"data: [DONE]\n\n"


class Answer:
    """A stream in flight."""

    def __init__(self, connection: socket.socket, wish: dict[str, Any], end: bytes) -> None:
        self.connection = connection
        self.stream = int(wish.get("stream", 0))
        self.events = int(wish.get("events", 1))
        self.interval = int(wish.get("interval", 0) * NANOSECONDS)
        self.together = wish.get("together", False)
        self.end = end
        self.sent = 0
        self.due = time.monotonic_ns()
        if wish.get("from_now"):
            self.due += self.interval
        elif self.interval:
            self.due += -self.due % self.interval + int(wish.get("phase", 0) * NANOSECONDS)

    def send(self) -> bool:
        """Send what is due; return whether more will come."""
        try:
            if not self.interval:
                self.connection.sendall(b"".join(self._tokens()) + self.end)
                return False
            moment = self.due if self.together else time.monotonic_ns()
            self.connection.sendall(_TOKEN % (self.stream, self.sent, moment))
            self.sent += 1
            self.due += self.interval
            if self.sent < self.events:
                return True
            self.connection.sendall(self.end)
        except OSError:
            pass  # the client has left
        return False

    def _tokens(self) -> Iterator[bytes]:
        for number in range(self.events):
            yield _TOKEN % (self.stream, number, time.monotonic_ns())


class WholeAnswer(Answer):
    """An answer that is sent with its last token."""

    def __init__(self, connection: socket.socket, wish: dict[str, Any], end: bytes) -> None:
        super().__init__(connection, wish, end)
        self.due += (self.events - 1) * self.interval

    def send(self) -> bool:
        with contextlib.suppress(OSError):  # the client has left
            self.connection.sendall(self.end)
        return False


class Server:
    """One listening socket, its connections, and the streams by the time of their next event."""

    def __init__(self, host: str, port: int) -> None:
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server((host, port), backlog=1024)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._due: list[tuple[int, int, Answer]] = []
        self._turn = itertools.count()

    def run(self) -> None:
        while True:
            # Wait with microsecond precision; the selector itself would round up to a millisecond.
            select.select([self._selector], [], [], self._patience())
            for key, _ in self._selector.select(0):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.fileobj, key.data)
            while self._due and self._due[0][0] <= time.monotonic_ns():
                answer = heapq.heappop(self._due)[2]
                if answer.send():
                    self._add(answer)
                else:
                    answer.connection.close()

    def _patience(self) -> float | None:
        """Return the seconds until the next event is due."""
        return max(0.0, (self._due[0][0] - time.monotonic_ns()) / 1e9) if self._due else None

    def _add(self, answer: Answer) -> None:
        heapq.heappush(self._due, (answer.due, next(self._turn), answer))

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(True)
        self._selector.register(connection, selectors.EVENT_READ, bytearray())

    def _read(self, connection: Any, received: bytearray) -> None:
        data = connection.recv(1 << 16)
        received += data
        head, end, body = bytes(received).partition(b"\r\n\r\n")
        if data and (not end or len(body) < _content_length(head)):
            return
        self._selector.unregister(connection)
        if not end or not self._answer(connection, head, body):
            connection.close()

    def _answer(self, connection: socket.socket, head: bytes, body: bytes) -> bool:
        """Answer a request; return whether it has begun a stream that continues."""
        method, path, _ = head.split(b" ", 2)
        sys.stderr.write(f'127.0.0.1 - - "{method.decode()} {path.decode()} HTTP/1.0" 200 -\n')
        if method == b"GET":
            connection.sendall(_whole(200, {"status": "ok"}))
            return False
        request = json.loads(body)
        if not request.get("messages"):
            connection.sendall(_whole(404, {"error": "text input must be of type str"}))
            return False
        wish = request.get("bench", {})
        usage = {**_USAGE, "completion_tokens": wish.get("events", 1)}
        if not request.get("stream"):
            message = {"role": "assistant", "content": f"{wish.get('stream', 0)} 0 0 "}
            choice = {"index": 0, "finish_reason": "length", "message": message}
            answer = {**_EVENT, "object": "chat.completion", "choices": [choice], "usage": usage}
            self._add(WholeAnswer(connection, wish, _whole(200, answer)))
            return True
        last = _LAST
        if (request.get("stream_options") or {}).get("include_usage"):
            end = {**_EVENT, "object": "chat.completion", "choices": [], "usage": usage}
            last += b"data: " + json.dumps(end).encode() + b"\n\n"
        connection.sendall(_STREAM_HEAD)
        connection.sendall(b": keepalive 10/10\n\n")
        self._add(Answer(connection, wish, last + _DONE))
        return True


def _content_length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    return 0


def _whole(status: int, answer: dict[str, Any]) -> bytes:
    body = json.dumps(answer).encode()
    reason = {200: "OK", 404: "Not Found"}[status]
    head = (
        f"HTTP/1.0 {status} {reason}\r\nServer: BaseHTTP/0.6 Python/3.12\r\n"
        f"Content-type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    given, _ = parser.parse_known_args()  # the rest concerns the model
    Server(given.host, given.port).run()


if __name__ == "__main__":
    main()
