"""Who holds a TCP port of this machine."""

from __future__ import annotations

import contextlib
import socket

import psutil


def is_free(port: int) -> bool:
    """Whether a server may be bound to 127.0.0.1:`port` now.

    SO_REUSEADDR makes TIME_WAIT no obstacle. On macOS it would also let us bind beside a listener
    on all addresses, so that nobody may answer a connection either.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return not answers(port)


def answers(port: int, timeout: float = 0.5) -> bool:
    """Whether something accepts a connection on 127.0.0.1:`port`."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout) as connection:
            # With nobody there, the system may connect a socket of that very port to itself.
            return bool(connection.getsockname() != connection.getpeername())
    except OSError:
        return False


def listener(port: int) -> psutil.Process | None:
    """The process that listens on the port, where this user may know it."""
    try:
        for connection in psutil.net_connections("tcp"):
            if _listens(connection, port) and connection.pid:
                return psutil.Process(connection.pid)
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        # macOS shows the sockets of all processes to root alone, but each user his own processes'.
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if any(_listens(item, port) for item in process.net_connections("tcp")):
                    return process
    return None


def describe(process: psutil.Process | None) -> str:
    """The process in words for an error message: its name and pid."""
    if process is None:
        return "a process of another user"
    with contextlib.suppress(psutil.Error):
        return f"{process.name()} (pid {process.pid})"
    return f"pid {process.pid}"


def _listens(connection: object, port: int) -> bool:
    address = getattr(connection, "laddr", None)
    status = getattr(connection, "status", None)
    return status == psutil.CONN_LISTEN and getattr(address, "port", None) == port
