"""The objects that waiting threads hold: a request's lease, and a claim on a load or unload.

Both are the core's own objects (`state.Request`, `state.Claim`) with an event to wait on and, for a
request, the connection to its backend.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from mlxproxy.backend.batch import Batch
from mlxproxy.backend.connection import BackendConnection
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.controller import state
from mlxproxy.disconnect import Disconnect
from mlxproxy.errors import ProxyError

if TYPE_CHECKING:
    from mlxproxy.controller.controller import Controller

# A request that was sent to the backend cannot be recalled: its place stays taken until the backend
# has released it, but at most this long.
RELEASE_SECONDS = 30.0


class Claim(state.Claim):
    """One client's interest in a load or an unload, and the outcome."""

    def __init__(self, client: str = "", waits: bool = True) -> None:
        super().__init__(client, waits)
        self.error: ProxyError | None = None
        self.done = threading.Event()

    @property
    def changed(self) -> bool:
        """Whether there was anything to do."""
        return self.operation is None or self.operation.changed

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, for at most `timeout` seconds; return whether it has come.

        Raises:
            ProxyError: the load failed, or the claim was dropped.
        """
        if not self.done.wait(timeout):
            return False
        if self.error is not None:
            raise self.error
        return True

    def end(self, error: ProxyError | None) -> None:
        """Wake the waiting threads. Only the first call counts."""
        if not self.done.is_set():
            self.error = error
            self.done.set()


class Lease(state.Request):
    """A request's place: first in the queue, then on a slot, until it is released."""

    def __init__(
        self,
        controller: Controller,
        target: ModelSpec | None,
        client: str,
        disconnect: Disconnect,
        batch: Batch,
    ) -> None:
        super().__init__(client, target, batch=batch)
        self.disconnect = disconnect
        self.granted = 0.0
        self.backend: state.Process | None = None
        self._controller = controller
        self._decided = threading.Event()
        self._lock = threading.Lock()
        self._connection: BackendConnection | None = None

    @property
    def spec(self) -> ModelSpec:
        """The model that answers this request; set once :meth:`wait` has returned True."""
        assert self.backend is not None
        return self.backend.spec

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the place, for at most `timeout` seconds; return whether it has been granted.

        Raises:
            ProxyError: it will not be granted (the load failed, shutdown, nothing loaded).
        """
        if not self._decided.wait(timeout):
            return False
        if self.error is not None:
            raise self.error
        return True

    def attach(self, connection: BackendConnection) -> None:
        """Take over the connection to the backend: ending the lease then ends the connection, too.

        Raises:
            ProxyError: the lease has already been ended; the connection is closed.
        """
        with self._lock:
            if self.error is None:  # or else `end` comes later, and finds the connection
                self._connection = connection
                return
        connection.close()
        raise self.error

    def fault(self, seen: ProxyError) -> ProxyError:
        """Return why an answer ended early: the lease's own error, else the one that was seen."""
        backend = self.backend
        if self.error is None and backend is not None and backend.check():
            self._controller.notice_exits()  # the thread that saw it has not reported it yet
        return self.error or seen

    def waiting_for(self) -> str:
        """Describe what a request without a place is waiting for, and for how long."""
        return self._controller.waiting_for(self)

    def release(self, finished: bool = True) -> None:
        """Give the place back, or leave the queue. May be called any number of times.

        Args:
            finished: whether the backend has sent its whole answer. Otherwise the place stays
                taken until the backend has released the request: it may be in the middle of a step.
        """
        self.disconnect.on_leave(None)
        connection, backend = self._connection, self.backend
        if not finished and connection is not None and backend is not None:
            connection.abort(backend_lives=backend.ended is None)
            if backend.ended is None:
                connection.wait_released(RELEASE_SECONDS)
        with self._lock:
            self._connection = None
        self._controller.release(self)
        if connection is not None:
            connection.close()

    # -- called by the controller, which has decided under its lock

    def grant(self) -> None:
        """Wake the thread that waits for the place."""
        self.granted = time.monotonic()
        self._decided.set()

    def end(self) -> None:
        """Wake the waiting thread, and end the connection; the error is already set."""
        self._decided.set()
        with self._lock:
            connection = self._connection
        if connection is not None:
            lives = self.backend is not None and self.backend.ended is None
            connection.abort(backend_lives=lives)
