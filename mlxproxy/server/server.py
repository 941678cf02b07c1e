"""waitress, set up for streams: sockets, threads, client disconnects, a graceful stop."""

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
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.server import TcpWSGIServer
from waitress.task import ThreadedTaskDispatcher

from mlxproxy.server.channel import Channel, DirectChannel
from mlxproxy.server.poller import Poller
from mlxproxy.settings import Settings

log = logging.getLogger("mlxproxy.server")

PROXY_PORT = "PROXY_PORT"  # the setting
DESCRIPTORS = 8192
# Threads in addition to those for answers and queued requests, so that /health, loads, unloads and
# followers of a log always find one.
RESERVE = 48
# Bytes queued in memory for a slow reader beyond which the backend is no longer read for it.
WATERMARK = 256 << 10
# Open files not used for clients: logs, locks, a folder being read, the backend's start.
OWN_DESCRIPTORS = 40
CROWDED = 2.0  # seconds that a connection may be idle while there is no room for another one
REST = 0.5  # seconds without accepting, after an accept for which the system had no resources left
# With these intervals (seconds), the system itself probes whether a silent client's machine is
# still there. There is no other sign of a machine that was unplugged, or of a client that
# disconnected long after the end of its sending.
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
STOPPED = 10.0  # seconds that the last bytes have to reach the clients


class CannotListen(Exception):
    """The server cannot listen on the address; the message is the sentence for the user."""


class Listener(TcpWSGIServer):
    """The listening socket. It accepts what can be served; the rest stays in the kernel's queue."""

    _resting_until = -math.inf
    _map: Poller  # as in waitress, which has no type hints

    def changed(self, connection: Channel) -> None:
        """Note that a request's thread may have changed what its connection waits for."""
        if (descriptor := connection.descriptor) is not None:
            self._map.changed(descriptor, connection)

    @property
    def descriptor(self) -> int:
        return int(self._fileno)

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
        """Do nothing: the next turn calls :meth:`readable` and accepts again."""

    def set_socket_options(self, connection: socket.socket) -> None:
        super().set_socket_options(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if (
                option := getattr(socket, name, None)
            ) is not None:  # macOS has another name for the first
                connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def handle_accept(self) -> None:
        try:
            connection, address = self.socket.accept()
        except OSError as error:  # the client has disconnected, or there is no descriptor left
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._resting_until = time.monotonic() + REST
            return
        try:
            self.set_socket_options(connection)
            channel = self.channel_class(self, connection, address, self.adj, map=self._map)
            channel.handle_read()  # the request is often there already
        except OSError:  # on macOS, if the client has already disconnected
            connection.close()


class Server:
    """The listening proxy.

    Args:
        app: the WSGI application.
        settings: the limits that decide how many threads there are.
        listener: the socket to accept connections on, from :func:`listen`.
        stop: ends all work within its time limits; called once, from a thread of its own.
        force_stop: shortens a stop in progress; called at a second signal.
        channel_class: the class of each connection; `Channel` sends through waitress's buffers.
        others: more sockets, with the setting of the port of each; they share all limits.

    Raises:
        CannotListen: another program has begun to listen on an address in the meantime.
    """

    def __init__(
        self,
        app: Any,
        settings: Settings,
        listener: socket.socket,
        stop: Callable[[], None],
        force_stop: Callable[[], None],
        channel_class: type[Channel] = DirectChannel,
        others: Mapping[str, socket.socket] = MappingProxyType({}),
    ) -> None:
        self._stop = stop
        self._hurry = force_stop
        self._stopping = False
        self._finished = threading.Event()
        self.address: tuple[str, int] = listener.getsockname()[:2]
        answers = settings.max_concurrent * (1 + len(settings.peers))  # at a time
        adjustments = Adjustments(
            sockets=[listener, *others.values()],
            threads=answers + 2 * settings.max_queue + RESERVE,
            connection_limit=_room(_raise_descriptor_limit(), answers),
            asyncore_use_poll=True,
            channel_request_lookahead=1,
            channel_timeout=120,
            max_request_body_size=settings.max_body + 1,  # waitress rejects a body of this size
            max_request_header_size=64 << 10,
            outbuf_high_watermark=WATERMARK,
            backlog=1024,
            ident=None,
            clear_untrusted_proxy_headers=True,
            log_socket_errors=False,
        )
        self._poller = Poller()
        self._full = False
        self._dispatcher = ThreadedTaskDispatcher()
        self._dispatcher.set_thread_count(adjustments.threads)
        self._listeners: list[Listener] = []
        for setting, bound in {PROXY_PORT: listener, **others}.items():
            host, port = bound.getsockname()[:2]
            try:
                opened = Listener(
                    app,
                    self._poller,
                    _sock=bound,
                    dispatcher=self._dispatcher,
                    adj=adjustments,
                    bind_socket=False,
                    sockinfo=(bound.family, bound.type, bound.proto, bound.getsockname()),
                )
            except OSError as error:
                self._dispatcher.shutdown()
                wasyncore.close_all(self._poller)
                raise _cannot_listen(error, host, port, setting) from None
            opened.channel_class = channel_class
            self._listeners.append(opened)
        self._server = self._listeners[0]

    def run(self) -> None:
        """Serve until a signal or :meth:`stop`, then stop gracefully.

        Closing the terminal (SIGHUP) must not leave the backend running either. Under `nohup`, that
        signal is ignored and stays ignored.
        """
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            signal.signal(number, lambda *_: self.stop())
        while not self._finished.is_set():
            self._turn(1.0)
        self._drain_buffers()
        wasyncore.close_all(self._poller)

    def stop(self) -> None:
        """Begin the stop; a second call hurries it. May be called from a signal handler."""
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
        """Wait for the next events, for at most `timeout` seconds, and handle them.

        Unlike waitress's own loop, it notices the end of connections that are neither to be read
        nor to be written. Each connection itself says when it expires, on the monotonic clock.
        """
        poller, server = self._poller, self._server
        for listener in self._listeners:  # which accept or not, by the number of connections
            poller.changed(listener.descriptor, listener)
        for descriptor, it, happened in poller.wait(timeout):
            if happened & select.POLLIN:
                wasyncore.read(it)
            if happened & select.POLLOUT and poller.get(descriptor) is it:
                wasyncore.write(it)
            # If there is something to read, reading shows what has ended: on macOS, a client that
            # has only ended its sending is reported as hung up.
            if not happened & (select.POLLIN | select.POLLOUT):
                it.handle_close()
        if (
            server.full is not self._full
        ):  # which shortens every connection's patience, or ends that
            self._full = server.full
            poller.look_at_all()
        poller.expire()

    def _drain_buffers(self) -> None:
        """Let the last bytes, including the errors of aborted requests, reach their clients."""
        for listener in self._listeners:
            listener.accepting = False
        deadline = time.monotonic() + STOPPED
        while time.monotonic() < deadline and any(
            channel.requests or channel.total_outbufs_len
            for listener in self._listeners
            for channel in list(listener.active_channels.values())
        ):
            self._turn(0.05)


def listen(host: str, port: int, setting: str = PROXY_PORT) -> socket.socket:
    """Return a socket bound to the address; nobody can connect before a server listens on it.

    Args:
        setting: the name of the port's setting, for the error.

    Raises:
        CannotListen: the address is in use or is not an address of this machine.
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
        raise _cannot_listen(error, host, port, setting) from None
    return listener


def _cannot_listen(error: OSError, host: str, port: int, setting: str) -> CannotListen:
    if error.errno == errno.EADDRINUSE:
        return CannotListen(
            f"Port {port} on {host} is in use by another program. Stop it, or set {setting} "
            f"to another port (`make run {setting}={port % 65535 + 1}`)."
        )
    return CannotListen(
        f"Cannot listen on {host}:{port}: {error.strerror}. Set PROXY_HOST to an address of "
        f"this machine and {setting} to a port above 1023."
    )


def _room(descriptors: int, max_concurrent: int) -> int:
    """Return how many connections these descriptors are enough for.

    Each connection may need one for itself and one for a body that is buffered on disk. Those that
    are answered at the same time need one more, for the connection to the backend.
    """
    free = descriptors - OWN_DESCRIPTORS
    return max(4, free // 3, (free - max_concurrent) // 2)


def _raise_descriptor_limit() -> int:
    """Raise this process's limit of open files (256 on macOS); return the new limit."""
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
