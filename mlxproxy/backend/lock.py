"""One proxy per backend port: a proxy holds the ports of all its slots."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from mlxproxy.backend.orphan import Orphans, Record
from mlxproxy.backend.processes import ask
from mlxproxy.files import note, remove
from mlxproxy.instance import Instance


class AlreadyRunning(Exception):
    """Another proxy owns a backend port; the message is the sentence for the user."""


class PortLock:
    """The right to run backends on a range of ports, as lock files in the instance folder.

    Args:
        instance: the instance folder; created if missing.
        ports: one for each slot.
    """

    def __init__(self, instance: Path, ports: range) -> None:
        files = Instance(instance)
        instance.mkdir(parents=True, exist_ok=True)
        self._orphans = Orphans(instance, ports)
        self._holders = {port: files.proxy(port) for port in ports}
        self._locks = {port: FileLock(files.lock(port)) for port in ports}

    def require_alone(self) -> None:
        """Return if no other proxy is known to hold one of the ports; lock nothing.

        Raises:
            AlreadyRunning: another proxy holds one of them.
        """
        holder = self.holder()
        if holder is not None:
            raise _taken(next(iter(self._locks)), holder.pid)

    def acquire(self) -> None:
        """Lock all the ports for this process.

        Raises:
            AlreadyRunning: another proxy holds one of them.
            OSError: a lock cannot be used.
        """
        try:
            self._acquire()
        except BaseException:
            self._let_go()
            raise
        created = ask(lambda: psutil.Process().create_time())
        for path in self._holders.values():
            note(path, {"pid": os.getpid(), "created": created})

    def _acquire(self) -> None:
        for port, lock in self._locks.items():
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise _taken(port, Record.read(self._holders[port]).pid) from None
        # Somebody may have deleted another proxy's lock file.
        holders = [self.holder(), *self._orphans.masters()]
        for holder in holders:
            if holder is not None and holder.pid != os.getpid():
                raise _taken(next(iter(self._locks)), holder.pid)

    def holder(self) -> psutil.Process | None:
        """Return the living proxy, other than this process, that has recorded one of the ports."""
        return next(_living(self._holders.values()), None)

    def release(self) -> None:
        """Release the ports."""
        for path in self._holders.values():
            remove(path)
        self._let_go()

    def _let_go(self) -> None:
        for lock in self._locks.values():
            lock.release()


def holder(instance: Path, ports: range) -> psutil.Process | None:
    """Return the living proxy that has recorded one of the ports; change nothing."""
    return next(_living(Instance(instance).proxy(port) for port in ports), None)


def any_proxy(instance: Path) -> psutil.Process | None:
    """Return a living proxy of this instance folder, whatever its ports."""
    return next(_living(Instance(instance).proxies()), None)


def _living(records: Iterable[Path]) -> Iterator[psutil.Process]:
    """Yield the living proxies of these records, except this process."""
    for path in records:
        process = Record.read(path).process()
        if process is not None and process.pid != os.getpid():
            yield process


def _taken(port: int, pid: int | None) -> AlreadyRunning:
    who = f" (pid {pid})" if pid else ""
    return AlreadyRunning(
        f"mlxproxy is already running{who} with the backend port {port}. Stop it, or set "
        "MLX_BACKEND_PORT and PROXY_PORT to other ports."
    )
