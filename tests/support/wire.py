"""What goes over the wire, byte for byte; and the server over an application of a test's own."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from mlxproxy.server import channel, server
from mlxproxy.settings import Settings


class Answer(NamedTuple):
    """One HTTP answer as it stood on the wire."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def error(self) -> dict[str, Any]:
        """The error object, after a look at its shape."""
        return shape(json.loads(self.body))


def shape(answer: dict[str, Any]) -> dict[str, Any]:
    error: dict[str, Any] = answer["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["message"].strip().endswith((".", "?")), error["message"]
    return error


class Wire(io.BytesIO):
    """Bytes that http.client reads answers from."""

    def makefile(self, *_: object) -> Wire:
        return self

    def close(self) -> None:  # the next answer follows
        pass


def answers(received: bytes) -> list[Answer]:
    """All answers in what came over one connection."""
    wire = Wire(received)
    found = []
    while wire.tell() < len(received):
        answer = http.client.HTTPResponse(wire)  # type: ignore[arg-type]
        answer.begin()
        found.append(Answer(answer.status, answer.headers, answer.read()))
    return found


def received(connection: socket.socket, seconds: float = 10.0) -> bytes:
    """All that comes until the other side closes; fails if it does not."""
    connection.settimeout(seconds)
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while more := connection.recv(1 << 16):
            data += more
    return data


class Alone:
    """The server without the rest, over an application of a test's own."""

    def __init__(
        self,
        application: Callable[..., Any],
        channel_class: type[channel.Channel] = channel.DirectChannel,
    ) -> None:
        settings = Settings(proxy_host="127.0.0.1", proxy_port=0, max_concurrent=1, max_queue=0)
        self.server = server.Server(
            application, settings, lambda: None, lambda: None, channel_class
        )
        self.port = self.server.address[1]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            self.server._turn(0.02)

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        server.wasyncore.close_all(self.server._map)
        self.server._dispatcher.shutdown(timeout=1)
