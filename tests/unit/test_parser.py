"""How what a connection sends becomes requests: what is taken, what is refused, at what cost.

The work runs on the one thread that reads for all clients, so it must grow with the bytes and no
faster, whatever they are and in whatever pieces they come. It is counted here, not timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import waitress.parser
import waitress.receiver
from waitress.adjustments import Adjustments

from mlxproxy.server import parser
from mlxproxy.server.parser import Parser

LIMIT = 1 << 20
START = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"

# What grew with the square of its length once, or might: n bytes of each kind, good and broken.
SHAPES: dict[str, Callable[[int], bytes]] = {
    "digits in the target": lambda n: b"GET http://%b x HTTP/1.1\r\n\r\n" % (b"1" * n),
    "a target without a version": lambda n: b"GET http://%b/ \r\n\r\n" % (b"1" * n),
    "colons in the target": lambda n: b"GET %b HTTP/1.1\r\n\r\n" % (b":/" * (n // 2)),
    "slashes": lambda n: b"GET %b HTTP/1.1\r\n\r\n" % (b"/" * n),
    "percent signs": lambda n: b"GET /%b HTTP/1.1\r\n\r\n" % (b"%41%" * (n // 4)),
    "a query of many values": lambda n: b"GET /?%b HTTP/1.1\r\n\r\n" % (b"a&" * (n // 2)),
    "a long method": lambda n: b"%b / HTTP/1.1\r\n\r\n" % (b"A" * n),
    "spaces in the first line": lambda n: b"GET%b/ HTTP/1.1\r\n\r\n" % (b" " * n),
    "spaces in a value": lambda n: START + b"X: %b\x00\r\n\r\n" % (b" " * n),
    "spaces about a value": lambda n: START + b"X: %ba%b\r\n\r\n" % (b" " * n, b" " * n),
    "words in a value": lambda n: START + b"X: %b\x7f\r\n\r\n" % (b"a " * (n // 2)),
    "a long name": lambda n: START + b"%b\r\n\r\n" % (b"x" * n),
    "many fields": lambda n: START + b"A:\r\n" * (n // 4) + b"\r\n",
    "many lines that continue one": lambda n: START + b"X: a\r\n" + b" \r\n" * (n // 3) + b"\r\n",
    "a long length": lambda n: START + b"Content-Length: %b\r\n\r\n" % (b"9" * n),
    "many codings": lambda n: START + b"Transfer-Encoding: %b\r\n\r\n" % (b"a," * (n // 2)),
    "empty lines first": lambda n: b"\r\n" * (n // 2) + START + b"\r\n",
    "a head without end": lambda n: START + b"X: " + b"x" * n,
    "a body": lambda n: b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (n, b" " * n),
    "one chunk": lambda n: CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (n, b" " * n),
    "small chunks": lambda n: CHUNKED + b"6\r\n      \r\n" * (n // 11) + b"0\r\n\r\n",
    "extensions": lambda n: CHUNKED + b"1;%b\r\n" % (b"a=b;" * (n // 4)),
    "a quoted extension": lambda n: CHUNKED + b'1;a="%b\r\n' % (b"\\x" * (n // 2)),
    "trailers": lambda n: CHUNKED + b"0\r\n" + b"a: b\r\n" * (n // 6) + b"\r\n",
    "a trailer without end": lambda n: CHUNKED + b"0\r\n" + b"a" * n,
}


def read(data: bytes, piece: int | None = None) -> Parser:
    """A request that came in pieces of so many bytes, as waitress's channel hands them on."""
    request = Parser(Adjustments(max_request_body_size=LIMIT, max_request_header_size=64 << 10))
    for start in range(0, len(data), piece or len(data)):
        part = data[start : start + (piece or len(data))]
        while part and not request.completed:
            part = part[request.received(part) :]
    return request


class Forbidden:
    """A regular expression that nobody may use."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} of a pattern that backtracks")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("piece", [None, 1])
def test_no_byte_of_a_request_reaches_a_pattern_that_backtracks(
    monkeypatch: pytest.MonkeyPatch, shape: str, piece: int | None
) -> None:
    for module in (waitress.parser, waitress.receiver):
        for name in vars(module):
            if name.lower().endswith("_re"):
                monkeypatch.setattr(module, name, Forbidden())
    read(SHAPES[shape](2000), piece)


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each search of what was kept has gone through, and each that was added."""
    counts: list[int] = []

    class Counted(bytearray):
        def find(self, what: Any, start: Any = 0, *more: Any) -> int:
            counts.append(len(self) - int(start))
            return super().find(what, start, *more)

        def __iadd__(self, other: Any) -> Any:
            counts.append(len(other))
            return super().__iadd__(other)

    monkeypatch.setattr(parser, "bytearray", Counted, raising=False)
    return counts


def steps(call: Callable[[], object]) -> int:
    """How many instructions of Python's a call takes.

    The first such call of a process counts too few from Python 3.12 on: there, asking for the
    instructions of a function takes effect when the function is called the next time.
    """
    count = 0

    def tracer(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("piece", [None, 512, 1])
def test_twice_the_bytes_are_twice_the_work(
    searched: list[int], shape: str, piece: int | None
) -> None:
    work = []
    steps(lambda: read(SHAPES[shape](1500), piece))
    for size in (1500, 3000, 6000):
        searched.clear()
        data = SHAPES[shape](size)
        work.append(steps(lambda: read(data, piece)) + sum(searched))  # noqa: B023
    assert work[1] < 2.2 * work[0] + 500
    assert work[2] < 2.2 * work[1] + 500


# -- what is a request


def test_a_request_is_parsed_the_same_in_whatever_pieces_it_arrives() -> None:
    body = b"0123456789" * 300
    chunks = b"A;x=y\r\n0123456789\r\n" * 300 + b"0\r\nTrailer: x\r\n\r\n"
    head = b"\r\nPOST /v1/x%20y?a=b&c#d HTTP/1.1\r\nHost: localhost\r\nX-A: 1\r\nx-a:\t2 \r\n"
    for framing, sent in (
        (b"Content-Length: %d\r\n\r\n" % len(body), body),
        (b"Transfer-Encoding: Chunked\r\n\r\n", chunks),
    ):
        for piece in (None, 1, 2, 3, 7, 1000):
            request = read(head + framing + sent, piece)
            assert request.error is None
            assert request.completed
            assert (request.command, request.path) == ("POST", "/v1/x y")
            assert (request.query, request.fragment) == ("a=b&c", "d")
            assert request.headers["X_A"] == "1, 2"
            assert request.headers["CONTENT_LENGTH"] == str(len(body))
            assert "TRANSFER_ENCODING" not in request.headers
            assert request.get_body_stream().read() == body


@pytest.mark.parametrize(
    "sent",
    [START + b"\r\n", START + b"Content-Length: 2\r\n\r\n{}", CHUNKED + b"2\r\n{}\r\n0\r\n\r\n"],
)
def test_bytes_after_a_request_are_left_for_the_next(sent: bytes) -> None:
    request, both = Parser(Adjustments()), sent + sent
    while not request.completed:
        both = both[request.received(both) :]
    assert both == sent


@pytest.mark.parametrize(
    ("line", "close"),
    [
        (b"GET / HTTP/1.1\r\n", False),
        (b"GET / HTTP/1.1\r\nConnection: Close\r\n", True),
        (b"GET / HTTP/1.0\r\n", True),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n", False),
    ],
)
def test_a_connection_is_kept_open_as_its_http_version_says(line: bytes, close: bool) -> None:
    assert read(line + b"\r\n").connection_close is close


def test_header_names_with_an_underscore_are_not_taken_for_others() -> None:
    request = read(START + b"X_Api_Key: forged\r\nContent_Length: 5\r\n\r\n")
    assert request.headers == {"HOST": "localhost"}
    assert request.completed


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\nHost: localhost\n\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: a\rb\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: a\x0bb\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: a\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX : a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n: a\r\n\r\n", 400),
        (b"GET /a b HTTP/1.1\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1 \r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 400),
        (b"get / HTTP/1.1\r\n\r\n", 400),
        (b"%b / HTTP/1.1\r\n\r\n" % (b"G" * 33), 501),
        (START + b"X: y\r\n" * 200 + b"\r\n", 431),
        (START + b"X: " + b"y" * (64 << 10) + b"\r\n\r\n", 431),
        (START + b"Content-Length: \xb2\r\n\r\n", 400),
        (START + b"Content-Length: %d\r\n\r\n" % LIMIT, 413),
        (START + b"Transfer-Encoding: chunked, chunked\r\n\r\n", 501),
        (CHUNKED + b"+2\r\n{}\r\n0\r\n\r\n", 400),
        (CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n", 400),
        (CHUNKED + b" 2\r\n{}\r\n0\r\n\r\n", 400),
        (CHUNKED + b"\r\n2\r\n{}\r\n0\r\n\r\n", 400),
        (CHUNKED + b"2\n{}\r\n0\r\n\r\n", 400),
        (CHUNKED + b"2;a\x00\r\n{}\r\n0\r\n\r\n", 400),
        (CHUNKED + b"2\r\n{}}\r\n0\r\n\r\n", 400),
        (CHUNKED + b"f" * 17 + b"\r\n", 400),
        (CHUNKED + b"2\r\n{}\r\n0\r\na\nb\r\n\r\n", 400),
        (CHUNKED + b"%x\r\n" % LIMIT + b" " * LIMIT, 413),
    ],
)
def test_malformed_requests_are_rejected(sent: bytes, status: int) -> None:
    for piece in (None, 4000, 1) if len(sent) < 70_000 else (None, 4000):
        request = read(sent, piece)
        assert request.error is not None
        assert request.error.code == status, request.error.body
        assert request.completed
