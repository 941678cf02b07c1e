"""waitress, set up for streams: sockets, threads, a client's leaving, a graceful stop."""

from __future__ import annotations

import errno
import logging
import math
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.server import TcpWSGIServer
from waitress.task import ThreadedTaskDispatcher

from mlxproxy.server.channel import Channel, DirectChannel
from mlxproxy.settings import Settings

log = logging.getLogger("mlxproxy.server")

DESCRIPTORS = 8192
# Threads beside those of answers and waiting requests, so that /health, loads, unloads and those
# who follow a log always find one.
RESERVE = 48
# Bytes a slow reader may have waiting in memory before the backend is no longer read for it.
WATERMARK = 256 << 10
# Open files that are no client's: logs, locks, a folder being read, the backend's start.
OWN_DESCRIPTORS = 40
CROWDED = 2.0  # seconds that a connection may be idle while there is no room for another
REST = 0.5  # seconds without accepting, after an accept that the system had nothing left for
# The system asks a silent client's machine by itself whether it is still there, in seconds: for one
# that was unplugged, or has left long after the end of its sending, there is no other sign.
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
STOPPED = 10.0  # seconds for the last bytes to reach the clients


class CannotListen(Exception):
    """The address cannot be listened on; the message is the sentence for the user."""


class Listener(TcpWSGIServer):
    """The listening socket. It accepts what can be served; the rest waits in the kernel's queue."""

    _resting_until = -math.inf

    @property
    def full(self) -> bool:
        """Whether there is no room for another connection."""
        return bool(len(self._map) >= self.adj.connection_limit)

    @property
    def patience(self) -> float:
        """Seconds that a connection may be idle."""
        return CROWDED if self.full else float(self.adj.channel_timeout)

    def readable(self) -> bool:
        resting = time.monotonic() < self._resting_until
        return bool(self.accepting) and not self.full and not resting

    def deadline(self) -> float:
        return self._resting_until if self._resting_until > time.monotonic() else math.inf

    def expire(self) -> None:
        """Accept again: the next turn asks :meth:`readable`."""

    def set_socket_options(self, connection: socket.socket) -> None:
        super().set_socket_options(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if (
                option := getattr(socket, name, None)
            ) is not None:  # macOS has another for the first
                connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def handle_accept(self) -> None:
        try:
            connection, address = self.socket.accept()
        except OSError as error:  # the client has left already, or there is no descriptor for it
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._resting_until = time.monotonic() + REST
            return
        try:
            self.set_socket_options(connection)
            self.channel_class(self, connection, address, self.adj, map=self._map)
        except OSError:  # macOS, where the client has left already
            connection.close()


class Server:
    """The listening proxy.

    Args:
        app: the WSGI application.
        settings: the counts that decide how many threads there are.
        listener: the socket to accept connections on, from :func:`listen`.
        stop: ends all work within its limits; called once, from a thread of its own.
        hurry: shortens a stop under way; called at a second signal.
        channel_class: what each connection becomes; `Channel` sends through waitress's buffers.

    Raises:
        CannotListen: another program has begun to listen on the address in the meantime.
    """

    def __init__(
        self,
        app: Any,
        settings: Settings,
        listener: socket.socket,
        stop: Callable[[], None],
        force_stop: Callable[[], None],
        channel_class: type[Channel] = DirectChannel,
    ) -> None:
        self._stop = stop
        self._hurry = force_stop
        self._stopping = False
        self._finished = threading.Event()
        self.address: tuple[str, int] = listener.getsockname()[:2]
        adjustments = Adjustments(
            sockets=[listener],
            threads=settings.max_concurrent + 2 * settings.max_queue + RESERVE,
            connection_limit=_room(_raise_descriptor_limit(), settings.max_concurrent),
            asyncore_use_poll=True,
            channel_request_lookahead=1,
            channel_timeout=120,
            max_request_body_size=settings.max_body + 1,  # waitress refuses what is as large
            max_request_header_size=64 << 10,
            outbuf_high_watermark=WATERMARK,
            backlog=1024,
            ident=None,
            clear_untrusted_proxy_headers=True,
            log_socket_errors=False,
        )
        self._map: dict[int, Any] = {}
        self._dispatcher = ThreadedTaskDispatcher()
        self._dispatcher.set_thread_count(adjustments.threads)
        try:
            self._server = Listener(
                app,
                self._map,
                _sock=listener,
                dispatcher=self._dispatcher,
                adj=adjustments,
                bind_socket=False,
                sockinfo=(listener.family, listener.type, listener.proto, listener.getsockname()),
            )
        except OSError as error:
            self._dispatcher.shutdown()
            raise _cannot_listen(error, *self.address) from None
        self._server.channel_class = channel_class

    def run(self) -> None:
        """Serves until a signal or :meth:`stop`, then stops as told.

        A terminal that is closed (SIGHUP) must not leave the backend behind either; `nohup` has
        that signal ignored, and it stays so.
        """
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            signal.signal(number, lambda *_: self.stop())
        while not self._finished.is_set():
            self._turn(1.0)
        self._drain_buffers()
        wasyncore.close_all(self._map)

    def stop(self) -> None:
        """Begins the stop; a second call hurries it. May be called from a signal handler."""
        if self._stopping:
            threading.Thread(target=self._hurry, name="hurry", daemon=True).start()
            return
        self._stopping = True
        threading.Thread(target=self._finish, name="stop", daemon=True).start()

    def _finish(self) -> None:
        try:
            self._stop()
        except Exception:
            log.exception("the server did not shut down properly")
        finally:
            self._finished.set()
            self._server.pull_trigger()

    def _turn(self, timeout: float) -> None:
        """Wait for what happens next, for `timeout` seconds at most, and act on it.

        Unlike waitress's own loop it hears of the end of connections that are neither to be read
        nor to be written; and each says itself when its time is over, on the monotonic clock.
        """
        poll = select.poll()
        until = now = time.monotonic()
        until += timeout
        for descriptor, it in list(self._map.items()):
            wanted = select.POLLIN if it.readable() else 0
            if not it.accepting and it.writable():
                wanted |= select.POLLOUT
            poll.register(descriptor, wanted)
            if isinstance(it, (Channel, Listener)):
                until = min(until, it.deadline())
        for descriptor, happened in poll.poll(max(0.0, until - now) * 1000):
            it = self._map.get(descriptor)
            if it is None:
                continue
            if happened & select.POLLIN:
                wasyncore.read(it)
            if happened & select.POLLOUT and self._map.get(descriptor) is it:
                wasyncore.write(it)
            # With something to read, reading tells what has ended: on macOS a client that has only
            # ended its sending counts as hung up.
            if not happened & (select.POLLIN | select.POLLOUT):
                it.handle_close()
        now = time.monotonic()
        for it in list(self._map.values()):
            if isinstance(it, (Channel, Listener)) and it.deadline() <= now:
                it.expire()

    def _drain_buffers(self) -> None:
        """Lets the last bytes, and the errors of those who were ended, reach their clients."""
        self._server.accepting = False
        deadline = time.monotonic() + STOPPED
        while time.monotonic() < deadline and any(
            channel.requests or channel.total_outbufs_len
            for channel in list(self._server.active_channels.values())
        ):
            self._turn(0.05)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address: nobody can connect before a server takes it.

    Raises:
        CannotListen: the address is taken or not of this machine.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(error, host, port) from None
    return listener


def _cannot_listen(error: OSError, host: str, port: int) -> CannotListen:
    if error.errno == errno.EADDRINUSE:
        return CannotListen(
            f"Port {port} on {host} is in use by another program. Stop it, or set PROXY_PORT "
            f"to another port (`make run PROXY_PORT={port % 65535 + 1}`)."
        )
    return CannotListen(
        f"Cannot listen on {host}:{port}: {error.strerror}. Set PROXY_HOST to an address of "
        "this machine and PROXY_PORT to a port above 1023."
    )


def _room(descriptors: int, max_concurrent: int) -> int:
    """Return for how many connections these descriptors are enough.

    Each may need one for itself and one for a body that waits on disk; as many as are answered at
    once need one more, to the backend.
    """
    free = descriptors - OWN_DESCRIPTORS
    return max(4, free // 3, (free - max_concurrent) // 2)


def _raise_descriptor_limit() -> int:
    """Raises this process's limit of open files (256 on macOS); returns what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft == resource.RLIM_INFINITY:
        return DESCRIPTORS
    if soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):
            log.warning(
                "the limit of open files is %d: only a few clients are served at a time", soft
            )
    return min(soft, DESCRIPTORS)
