"""HTTP as it appears on the wire: requests to send, and answers that were received."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
from typing import Any, NamedTuple

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def request(method: str, path: str, body: Any = None, version: str = "1.1") -> bytes:
    """Return a request as it is sent over the wire."""
    sent = b"" if body is None else json.dumps(body).encode()
    length = f"Content-Length: {len(sent)}\r\n" if sent else ""
    return f"{method} {path} HTTP/{version}\r\nHost: localhost\r\n{length}\r\n".encode() + sent


def connect(port: int) -> socket.socket:
    """Open a connection to a port of this machine."""
    return socket.create_connection(("127.0.0.1", port), 10)


class Answer(NamedTuple):
    """One HTTP answer as it appeared on the wire."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def error(self) -> dict[str, Any]:
        """Return the error object, after a check of its shape."""
        return shape(json.loads(self.body))


def shape(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the error object of an answer, after a check of its shape."""
    error: dict[str, Any] = answer["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["message"].strip().endswith((".", "?", ")")), error["message"]
    return error


class Wire(io.BytesIO):
    """Bytes that http.client reads answers from."""

    def makefile(self, *_: object) -> Wire:
        return self

    def close(self) -> None:  # the next answer follows
        pass


def answers(received: bytes) -> list[Answer]:
    """Return all answers in the bytes received over one connection."""
    wire = Wire(received)
    found = []
    while wire.tell() < len(received):
        answer = http.client.HTTPResponse(wire)  # type: ignore[arg-type]
        answer.begin()
        found.append(Answer(answer.status, answer.headers, answer.read()))
    return found


def received(connection: socket.socket, seconds: float = 10.0) -> bytes:
    """Return everything received until the other side closes; fail if it does not close."""
    connection.settimeout(seconds)
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while more := connection.recv(1 << 16):
            data += more
    return data
