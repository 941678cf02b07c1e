"""The notice that the client of a request has disconnected, for the code that works for it."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Disconnect:
    """A client's presence for one request.

    The server calls :meth:`leave` from its I/O thread when the connection has ended, or when it can
    no longer detect whether anybody is waiting, so a callback must be short and must not block on
    the network.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callback: Callable[[], None] | None = None
        self._gone = False

    @property
    def gone(self) -> bool:
        return self._gone

    def on_leave(self, callback: Callable[[], None] | None) -> None:
        """Set the only callback (None: remove it); run it immediately if the client has left."""
        with self._lock:
            self._callback = callback
            run = self._gone
        if run and callback is not None:
            callback()

    def leave(self) -> None:
        """Record that the client has left; may be called any number of times, from any thread."""
        with self._lock:
            callback, self._callback = self._callback, None
            self._gone = True
        if callback is not None:
            callback()
