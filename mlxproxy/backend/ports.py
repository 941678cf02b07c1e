"""The TCP ports of this machine, and the processes that hold them."""

from __future__ import annotations

import socket
from typing import Any

import psutil

from mlxproxy.backend.processes import ask, at, every


def is_free(port: int) -> bool:
    """Return whether a server may be bound to 127.0.0.1:`port` now.

    With SO_REUSEADDR, TIME_WAIT is no obstacle. On macOS it would also let us bind next to a
    listener on all addresses, so it is also required that nothing answers a connection.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return not answers(port)


def answers(port: int, timeout: float = 0.5) -> bool:
    """Return whether something accepts a connection on 127.0.0.1:`port`."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout) as connection:
            # If nothing listens, the system may connect a socket with that very port to itself.
            return bool(connection.getsockname() != connection.getpeername())
    except OSError:
        return False


def listener(port: int) -> psutil.Process | None:
    """Return the process that listens on the port, if this user may see it."""
    connections = ask(lambda: psutil.net_connections("tcp"))
    if connections is not None:
        return next((at(it.pid) for it in connections if it.pid and _listens(it, port)), None)
    # macOS shows the sockets of all processes to root only, but to each user those of their own.
    for process in every():
        if any(_listens(it, port) for it in _connections(process)):
            return process
    return None


def describe(process: psutil.Process | None) -> str:
    """Describe the process for an error message, by its name and pid."""
    if process is None:
        return "a process of another user"
    name = ask(process.name)
    return f"{name} (pid {process.pid})" if name else f"pid {process.pid}"


def _connections(process: psutil.Process) -> list[Any]:
    return ask(lambda: process.net_connections("tcp")) or []


def _listens(connection: object, port: int) -> bool:
    address = getattr(connection, "laddr", None)
    status = getattr(connection, "status", None)
    return status == psutil.CONN_LISTEN and getattr(address, "port", None) == port
