"""What one connection to the backend makes of the bytes that come: heads, and framed bodies."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlxproxy.backend import connection
from mlxproxy.backend.connection import BackendConnection, ReadTimeout
from mlxproxy.backend.protocol import Address
from mlxproxy.errors import BackendFailed

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
INTERVAL = 0.05


class Wire:
    """The backend's end of connections, one at a time."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._other: socket.socket | None = None
        self._upstream: BackendConnection | None = None

    def __call__(self, answer: bytes, *, stays_open: bool = False) -> BackendConnection:
        """A connection on which this answer has come."""
        self.close()
        one = self._upstream = BackendConnection(Address(*self._listener.getsockname()), INTERVAL)
        self._other, _ = self._listener.accept()
        self._other.sendall(answer)
        if not stays_open:
            self._other.shutdown(socket.SHUT_WR)
        return one

    def received(self) -> bytes:
        """What the backend has got."""
        assert self._other is not None
        return self._other.recv(1 << 16)

    def close(self) -> None:
        if self._other is not None and self._upstream is not None:
            self._other.close()
            self._upstream.close()

    def end(self) -> None:
        self.close()
        self._listener.close()


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.end()


@pytest.fixture(params=[1, 7, connection.RECV_BYTES])
def recv_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many bytes come at once, at most."""
    monkeypatch.setattr(connection, "RECV_BYTES", request.param)
    return int(request.param)


def body_of(answer: BackendConnection) -> bytes:
    answer.read_head()
    body = b""
    while data := answer.read():
        body += data
    return body


def test_a_request_that_was_sent_is_kept_no_longer(wire: Wire) -> None:
    """An answer may take hours, and a body 32 MiB."""
    answer = wire(b"HTTP/1.0 200 OK\r\n\r\n")
    answer.send("/", b"x" * 1000)
    answer.read_head()
    assert sum(len(it.obj) for it in vars(answer).values() if isinstance(it, memoryview)) == 0


# -- heads


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200\r\n\r\n",
        b"HTTP/1.0 200 OK\n\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\nContent-Length: 3\r\n\r\n" * 9
        + b"HTTP/1.0 200 OK\r\n\r\n",
    ],
)
def test_a_head_is_understood(wire: Wire, head: bytes, recv_bytes: int) -> None:
    answer = wire(head + b"\n\nbody")
    assert body_of(answer) == b"\n\nbody"
    assert answer.status == 200
    assert answer.whole


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"HTTP/1.0 200 OK\r\n",
        b"HTTP/1.0\r\n\r\n",
        b"HTTP/1.0 OK\r\n\r\n",
        b"HTTP/1.0 -200 OK\r\n\r\n",
        b"HTTP/1.0 2_0 OK\r\n\r\n",
        b"HTTP/1.0 200OK\r\n\r\n",
        b"HTTP/1.0 999 OK\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"\r\n\r\n",
        b"\xff\xfe\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 9000,
        OK + b"X: " + b"x" * 200_000,
        OK + b"Content-Length: many\r\n\r\n",
        OK + b"Content-Length: -5\r\n\r\n",
        OK + b"Content-Length: +5\r\n\r\n",
        OK + b"Content-Length: 1_0\r\n\r\n",
        OK + b"Content-Length: \xb2\r\n\r\n",
        OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    ],
)
def test_what_is_no_head_is_the_backends_failure(wire: Wire, head: bytes) -> None:
    with pytest.raises(BackendFailed):
        wire(head).read_head()


class CountedPattern:
    """A pattern that counts the bytes it is given to search."""

    def __init__(self, pattern: re.Pattern[bytes]) -> None:
        self.pattern, self.work = pattern, 0

    def search(self, data: bytes, start: int) -> Any:
        self.work += len(data) - start
        return self.pattern.search(data, start)


def test_a_head_that_comes_byte_by_byte_is_searched_once(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "RECV_BYTES", 1)
    pattern = CountedPattern(connection._HEAD_END)
    monkeypatch.setattr(connection, "_HEAD_END", pattern)
    head = OK + b"X: y\r\n" * 2000 + b"\r\n"
    answer = wire(head)
    while answer.status == 0:
        with contextlib.suppress(ReadTimeout):  # on a slow machine
            answer.read_head()
    assert pattern.work <= 4 * len(head) + 4


def test_a_head_that_trickles_is_a_silence_too(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or nobody would ask whether it stalls."""
    moments = iter(range(1000))
    monkeypatch.setattr(connection, "RECV_BYTES", 1)
    answer = wire(OK * 20 + b"\r\nbody")
    clock = SimpleNamespace(monotonic=lambda: next(moments) * INTERVAL / 9)
    monkeypatch.setattr(connection, "time", clock)
    for _ in range(3):
        with pytest.raises(ReadTimeout):
            answer.read_head()
    monkeypatch.undo()
    assert body_of(answer) == b"body"


def test_a_request_says_that_chunks_are_understood_and_that_no_other_follows(wire: Wire) -> None:
    """To a client of HTTP/1.0 no chunks are sent, whose end proves that an answer is whole."""
    for body, method in ((b"{}", b"POST"), (None, b"GET")):
        request = wire(OK + b"\r\n")
        request.send("/v1/x", body)
        request.read_head()
        head, _, sent = wire.received().partition(b"\r\n\r\n")
        first, *headers = head.split(b"\r\n")
        assert first == method + b" /v1/x HTTP/1.1"
        assert b"Connection: close" in headers
        assert (b"Content-Length: 2" in headers) == (body is not None)
        assert sent == (body or b"")


# -- bodies with an end of their own


@pytest.mark.parametrize("status", [204, 304])
def test_some_answers_have_no_body_whatever_follows(wire: Wire, status: int) -> None:
    assert body_of(wire(b"HTTP/1.1 %d X\r\n\r\n" % status, stays_open=True)) == b""


@pytest.mark.parametrize("stays_open", [False, True])
def test_a_body_of_a_known_length_ends_there(wire: Wire, recv_bytes: int, stays_open: bool) -> None:
    answer = wire(OK + b"Content-Length: 4\r\n\r\nbodyHTTP/1.1 200 OK", stays_open=stays_open)
    assert body_of(answer) == b"body"
    assert answer.whole


def test_a_body_that_is_cut_off_is_not_whole(wire: Wire) -> None:
    answer = wire(OK + b"Content-Length: 5\r\n\r\nbody")
    assert body_of(answer) == b"body"
    assert not answer.whole


extensions = st.sampled_from([b"", b";a=b", b' ; q="x"', b"  "])


@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=40), extensions), max_size=8),
    st.lists(st.sampled_from([b"X: y", b"Content-MD5: abc"]), max_size=2),
    st.integers(1, 60),
    st.integers(0, 600),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_chunks_are_taken_from_their_frames_and_are_whole_only_with_the_last(
    wire: Wire,
    chunks: list[tuple[bytes, bytes]],
    trailers: list[bytes],
    at_once: int,
    length: int,
) -> None:
    body = b"".join(data for data, _ in chunks)
    sent = b"".join(b"%x%b\r\n%b\r\n" % (len(data), more, data) for data, more in chunks)
    sent += b"0\r\n" + b"".join(line + b"\r\n" for line in trailers) + b"\r\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "RECV_BYTES", at_once)
        answer = wire(CHUNKED + sent + b"later", stays_open=True)
        assert body_of(answer) == body
        assert answer.whole
        part = sent[: length % len(sent)]
        answer = wire(CHUNKED + part)
        assert body.startswith(body_of(answer))
        assert not answer.whole


@pytest.mark.parametrize(
    "body",
    [
        b"\r\n",
        b"many\r\nbody",
        b"-4\r\nbody\r\n",
        b"0x4\r\nbody\r\n",
        b"f" * 16 + b"\r\nbody",
        b"2\r\nbody\r\n0\r\n\r\n",
        b"4;" + b"x" * 10_000,
        b"data: [DONE]\n\n",
    ],
)
def test_what_are_no_chunks_is_the_backends_failure(
    wire: Wire, body: bytes, recv_bytes: int
) -> None:
    with pytest.raises(BackendFailed):
        body_of(wire(CHUNKED + body, stays_open=True))


def test_frames_without_a_body_are_a_silence(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter(range(100_000))
    monkeypatch.setattr(connection, "RECV_BYTES", 1)
    answer = wire(CHUNKED + b"0\r\n" + b"X: y\r\n" * 20 + b"\r\n")
    answer.read_head()
    clock = SimpleNamespace(monotonic=lambda: next(moments) * INTERVAL / 9)
    monkeypatch.setattr(connection, "time", clock)
    for _ in range(3):
        with pytest.raises(ReadTimeout):
            answer.read()
    monkeypatch.undo()
    assert answer.read() == b""
    assert answer.whole


def test_the_rest_is_read_for_a_while_only(wire: Wire) -> None:
    def rest(body: bytes, limit: int) -> bytes:
        answer = wire(OK + b"\r\n" + body, stays_open=True)
        answer.read_head()
        return answer.read_rest(limit, 5 * INTERVAL)

    assert rest(b"body", 100) == b"body"
    assert rest(b"body" * 1000, 100) == b"body" * 25


# -- whatever comes

pieces = st.sampled_from(
    [OK, CHUNKED, b"HTTP/1.0 200\n\n", b"Content-Length: 4\r\n", b"\r\n", b"4\r\n", b"body\r\n"]
)


@given(st.lists(pieces | st.binary(max_size=30)).map(b"".join), st.integers(1, 60))
@example(b"HTTP/1.1 100 \r\n\r\n" * 3, 5)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_bytes_raise_anything_else(wire: Wire, sent: bytes, at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "RECV_BYTES", at_once)
        with contextlib.suppress(BackendFailed):
            body_of(wire(sent))


# -- JSON


@pytest.mark.parametrize(
    "data", [b"", b"[" * 200_000, b'{"a":' * 200_000, b"\xff", b"9" * 5000, b"{} {}"]
)
def test_json_that_cannot_be_read_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        connection.parsed(data)


# -- the end of a request that its client has left


@pytest.mark.parametrize("lets_go", [True, False])
def test_an_aborted_request_ends_when_the_backend_has_let_go_of_it(lets_go: bool) -> None:
    """A backend that cannot tell is left at once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        request = BackendConnection(Address(*listener.getsockname()), INTERVAL, lets_go=lets_go)
        other, _ = listener.accept()
        with other:
            request.abort()
            assert other.recv(1) == b"", "the backend sees the end"
            if not lets_go:
                assert request.read() == b""
                request.wait_released(60)
                return
            with pytest.raises(ReadTimeout):
                request.read()
            other.sendall(b"the last token")
        request.wait_released(60)
        assert request.read() == b""
        request.close()


def test_nobody_waits_for_a_backend_that_lives_no_more() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        request = BackendConnection(Address(*listener.getsockname()), INTERVAL, lets_go=True)
        with listener.accept()[0]:
            request.abort(backend_lives=False)
            assert request.read() == b""
        request.close()
