"""Whether the client of a request is still there, told to whoever works for it."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Disconnect:
    """A client's presence for one request.

    The server calls :meth:`leave` from its I/O thread when the connection has ended, or when it can
    no longer be told whether anybody waits, so a callback must be short and must not block on the
    network.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callback: Callable[[], None] | None = None
        self._gone = False

    @property
    def gone(self) -> bool:
        return self._gone

    def on_leave(self, callback: Callable[[], None] | None) -> None:
        """Sets the one callback (None: none any more); it runs at once if the client has left."""
        with self._lock:
            self._callback = callback
            run = self._gone
        if run and callback is not None:
            callback()

    def leave(self) -> None:
        """The client is gone. Called any number of times, from any thread."""
        with self._lock:
            callback, self._callback = self._callback, None
            self._gone = True
        if callback is not None:
            callback()
