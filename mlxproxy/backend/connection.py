"""One connection to the backend: a request out, an answer read as its bytes arrive.

There is one request per connection: the head, then the body until its frame (a length, chunks) or
the connection ends. A backend may speak HTTP/1.0 or 1.1. Reading from the socket itself costs one
`recv` per event and delivers each event when it comes; `requests` and `urllib3` add 45 µs to each
(see `make bench`), or wait to fill a buffer.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping
from typing import Any

from mlxproxy.backend.protocol import Address
from mlxproxy.errors import BackendFailed

# Room for dozens of events. For 64 KB the allocator would request memory from the kernel, and
# return it, for each event.
RECV_BYTES = 1 << 14
HEAD_LIMIT = 1 << 16
LINE_LIMIT = 1 << 12  # of a line in a chunk's framing
CONNECT_SECONDS = 10.0
# The backend's listen backlog is 5: in a burst the kernel drops the SYN and tries again only after
# a second. A new attempt after 20 ms gets through as soon as the backend has accepted the others.
CONNECT_RETRY_SECONDS = 0.02
NO_HEADERS: Mapping[str, str] = {}

_HEAD_END = re.compile(rb"\r?\n\r?\n")
_STATUS = re.compile(r"HTTP/1\.[01] ([1-5]\d\d)(?: |$)", re.ASCII)
_LENGTH = re.compile(r"\d{1,18}", re.ASCII)
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?", re.DOTALL)


class BrokenConnection(BackendFailed):
    """The backend does not accept a connection, or violates HTTP on it.

    Attributes:
        what: what the backend does or did ("closed the connection without an answer").
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"The backend {what}. Try again; GET /health shows its state.")
        self.what = what


class ReadTimeout(Exception):
    """Nothing arrived for the interval that the connection was opened with."""


class Sized:
    """A body of a known length.

    Attributes:
        left: the bytes that are still to come.
    """

    def __init__(self, length: int) -> None:
        self.left = length

    @property
    def ended(self) -> bool:
        return not self.left

    def take(self, data: bytes) -> bytes:
        """Return the part of these bytes that belongs to the body."""
        body = data[: self.left]
        self.left -= len(body)
        return body


class Chunked:
    """A body in the chunked transfer coding (RFC 9112, section 7.1), decoded as it arrives.

    Attributes:
        ended: whether the last chunk and the trailers have arrived.
    """

    def __init__(self) -> None:
        self.ended = False
        self._left = 0  # bytes of the current chunk
        self._line = bytearray()  # a line that has not ended yet
        self._read_line = self._read_size

    def take(self, data: bytes) -> bytes:
        """Return the part of these bytes that belongs to the body, without the chunks' framing.

        Raises:
            BrokenConnection: they are not chunks.
        """
        body = []
        position = 0
        while position < len(data) and not self.ended:
            if self._left:
                piece = data[position : position + self._left]
                body.append(piece)
                position += len(piece)
                self._left -= len(piece)
                continue
            end = data.find(b"\n", position)
            self._line += data[position : end if end >= 0 else len(data)]
            if len(self._line) > LINE_LIMIT:
                raise BrokenConnection("sent an endless line between two chunks")
            if end < 0:
                break
            position = end + 1
            line = bytes(self._line).removesuffix(b"\r")
            self._line.clear()
            self._read_line(line)
        return b"".join(body)

    def _read_size(self, line: bytes) -> None:
        match = _CHUNK_SIZE.fullmatch(line)
        if match is None:
            raise BrokenConnection("sent a chunk without a size")
        self._left = int(match[1], 16)
        self._read_line = self._read_end_of_chunk if self._left else self._read_trailer

    def _read_end_of_chunk(self, line: bytes) -> None:
        if line:
            raise BrokenConnection("sent a chunk longer than its stated size")
        self._read_line = self._read_size

    def _read_trailer(self, line: bytes) -> None:
        self.ended = not line


class BackendConnection:
    """A connection to a backend.

    Args:
        address: where the backend answers.
        interval: seconds of silence after which a read or a write raises :class:`ReadTimeout`.
        lets_go: whether the backend, once our side is shut down, ends the request and then closes
            the connection; otherwise nobody can tell when the request's place is free.
        connect_seconds: how long to wait for the backend to accept; None: CONNECT_SECONDS.

    Raises:
        BrokenConnection: nothing accepts connections there.
    """

    def __init__(
        self,
        address: Address,
        interval: float,
        lets_go: bool = False,
        connect_seconds: float | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._interval = interval
        self._pending = b""
        self._head = bytearray()  # what has arrived of it, after those of interim answers
        self._begin = self._searched = 0  # indexes: where it begins, where to look for its end
        self._frame: Sized | Chunked | None = None  # None: the body ends with the connection
        self._unsent = memoryview(b"")
        self._lets_go = lets_go
        self.status = 0
        self.headers: dict[str, str] = {}
        self._host = f"{address.host}:{address.port}"
        self._socket = _connect(address, connect_seconds or CONNECT_SECONDS)
        # The kernel's timeouts: Python's own cost a poll() before every recv().
        whole = int(interval)
        timeval = struct.pack("@ll", whole, int((interval - whole) * 1_000_000))
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        except OSError as error:  # macOS, where the backend has reset the connection already
            self._socket.close()
            raise BrokenConnection(f"closed the connection ({error.strerror or error})") from None

    def send(
        self,
        path: str,
        body: bytes | None,
        authorization: str = "",
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> None:
        """Take one request, which :meth:`read_head` sends before it waits.

        Args:
            body: JSON, for a POST; None for a GET.
            authorization: the value of that header; empty: none is sent.
            headers: others than those of every request; they can be sent as Latin-1.
        """
        method, about = "GET", "".join(f"{name}: {it}\r\n" for name, it in headers.items())
        if body is not None:
            about += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            method = "POST"
        if authorization:
            about += f"Authorization: {authorization}\r\n"
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n{about}\r\n"
        self._unsent = memoryview(head.encode("latin-1") + (body or b""))

    def read_head(self) -> None:
        """Wait for the status line and the headers (names in lower case).

        May be called again after a :class:`ReadTimeout`.

        Raises:
            ReadTimeout: the backend accepted nothing, or the head was not complete, within the
                interval.
            BrokenConnection: the connection ended before the head did, or the head is not HTTP.
        """
        try:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            self._unsent = memoryview(b"")  # an empty view would keep the whole body in memory
        except BlockingIOError:
            raise ReadTimeout from None
        except OSError as error:
            raise BrokenConnection(
                f"did not accept the request ({error.strerror or error})"
            ) from None
        head = self._head
        deadline = time.monotonic() + self._interval
        while True:
            if end := _HEAD_END.search(head, self._searched):
                if self._understand(bytes(head[self._begin : end.start()]).decode("latin-1")):
                    self._pending = bytes(head[end.end() :])
                    return
                self._begin = self._searched = end.end()
                continue
            if len(head) > HEAD_LIMIT:
                raise BrokenConnection("sent an endless head")
            self._searched = max(self._begin, len(head) - 3)
            if time.monotonic() > deadline:
                raise ReadTimeout
            data = self._recv()
            if not data:
                raise BrokenConnection("closed the connection without an answer")
            head += data

    def _understand(self, head: str) -> bool:
        """Set the status, the headers and the body's framing; return whether the head is that of
        the answer, not of an interim answer (1xx)."""
        first, *lines = head.split("\n")
        match = _STATUS.match(first.removesuffix("\r"))
        if match is None:
            raise BrokenConnection("does not speak HTTP")
        self.status = int(match[1])
        if self.status == 101:
            raise BrokenConnection("switched to a protocol that was not requested")
        if self.status < 200:
            return False
        for line in lines:
            name, _, value = line.partition(":")
            name, value = name.strip().lower(), value.strip()
            known = self.headers.get(name, value)
            self.headers[name] = value if value == known else f"{known}, {value}"
        coding = self.headers.get("transfer-encoding")
        length = self.headers.get("content-length")
        if self.status in (204, 304):
            self._frame = Sized(0)
        elif coding is not None:
            if coding.lower() != "chunked":
                raise BrokenConnection("sent an answer in a transfer coding that was not requested")
            self._frame = Chunked()
        elif length is not None:
            if _LENGTH.fullmatch(length) is None:
                raise BrokenConnection("sent an answer with an invalid Content-Length")
            self._frame = Sized(int(length))
        return True

    @property
    def whole(self) -> bool:
        """Whether the body has reached the end that the head announced, if it announced one."""
        return self._frame is None or self._frame.ended

    def read(self) -> bytes:
        """Return what has arrived of the body; ``b""`` at its end, or once the backend has closed
        the connection.

        Raises:
            ReadTimeout: nothing arrived for the interval.
            BrokenConnection: the body should consist of chunks, but does not.
        """
        if self._frame is not None:
            return self._framed(self._frame)
        if self._pending:
            data, self._pending = self._pending, b""
            return data
        return self._recv()

    def read_rest(self, limit: int, seconds: float) -> bytes:
        """Return the body's first `limit` bytes, or as many of them as arrive in that time.

        Raises:
            BrokenConnection: see :meth:`read`.
        """
        body = bytearray()
        deadline = time.monotonic() + seconds
        with contextlib.suppress(ReadTimeout):
            while len(body) < limit and time.monotonic() < deadline and (data := self.read()):
                body += data
        return bytes(body[:limit])

    def _framed(self, frame: Sized | Chunked) -> bytes:
        deadline = time.monotonic() + self._interval
        while not frame.ended:
            data, self._pending = self._pending or self._recv(), b""
            if not data:
                break
            if body := frame.take(data):
                return body
            if time.monotonic() > deadline:  # only framing arrives, without content
                raise ReadTimeout
        return b""

    def _recv(self) -> bytes:
        try:
            return self._socket.recv(RECV_BYTES)
        except BlockingIOError:
            raise ReadTimeout from None
        except OSError:
            return b""  # reset: treated as an end; only `data: [DONE]` proves a whole answer

    def abort(self, backend_lives: bool = True) -> None:
        """Abort the request, from any thread, without waiting.

        A read in progress returns ``b""`` as soon as the backend has released the request, or
        immediately if the backend cannot tell or no longer lives.
        """
        how = socket.SHUT_WR if self._lets_go and backend_lives else socket.SHUT_RDWR
        with self._lock:
            if not self._closed:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(how)

    def wait_released(self, timeout: float) -> None:
        """Wait until the backend has released an aborted request, for at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self._lets_go and time.monotonic() < deadline:
            with contextlib.suppress(ReadTimeout):
                if not self._recv():
                    return

    def close(self) -> None:
        """Close the connection; the backend stops generating at its next write."""
        with self._lock:
            self._closed = True
            self._socket.close()


def _connect(address: Address, seconds: float) -> socket.socket:
    deadline = time.monotonic() + seconds
    wait = CONNECT_RETRY_SECONDS
    while True:
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            connection.settimeout(wait)
            connection.connect(address)
            connection.settimeout(None)
            return connection
        except TimeoutError:
            connection.close()
            wait = min(wait * 1.5, 0.5)
            if time.monotonic() > deadline:
                raise BrokenConnection("does not accept connections") from None
        except OSError as error:
            connection.close()
            raise BrokenConnection(
                f"does not accept connections ({error.strerror or error})"
            ) from None


def parsed(data: bytes) -> Any:
    """Return the value of JSON that the backend sent.

    Raises:
        ValueError: it is not JSON, or is nested too deeply to be read.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
