"""One connection to the backend: a request out, an answer read as its bytes arrive.

`mlx_lm.server` speaks HTTP/1.0 with one request per connection: the head, then bytes until it
closes. Reading that from the socket itself costs one `recv` per event and delivers each event when
it comes; `requests` and `urllib3` add 45 µs to each (see `make bench`), or wait to fill a buffer.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

from mlxproxy.errors import BackendFailed

# Room for dozens of events. For 64 KB the allocator would ask the kernel for memory, and give it
# back, at each event.
RECV_BYTES = 1 << 14
HEAD_LIMIT = 1 << 16
CONNECT_TIMEOUT = 10.0
# The backend's listen backlog is 5: in a burst the kernel drops the SYN and tries again only after
# a second. A fresh try after 20 ms gets through as soon as the backend has accepted the others.
CONNECT_RETRY = 0.02


class Silence(Exception):
    """Nothing came for the interval that the connection was opened with."""


class Upstream:
    """A connection to the backend on 127.0.0.1.

    Args:
        port: the backend's port.
        interval: seconds of silence after which a read or a write raises :class:`Silence`.
        lets_go: whether the backend, once our side is shut, ends the request and then closes the
            connection; otherwise nobody can tell when its place is free.

    Raises:
        BackendFailed: nothing accepts connections on the port.
    """

    def __init__(self, port: int, interval: float, lets_go: bool = False) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._pending = b""
        self._unsent = memoryview(b"")
        self._lets_go = lets_go
        self.status = 0
        self.headers: dict[str, str] = {}
        self._socket = _connect(port)
        # Timeouts of the kernel's: Python's own cost a poll() before every recv().
        whole = int(interval)
        timeval = struct.pack("@ll", whole, int((interval - whole) * 1_000_000))
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        except OSError as error:  # macOS, where the backend has reset the connection already
            self._socket.close()
            raise _broken(f"has ended the connection ({error.strerror or error})") from None

    def send(self, path: str, body: bytes) -> None:
        """Takes one POST request, which :meth:`read_head` sends before it waits."""
        head = (
            f"POST {path} HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._unsent = memoryview(head.encode("ascii") + body)

    def read_head(self) -> None:
        """Waits for the status line and the headers (names in lower case).

        May be called again after a :class:`Silence`.

        Raises:
            Silence: nothing was taken or came for the interval.
            BackendFailed: the connection ended before the head, or it is not HTTP.
        """
        try:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            raise Silence from None
        except OSError as error:
            raise _broken(f"did not take the request ({error.strerror or error})") from None
        while b"\r\n\r\n" not in self._pending:
            if len(self._pending) > HEAD_LIMIT:
                raise _broken("sent a head that does not end")
            data = self._recv()
            if not data:
                raise _broken("closed the connection without an answer")
            self._pending += data
        head, self._pending = self._pending.split(b"\r\n\r\n", 1)
        first, *lines = head.decode("latin-1").split("\r\n")
        try:
            self.status = int(first.split(" ", 2)[1])
        except (IndexError, ValueError):
            raise _broken("does not speak HTTP") from None
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()

    def read(self) -> bytes:
        """What has arrived of the body; ``b""`` when the backend has closed the connection.

        Raises:
            Silence: nothing came for the interval.
        """
        if self._pending:
            data, self._pending = self._pending, b""
            return data
        return self._recv()

    def _recv(self) -> bytes:
        try:
            return self._socket.recv(RECV_BYTES)
        except BlockingIOError:
            raise Silence from None
        except OSError:
            return b""  # reset: the same to us as an end, only `data: [DONE]` proves a whole answer

    def abort(self, backend_lives: bool = True) -> None:
        """End the request, from any thread, without waiting.

        A read in progress returns ``b""`` as soon as the backend has let go of the request; at
        once where it cannot tell, or lives no more.
        """
        how = socket.SHUT_WR if self._lets_go and backend_lives else socket.SHUT_RDWR
        with self._lock:
            if not self._closed:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(how)

    def wait_released(self, timeout: float) -> None:
        """Wait until the backend has let go of an aborted request, for seconds at most."""
        deadline = time.monotonic() + timeout
        while self._lets_go and time.monotonic() < deadline:
            with contextlib.suppress(Silence):
                if not self._recv():
                    return

    def close(self) -> None:
        """Closes the connection; the backend stops generating at its next write."""
        with self._lock:
            self._closed = True
            self._socket.close()


def _connect(port: int) -> socket.socket:
    deadline = time.monotonic() + CONNECT_TIMEOUT
    wait = CONNECT_RETRY
    while True:
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            connection.settimeout(wait)
            connection.connect(("127.0.0.1", port))
            connection.settimeout(None)
            return connection
        except TimeoutError:
            connection.close()
            wait = min(wait * 1.5, 0.5)
            if time.monotonic() > deadline:
                raise _broken("accepts no connection") from None
        except OSError as error:
            connection.close()
            raise _broken(f"accepts no connection ({error.strerror or error})") from None


def _broken(what: str) -> BackendFailed:
    return BackendFailed(f"The backend {what}. Try again; GET /health tells its state.")
