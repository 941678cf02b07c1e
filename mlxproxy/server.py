"""waitress, set up for streams: sockets, threads, a client's leaving, a graceful stop."""

from __future__ import annotations

import errno
import logging
import resource
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

from mlxproxy.channel import Channel, DirectChannel
from mlxproxy.settings import Settings

log = logging.getLogger("mlxproxy.server")

DESCRIPTORS = 8192
# Threads beside those of answers and waiting requests, so that /health, loads, unloads and those
# who follow a log always find one.
RESERVE = 48
# Bytes a slow reader may have waiting in memory before the backend is no longer read for it.
WATERMARK = 256 << 10
DEAF_AFTER = 60.0  # seconds in which a client must take some of what waits for it
STOPPED = 10.0  # seconds for the last bytes to reach the clients


class CannotListen(Exception):
    """The address cannot be listened on; the message is the sentence for the user."""


class Server:
    """The listening proxy.

    Args:
        app: the WSGI application.
        settings: host, port, and the counts that decide how many threads there are.
        stop: ends all work within its limits; called once, from a thread of its own.
        hurry: shortens a stop under way; called at a second signal.

    Raises:
        CannotListen: the address is taken or not of this machine.
    """

    def __init__(
        self, app: Any, settings: Settings, stop: Callable[[], None], hurry: Callable[[], None]
    ) -> None:
        self._stop = stop
        self._hurry = hurry
        self._stopping = False
        self._finished = threading.Event()
        listener = _listen(settings.proxy_host, settings.proxy_port)
        self.address: tuple[str, int] = listener.getsockname()[:2]
        adjustments = Adjustments(
            sockets=[listener],
            threads=settings.max_concurrent + 2 * settings.max_queue + RESERVE,
            connection_limit=_raise_descriptor_limit() // 2,
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
        self._server = TcpWSGIServer(
            app,
            self._map,
            _sock=listener,
            dispatcher=self._dispatcher,
            adj=adjustments,
            bind_socket=False,
            sockinfo=(listener.family, listener.type, listener.proto, listener.getsockname()),
        )
        self._server.channel_class = DirectChannel if settings.direct_send else Channel

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
        look = 0.0
        while not self._finished.is_set():
            self._turn(1.0)
            if time.monotonic() >= look:
                self._part_with_the_deaf()
                look = time.monotonic() + 1.0
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
            log.exception("the stop did not go as it should")
        finally:
            self._finished.set()
            self._server.pull_trigger()

    def _turn(self, timeout: float) -> None:
        wasyncore.loop(timeout=timeout, use_poll=True, map=self._map, count=1)

    def _part_with_the_deaf(self) -> None:
        """Closes connections whose client takes nothing: each holds a thread and a place."""
        now = time.time()
        for channel in list(self._server.active_channels.values()):
            if channel.total_outbufs_len and now - channel.last_activity > DEAF_AFTER:
                channel.handle_close()

    def _drain_buffers(self) -> None:
        """Lets the last bytes, and the errors of those who were ended, reach their clients."""
        self._server.accepting = False
        deadline = time.monotonic() + STOPPED
        while time.monotonic() < deadline and any(
            channel.requests or channel.total_outbufs_len
            for channel in list(self._server.active_channels.values())
        ):
            self._turn(0.05)


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise CannotListen(
                f"Port {port} on {host} is taken by another program. End it, or set PROXY_PORT "
                f"to another port (`make run PROXY_PORT={port % 65535 + 1}`)."
            ) from None
        raise CannotListen(
            f"{host}:{port} cannot be listened on: {error.strerror}. Set PROXY_HOST to an address "
            "of this machine and PROXY_PORT to a port above 1023."
        ) from None
    return listener


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
            log.warning("at most %d connections: the limit of open files is that low", soft // 2)
    return min(soft, DESCRIPTORS)
