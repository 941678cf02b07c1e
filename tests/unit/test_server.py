"""The server over an application of a test's own.

Clients that do not read, that send nothing more or leave, and a clock that jumps.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from waitress.channel import ClientDisconnected

from mlxproxy.server import channel
from tests.support.bare_server import BareServer
from tests.support.raw_http import CONTINUE, answers, connect, received, request
from tests.support.waiting import until


@pytest.fixture
def serve() -> Iterator[Callable[..., BareServer]]:
    """Starts servers and leaves none of them behind."""
    started: list[BareServer] = []

    def starter(
        application: Callable[..., Any], *channel_class: type[channel.Channel]
    ) -> BareServer:
        started.append(BareServer(application, *channel_class))
        return started[-1]

    yield starter
    for one in started:
        one.close()


# -- clients that do not read, or send nothing


@pytest.mark.parametrize("channel_class", [channel.DirectChannel, channel.Channel])
def test_a_client_that_reads_nothing_for_a_minute_is_disconnected(
    serve: Callable[..., BareServer],
    monkeypatch: pytest.MonkeyPatch,
    channel_class: type[channel.Channel],
) -> None:
    assert channel.DEAF_AFTER <= 60
    monkeypatch.setattr(channel, "DEAF_AFTER", 0.3)
    ended = threading.Event()

    def application(_: Any, start_response: Callable[..., Any]) -> Iterator[bytes]:
        start_response("200 OK", [])
        try:
            yield from itertools.repeat(b"x" * 65536)
        finally:
            ended.set()

    one = serve(application, channel_class)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", one.port))
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while not ended.wait(0.05):
            assert connection.recv(1)
    assert ended.is_set()


@pytest.mark.parametrize("channel_class", [channel.DirectChannel, channel.Channel])
def test_a_client_that_reads_nothing_is_disconnected_although_more_is_always_sent(
    serve: Callable[..., BareServer],
    monkeypatch: pytest.MonkeyPatch,
    channel_class: type[channel.Channel],
) -> None:
    monkeypatch.setattr(channel, "DEAF_AFTER", 0.3)
    ended = threading.Event()

    def application(_: Any, start_response: Callable[..., Any]) -> Iterator[bytes]:
        start_response("200 OK", [])
        try:
            yield from itertools.repeat(b"x" * 150_000, 2)  # less than stops the application
            while not ended.wait(0.02):
                yield b": waiting\n\n"
        finally:
            ended.set()

    one = serve(application, channel_class)
    one.server._server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", one.port))
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ended.wait(5)


def test_clients_that_send_requests_and_read_nothing_hold_no_threads(
    serve: Callable[..., BareServer],
) -> None:
    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        start_response("200 OK", [])
        return [b"x" * (1 << 20 if environ["PATH_INFO"] == "/large" else 1)]

    one = serve(application)
    one.server._server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    threads = one.server._server.adj.threads
    with contextlib.ExitStack() as held:
        for _ in range(threads + 5):
            connection = held.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", one.port))
            connection.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3)
        # One after the other: the first may be answered before the others' second requests.
        for _ in range(threads):
            assert requests.get(f"http://127.0.0.1:{one.port}/", timeout=5).content == b"x"


def test_a_connection_without_requests_for_two_minutes_is_closed(
    serve: Callable[..., BareServer],
) -> None:
    one = serve(lambda *_: [])
    adjustments = one.server._server.adj
    assert adjustments.channel_timeout <= 120
    adjustments.channel_timeout = 0.2
    for sent in (b"", b"GET / HTTP/1.1\r\nX-"):
        with socket.create_connection(("127.0.0.1", one.port), 5) as connection:
            connection.sendall(sent)
            assert received(connection, 5) == b""


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("channel_class", [channel.DirectChannel, channel.Channel])
def test_no_probe_of_a_half_closed_client_lands_inside_an_event(
    serve: Callable[..., BareServer],
    monkeypatch: pytest.MonkeyPatch,
    channel_class: type[channel.Channel],
    version: str,
) -> None:
    monkeypatch.setattr(channel, "ASK_AT", tuple(step / 2000 for step in range(20_000)))
    events = [b"data: %d\n\n" % number for number in range(3000)]

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        time.sleep(0.05)  # asked before the head, where that can be
        start_response("200 OK", [("Content-Type", "text/event-stream; charset=utf-8")])
        for event in events:
            yield event
            if event.endswith(b"0\n\n"):
                time.sleep(0.0005)

    one = serve(application, channel_class)
    with ThreadPoolExecutor(4) as pool:
        for data in pool.map(lambda _: half_closed(one.port, version), range(8)):
            assert (CONTINUE in data) is (version == "1.1")
            (answer,) = answers(data)
            assert answer.body.replace(channel.COMMENT, b"") == b"".join(events)
            asked = answer.body != b"".join(events)
            assert asked is (version == "1.1")  # HTTP/1.0 was given up before the head


@pytest.mark.parametrize("channel_class", [channel.DirectChannel, channel.Channel])
def test_no_half_closed_client_is_probed_while_the_head_or_the_end_is_sent(
    serve: Callable[..., BareServer],
    monkeypatch: pytest.MonkeyPatch,
    channel_class: type[channel.Channel],
) -> None:
    seen: list[bytes | None] = []
    for name in ("write_soon", "send_now"):
        original = getattr(channel.DirectChannel, name)

        def send(self: Any, data: bytes, original: Any = original) -> Any:
            if data.startswith(b"HTTP/1.1 200") or data == b"0\r\n\r\n":
                seen.append(self.question)
            return original(self, data)

        owner = channel.Channel if name == "write_soon" else channel.DirectChannel
        monkeypatch.setattr(owner, name, send)

    def application(_: Any, start_response: Callable[..., Any]) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        yield b"data: 1\n\n"
        yield b"data: 2\n\n"

    assert half_closed(serve(application, channel_class).port, "1.1")
    assert seen
    assert set(seen) == {b""}


def half_closed(port: int, version: str) -> bytes:
    """All that comes for a request after which nothing more is sent."""
    with connect(port) as connection:
        connection.sendall(request("GET", "/", version=version))
        connection.shutdown(socket.SHUT_WR)
        return received(connection, 20)


def test_a_disconnect_during_a_rejection_logs_no_traceback(
    serve: Callable[..., BareServer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    answered = threading.Event()

    def gone(*_: object) -> None:
        answered.set()
        raise ClientDisconnected

    monkeypatch.setattr(channel.BadRequest, "write", gone)
    one = serve(lambda *_: [])
    with connect(one.port) as connection:
        connection.sendall(b"no HTTP\r\n\r\n")
        assert answered.wait(5)
        assert received(connection) == b""
    assert not [record for record in caplog.records if record.exc_info]


# -- answers that come before the request is whole


def test_a_rejected_clients_bytes_are_read_for_a_limited_time(
    serve: Callable[..., BareServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert channel.LINGER <= 5
    assert channel.LINGER_BYTES <= 64 << 20
    one = serve(lambda *_: [])
    with connect(one.port) as connection:
        connection.sendall(b"no HTTP\r\n\r\n")
        assert received(connection).startswith(b"HTTP/1.0 400 ")
        with pytest.raises(ConnectionError):
            connection.sendall(b" " * 2 * channel.LINGER_BYTES)
    monkeypatch.setattr(channel, "LINGER", 0.2)
    with connect(one.port) as connection:
        connection.sendall(b"no HTTP\r\n\r\n")
        assert received(connection).startswith(b"HTTP/1.0 400 ")
        until(lambda: not one.server._server.active_channels, 3, what="the end of the connection")


# -- the clock


@pytest.mark.parametrize("jump", [-7200.0, 7200.0])
def test_a_jump_of_the_clock_ends_no_stream_and_closes_no_connection(
    serve: Callable[..., BareServer], monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """As when a laptop wakes, or its clock is set."""
    go_on = threading.Event()

    def application(_: Any, start_response: Callable[..., Any]) -> Iterator[bytes]:
        start_response("200 OK", [])
        for _ in range(40):
            yield b"x" * 65536
        assert go_on.wait(10)
        yield b"the end"

    one = serve(application)
    now = time.time
    with socket.socket() as slow, connect(one.port) as idle:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", one.port))
        slow.sendall(request("GET", "/"))
        assert slow.recv(1)
        monkeypatch.setattr(time, "time", lambda: now() + jump)
        time.sleep(1.2)  # longer than any look at the connections is away
        go_on.set()
        assert received(slow).endswith(b"the end\r\n0\r\n\r\n")
        idle.sendall(request("GET", "/"))
        assert received(idle).endswith(b"the end\r\n0\r\n\r\n")


@pytest.mark.parametrize("jump", [-7200.0, 7200.0])
def test_after_a_jump_of_the_clock_idle_connections_are_still_closed_in_time(
    serve: Callable[..., BareServer], monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    one = serve(lambda *_: [])
    one.server._server.adj.channel_timeout = 0.4
    with connect(one.port) as connection:
        until(lambda: one.server._server.active_channels, what="the connection")
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + jump)
        assert received(connection, 3) == b""


def test_tcp_keepalive_is_on_for_every_connection(serve: Callable[..., BareServer]) -> None:
    """One that was unplugged, or leaves long after the end of its sending, gives no other sign."""
    one = serve(lambda *_: [])
    with connect(one.port):
        (held,) = until(lambda: list(one.server._server.active_channels.values()))
        assert held.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert held.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) <= 10
