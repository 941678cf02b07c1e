"""Parsing of what a connection sends into requests: the head, the body's length, the body.

Everything here runs on the one thread that reads for all clients. So each byte costs a fixed amount
of work, no matter in what pieces it arrives. A request that two servers in a row could interpret
differently is rejected.
"""

from __future__ import annotations

import string
from http import HTTPStatus
from typing import Any

from waitress.adjustments import Adjustments
from waitress.buffers import OverflowableBuffer
from waitress.parser import HTTPRequestParser, ParsingError, split_uri
from waitress.receiver import FixedStreamReceiver

from mlxproxy.server import head
from mlxproxy.server.head import Malformed

FRAMING = 64 << 10  # bytes of chunk frames beyond those of the body
LONGEST_LINE = 1024  # bytes of a line between chunks, or of a trailer
HEX = string.hexdigits.encode()


class Refusal:
    """An error in the form in which waitress passes it to the task that answers."""

    def __init__(self, status: int, reason: str) -> None:
        self.code = status
        self.reason = HTTPStatus(status).phrase
        self.body = reason


class Until:
    """Bytes up to a marker; each byte that arrives is searched only once.

    Args:
        marker: the bytes that end it.
        limit: the most bytes it may have, including the marker.
    """

    def __init__(self, marker: bytes, limit: int) -> None:
        self._marker = marker
        self._limit = limit
        self._data = bytearray()

    def take(self, data: bytes, start: int = 0) -> tuple[int, bytes | None]:
        """Return how many bytes from `start` on belong to it, and all its bytes once complete.

        Raises:
            OverflowError: it is longer than the limit.
        """
        held = len(self._data)
        if not held:  # usually it arrives in one piece
            end = data.find(self._marker, start, start + self._limit) + len(self._marker)
            if end >= len(self._marker):
                return end - start, data[start:end]
        self._data += data[start : start + self._limit + 1 - held]
        end = self._data.find(self._marker, max(0, held + 1 - len(self._marker)))
        if end < 0:
            if len(self._data) > self._limit:
                raise OverflowError
            return len(self._data) - held, None
        end += len(self._marker)
        if end > self._limit:
            raise OverflowError
        whole = bytes(self._data[:end])
        self._data.clear()
        return end - held, whole


class Chunks:
    """A chunked body (RFC 9112, 7.1), decoded as it arrives; extensions and trailers are dropped.

    Args:
        buffer: receives the body.
    """

    error = None

    def __init__(self, buffer: OverflowableBuffer) -> None:
        self.completed = False
        self._buffer = buffer
        self._line = Until(b"\r\n", LONGEST_LINE)
        self._left = 0  # bytes of the chunk that are still to come
        self._expected = "size"  # or the "end" of a chunk, or a "trailer"

    def __len__(self) -> int:
        return self._buffer.__len__()  # type: ignore[no-any-return]

    def received(self, data: bytes) -> int:
        """Take the bytes that belong to the body; return how many there are.

        Raises:
            Malformed: they are not valid chunks.
        """
        at = 0
        while at < len(data) and not self.completed:
            if self._left:
                piece = data[at : at + self._left]
                self._buffer.append(piece)
                self._left -= len(piece)
                at += len(piece)
                continue
            try:
                taken, line = self._line.take(data, at)
            except OverflowError:
                raise Malformed("a line between its chunks is too long") from None
            at += taken
            if line is not None:
                self._control(line[:-2])
        return at

    def _control(self, line: bytes) -> None:
        """Act on a line that is not part of the body."""
        if not head.consists_of(line, head.TEXT):
            raise Malformed("there is a control character between its chunks")
        if self._expected == "size":
            size, _, _extension = line.partition(b";")
            if not 0 < len(size) <= 16 or not head.consists_of(size, HEX):
                raise Malformed("the size of a chunk is not a number")
            self._left = int(size, 16)
            self._expected = "end" if self._left else "trailer"
        elif self._expected == "end":
            if line:
                raise Malformed("a chunk is longer than its stated size")
            self._expected = "size"
        else:
            self.completed = not line

    def getfile(self) -> Any:
        return self._buffer.getfile()

    def getbuf(self) -> OverflowableBuffer:
        return self._buffer


class Parser(HTTPRequestParser):
    """One request as it arrives: waitress's parser, except for everything that reads bytes."""

    completed = False
    # Attributes that the answer to a rejected head reads.
    command = path = request_uri = query = fragment = proxy_scheme = proxy_netloc = ""
    url_scheme = "http"

    def __init__(self, adj: Adjustments) -> None:
        super().__init__(adj)
        self.error: Refusal | None = None
        self.body_rcv: FixedStreamReceiver | Chunks | None = None
        self._head = Until(b"\r\n\r\n", adj.max_request_header_size)
        self._begun = False

    def received(self, data: bytes) -> int:
        """Take the bytes that belong to the request; return how many there are."""
        if self.completed:
            return 0
        try:
            taken = self._head_received(data) if self.body_rcv is None else self._body(data)
        except Malformed as why:
            self._refuse(why.status, str(why))
        except OSError as why:
            reason = why.strerror or "there is no folder for temporary files"
            self._refuse(507, f"its body cannot be stored ({reason})")
        else:
            return taken
        return len(data)  # whatever follows a rejected request is not read

    def _refuse(self, status: int, reason: str) -> None:
        self.error = Refusal(status, reason)
        self.completed = True

    def _head_received(self, data: bytes) -> int:
        skipped = 0
        if not self._begun:  # empty lines before a request are allowed (RFC 9112, 2.2)
            skipped = len(data) - len(data.lstrip(b"\r\n"))
            self._begun = skipped < len(data)
        try:
            taken, whole = self._head.take(data, skipped)
        except OverflowError:
            raise Malformed("its head is too long", 431) from None
        if whole is not None:
            self.headers_finished = True
            self.parse_header(whole)
            self.completed = self.body_rcv is None
        return skipped + taken

    def parse_header(self, header_plus: bytes) -> None:
        """Parse the head.

        Raises:
            Malformed: it is not a valid head, or states the body's length twice, or in a way that
                is not supported.
        """
        self.command, target, self.version, self.headers = head.read(header_plus)
        self.request_uri = target.decode("latin-1")
        try:
            (self.proxy_scheme, self.proxy_netloc, self.path, self.query, self.fragment) = (
                split_uri(target)
            )
        except (ParsingError, ValueError):
            raise Malformed("its target is not a URL") from None
        connection = self.headers.get("CONNECTION", "").lower()
        if self.version == "1.1":
            self.expect_continue = self.headers.get("EXPECT", "").lower() == "100-continue"
            self.connection_close = connection == "close"
        else:
            self.connection_close = connection != "keep-alive"
        self._frame(self.headers.pop("TRANSFER_ENCODING", None), self.headers.get("CONTENT_LENGTH"))

    def _frame(self, coding: str | None, length: str | None) -> None:
        """Determine how long the body is (RFC 9112, 6.3)."""
        if coding is not None:
            if self.version != "1.1":
                raise Malformed("only HTTP/1.1 has a Transfer-Encoding")
            if length is not None:
                raise Malformed("the length of its body is stated twice")
            if coding.lower() != "chunked":
                raise Malformed("its Transfer-Encoding is not chunked", 501)
            self.chunked = True
            self.body_rcv = Chunks(OverflowableBuffer(self.adj.inbuf_overflow))
        elif length is not None:
            if not (length.isascii() and length.isdigit()):
                raise Malformed("its Content-Length is not a number")
            if len(length) > 18 or int(length) >= self.adj.max_request_body_size:
                raise Malformed("its body is too large", 413)
            self.content_length = int(length)
            if self.content_length:
                buffer = OverflowableBuffer(self.adj.inbuf_overflow)
                self.body_rcv = FixedStreamReceiver(self.content_length, buffer)

    def _body(self, data: bytes) -> int:
        receiver = self.body_rcv
        assert receiver is not None
        taken: int = receiver.received(data)
        self.body_bytes_received += taken
        if self.chunked:
            body = len(receiver)
            if body >= self.adj.max_request_body_size:
                raise Malformed("its body is too large", 413)
            if self.body_bytes_received - body > FRAMING + body // 16:
                raise Malformed("its chunks have more framing than content")
            if receiver.completed:
                self.headers["CONTENT_LENGTH"] = str(body)  # as if it had not been chunked
        self.completed = receiver.completed
        return taken
