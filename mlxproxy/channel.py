"""waitress's channel and task, with what a stream needs: a client's end told at once, and a token
sent at once.

The direct path below is the one piece of our own between waitress and the socket. waitress copies
each piece of a body into a buffer, then flushes the buffer with four more calls and its locks; a
chunk is sent here from the request's own thread, while nothing is buffered. With 32 streams and two
cores that takes the processor time of an event from 2.25 to 1.7 times nginx's, and its time on the
way from 1.5 to 1.3 times (p50), from 1.4 to 1.15 times (p99). `DIRECT_SEND=false` is waitress's own
path, and the same tests pass over both.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from waitress.channel import ClientDisconnected, HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.task import ErrorTask, WSGITask
from waitress.utilities import BadRequest as BadFraming

from mlxproxy.access import SECURITY_HEADERS, request_id
from mlxproxy.errors import InternalError, InvalidRequest, ProxyError, RequestTooLarge
from mlxproxy.presence import Presence

log = logging.getLogger("mlxproxy.request")

FRAMING = 64 << 10  # bytes of chunk frames beyond those of the body
JOINED = 64 << 10  # bytes of a body that are worth a copy to go out with the head


class Parser(HTTPRequestParser):
    """waitress's parser, without what two servers in a row could read in two ways, and without
    bodies that cost the one thread that reads for everybody far more than their length."""

    completed = False

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # a URL or a number that Python does not take
            raise ParsingError(str(error)) from None
        # waitress takes the header away where it has understood it: in HTTP/1.1 alone.
        if "TRANSFER_ENCODING" in self.headers:
            raise ParsingError("only HTTP/1.1 has a Transfer-Encoding")
        if self.chunked and "CONTENT_LENGTH" in self.headers:
            raise ParsingError("the length of the body is given twice")

    def received(self, data: bytes) -> int:
        taken: int = super().received(data)
        if self.chunked and not self.completed:
            body = len(self.body_rcv)
            if self.body_bytes_received - body > FRAMING + body // 16:
                self.error = BadFraming("its chunks are more frame than body")
                self.completed = True
        return taken


class Request(WSGITask):
    """A request with its client's presence in the environment."""

    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        presence = environ["mlxproxy.presence"] = Presence()
        self.channel.presence = presence
        if not self.channel.connected:
            presence.leave()
        return environ

    def finish(self) -> None:
        super().finish()
        channel = self.channel
        backlog = channel.total_outbufs_len > channel.adj.outbuf_high_watermark
        if backlog and len(channel.requests) > 1:
            # It asks on without reading: its next request would wait for it, on a thread.
            self.close_on_finish = True


class BadRequest(ErrorTask):
    """What waitress itself refuses (a broken head, a body too large), as the contract's error."""

    def execute(self) -> None:
        refusal = self.request.error
        error: ProxyError
        if refusal.code == 413:
            error = RequestTooLarge("The body is larger than this proxy takes (MAX_BODY).")
        elif refusal.code == 500:
            error = InternalError("The request could not be answered; the proxy's log says why.")
        else:
            error = InvalidRequest(f"This is no HTTP request this server takes: {refusal.body}.")
        number = request_id(self.request.headers.get("X_REQUEST_ID", ""))
        client = self.channel.addr[0]
        log.info("id=%s client=%s status=%d refused=%s", number, client, refusal.code, error.code)
        self.response_headers += [("X-Request-Id", number), *SECURITY_HEADERS.items()]
        body = json.dumps(error.body()).encode()
        self.status = f"{refusal.code} {refusal.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Channel(HTTPChannel):
    """A client's connection, whose end is told at once.

    waitress reads nothing of a connection while its request runs; reading on
    (`channel_request_lookahead`) is how a client's leaving is seen while no byte flows.
    """

    parser_class = Parser
    task_class = Request
    error_task_class = BadRequest
    presence: Presence | None = None

    def send_continue(self) -> None:
        if self.request.completed:  # there is no body to go on with
            self.request.expect_continue = False
        else:
            super().send_continue()

    def handle_close(self) -> None:
        super().handle_close()
        # Only now: a request that begins meanwhile finds the connection ended, or is found here.
        if self.presence is not None:
            self.presence.leave()


class DirectRequest(Request):
    """A request whose body goes the short way: its beginning together with the head (one packet,
    one wake of the client), each further chunk as it comes."""

    wrote_header = False  # as in waitress, which has no types

    def write(self, data: bytes) -> None:
        joined = self.complete and self.has_body and 0 < len(data) <= JOINED
        if self.wrote_header or not joined:
            super().write(data)
        else:
            head: bytes = self.build_response_header()
            self.wrote_header = True
            if self.chunked_response:
                self.channel.send_chunk(data, head)
            else:
                if self.content_length is not None:
                    data = data[: self.content_length]
                    self.content_bytes_written += len(data)
                self.channel.send_now(head + data)
        if self.chunked_response:
            self.write = self.channel.send_chunk  # type: ignore[method-assign]


class DirectChannel(Channel):
    """A connection that takes bytes straight from the request's thread."""

    task_class = DirectRequest

    def send_chunk(self, data: bytes, head: bytes = b"") -> None:
        """Sends a piece of a chunked body; raises as :meth:`send_now` does."""
        self.send_now(b"%b%x\r\n%b\r\n" % (head, len(data), data))

    def send_now(self, data: bytes) -> None:
        """Sends bytes, at once unless something waits already.

        Raises:
            ClientDisconnected: the client has left.
        """
        sent = 0
        lock = self.outbuf_lock  # the I/O thread closes under it; `with` would take two calls more
        lock.acquire()
        try:
            if self.connected and not self.total_outbufs_len:
                try:
                    sent = self.socket.send(data)
                except BlockingIOError:
                    pass
                except OSError:
                    self.will_close = True
                    self.server.pull_trigger()
                    raise ClientDisconnected from None
                if sent < len(data):
                    self.last_activity = time.time()  # from here on the client is a slow one
        finally:
            lock.release()
        if sent < len(data):
            self.write_soon(data[sent:])
