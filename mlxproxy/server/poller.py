"""The sockets of the I/O thread, and what it waits for on each of them.

waitress asks every connection before each wait. With hundreds of connections, that is most of the
price of a short request: about a millisecond, while no token moves. Here only the connections that
may have changed are asked: those on which something has happened, and those whose request's thread
says so.
"""

from __future__ import annotations

import math
import select
import time
from collections import deque
from collections.abc import Iterator
from typing import Any


class Poller(dict[int, Any]):
    """The handlers (waitress's dispatchers) by the descriptors of their sockets.

    waitress itself adds and removes them: this is its map. A handler with a method `deadline`,
    which returns a moment in monotonic seconds, has its method `expire` called then. Every method
    but :meth:`changed` is for the I/O thread alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._poll = select.poll()
        self._awaited: dict[int, int] = {}  # events by descriptor, as the poll object has them
        self._changed: deque[tuple[int, Any]] = deque()
        self._earliest = math.inf  # no deadline is before this moment

    def __setitem__(self, descriptor: int, handler: Any) -> None:
        super().__setitem__(descriptor, handler)
        self.changed(descriptor, handler)

    def __delitem__(self, descriptor: int) -> None:
        super().__delitem__(descriptor)
        if self._awaited.pop(descriptor, None) is not None:
            self._poll.unregister(descriptor)

    def changed(self, descriptor: int, handler: Any) -> None:
        """Note that what a handler waits for may have changed. May be called by any thread."""
        self._changed.append((descriptor, handler))

    def wait(self, timeout: float) -> Iterator[tuple[int, Any, int]]:
        """Wait for events; yield each with its descriptor and handler, which is to handle it.

        Args:
            timeout: seconds to wait at most; a deadline ends the wait, too.
        """
        while self._changed:
            self._update(*self._changed.popleft())
        until = min(time.monotonic() + timeout, self._earliest)
        happened = self._poll.poll(max(0.0, until - time.monotonic()) * 1000)
        for descriptor, handler, events in [(it, self.get(it), events) for it, events in happened]:
            if self.get(descriptor) is handler:  # else it is closed, and its descriptor used again
                yield descriptor, handler, events
                self.changed(descriptor, handler)

    def expire(self) -> None:
        """Let each handler whose deadline has passed do what is due."""
        if time.monotonic() >= self._earliest:
            self.look_at_all()

    def look_at_all(self) -> None:
        """Ask all handlers, because what has changed concerns all of them, or for what is due."""
        now = time.monotonic()
        self._earliest = math.inf
        for descriptor, handler in list(self.items()):
            if _deadline(handler) <= now:
                handler.expire()
            self._update(descriptor, handler)

    def _update(self, descriptor: int, handler: Any) -> None:
        """Wait for what the handler wants now."""
        if descriptor not in self or self[descriptor] is not handler:
            return  # closed meanwhile
        wanted = select.POLLIN if handler.readable() else 0
        if not handler.accepting and handler.writable():
            wanted |= select.POLLOUT
        if self._awaited.get(descriptor) != wanted:
            self._awaited[descriptor] = wanted
            self._poll.register(descriptor, wanted)
        self._earliest = min(self._earliest, _deadline(handler))


def _deadline(handler: Any) -> float:
    return handler.deadline() if hasattr(handler, "deadline") else math.inf
