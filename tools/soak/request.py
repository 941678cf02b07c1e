"""One request of a client, with a strict reader."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
import time

from tools.soak.ledger import Json, Seen


class Request:
    """One request on a connection of its own, read strictly and to its end, or abandoned.

    Args:
        leave: seconds after which the client disconnects, wherever the answer is; None: never.
        slow: seconds for which it reads hardly anything.
        abrupt: whether it disconnects with a reset.
    """

    def __init__(
        self,
        port: int,
        seen: Seen,
        leave: float | None = None,
        slow: float = 0.0,
        abrupt: bool = False,
    ) -> None:
        self.seen = seen
        self._leave = leave
        self._slow = slow
        self._abrupt = abrupt
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._answer: http.client.HTTPResponse | None = None
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if slow:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    def send(self, method: str, path: str, body: Json | None = None) -> Request:
        """Connect and send."""
        raw = None if body is None else json.dumps(body).encode()
        try:
            self._socket.settimeout(self.seen.limit)
            self._socket.connect(("127.0.0.1", self._connection.port))
            self._connection.sock = self._socket
            self._connection.request(method, path, raw, {"X-Request-Id": self.seen.request_id})
        except OSError as error:
            self.seen.trouble = f"not taken: {error!r}"
        return self

    def read(self) -> Seen:
        """Read the answer to its end, and close."""
        seen = self.seen
        try:
            if not seen.trouble:
                self._read(seen)
        except TimeoutError:
            if self._leave is not None:
                seen.left = True
            else:
                seen.trouble = f"no end within {seen.limit:g} s, {len(seen.body)} bytes came"
        except (OSError, http.client.HTTPException) as error:
            seen.trouble = f"{error!r} after {len(seen.body)} bytes: {seen.body[-120:]!r}"
        finally:
            seen.seconds = time.monotonic() - seen.begun
            self._close()
        return seen

    def _read(self, seen: Seen) -> None:
        self._arm()
        answer = self._answer = self._connection.getresponse()
        seen.status = answer.status
        seen.headers = {name.lower(): value for name, value in answer.getheaders()}
        while data := self._next(answer):
            seen.body += data
        # http.client raises if chunks end without a terminator, but not if a body is too short.
        seen.ended = answer.chunked or answer.length == 0

    def _next(self, answer: http.client.HTTPResponse) -> bytes:
        if self._slow > 0:
            pause = min(0.25, self._slow)
            self._slow -= pause
            time.sleep(pause)
            self._arm()
            return answer.read1(512)
        self._arm()
        return answer.read1(1 << 16)

    def _arm(self) -> None:
        limit = self.seen.limit if self._leave is None else self._leave
        left = self.seen.begun + limit - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _close(self) -> None:
        if self._abrupt:
            with contextlib.suppress(OSError):
                linger = struct.pack("ii", 1, 0)
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if self._answer is not None:
            self._answer.close()
        self._connection.close()
        self._socket.close()
