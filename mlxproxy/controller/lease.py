"""What a waiting thread holds: a request's place, and a claim on a load or unload.

Both are the core's own objects (`state.Request`, `state.Claim`) with an event to wait on and, for a
request, the connection to its backend.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from mlxproxy.backend.connection import BackendConnection
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.controller import state
from mlxproxy.disconnect import Disconnect
from mlxproxy.errors import BackendFailed, BackendTimeout, ProxyError

if TYPE_CHECKING:
    from mlxproxy.controller.controller import Controller

# What was sent to the backend cannot be called back: until it has let go of it, but no longer.
RELEASE_SECONDS = 30.0
UNSTREAMED_STALL_FACTOR = 12  # times the stall timeout that an answer in one piece may take


class Claim(state.Claim):
    """What one client wants of a load or an unload, and how it ended."""

    def __init__(self, client: str = "", waits: bool = True) -> None:
        super().__init__(client, waits)
        self.error: ProxyError | None = None
        self.done = threading.Event()

    @property
    def changed(self) -> bool:
        """Whether there was anything to do."""
        return self.operation is None or self.operation.changed

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most `timeout` seconds; return whether it has come.

        Raises:
            ProxyError: the load failed, or is not waited for any longer.
        """
        if not self.done.wait(timeout):
            return False
        if self.error is not None:
            raise self.error
        return True

    def end(self, error: ProxyError | None) -> None:
        """Wake whoever waits. Only the first call counts."""
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
        exclusive: bool,
    ) -> None:
        super().__init__(client, target, exclusive)
        self.disconnect = disconnect
        self.granted = 0.0
        self.last_byte_at = 0.0  # when the last byte of this answer came
        self.unstreamed = False  # nothing of it comes before all of it
        self.backend: state.Process | None = None
        self.connection: BackendConnection | None = None
        self._controller = controller
        self._decided = threading.Event()

    @property
    def spec(self) -> ModelSpec:
        """What answers this request; there once :meth:`wait` has returned True."""
        assert self.backend is not None
        return self.backend.spec

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the place, at most `timeout` seconds; return whether it has been granted.

        Raises:
            ProxyError: it will not be granted (the load failed, shutdown, nothing loaded).
        """
        if not self._decided.wait(timeout):
            return False
        if self.error is not None:
            raise self.error
        return True

    def connect(self, interval: float) -> BackendConnection:
        """Open the connection to the backend; whoever ends the lease ends it too.

        Raises:
            ProxyError: the lease has been ended, or the backend does not accept.
        """
        assert self.backend is not None
        try:
            stall = self._controller.limits.stall_timeout
            connection = BackendConnection(
                self.backend.port,
                min(interval, stall / 4),
                lets_go=self.backend.has("departures"),
            )
        except BackendFailed as error:
            raise self.fault(error) from None
        self._controller.attach(self, connection)
        return connection

    def fault(self, seen: ProxyError) -> ProxyError:
        """Return why an answer ended early: what the lease was ended for, else what was seen."""
        backend = self.backend
        if self.error is None and backend is not None and backend.check():
            self._controller.notice_exits()  # not told yet by the thread that saw it
        return self.error or seen

    def stalled(self) -> ProxyError | None:
        """Return the error if a silence has lasted too long; to be called after each.

        A backend that tells of its life is believed; of another one, a silent answer ends alone
        while the backend feeds others, and one that would be silent anyhow goes on while the
        backend answers anybody.
        """
        backend = self.backend
        silence = self._controller.limits.stall_timeout
        if self.error is not None or backend is None:
            return self.error
        tells = backend.has("heartbeat")
        if tells and (reason := backend.hang(self.granted, silence)) is not None:
            return self._declare_hung(backend, reason)
        now = time.monotonic()
        if now - max(self.last_byte_at, self.granted) < silence:
            return None
        silent_anyhow = tells or (self.unstreamed and not self.exclusive)
        answers_others = tells or now - max(backend.last_byte_at, self.granted) < silence
        if not answers_others and not (silent_anyhow and backend.answers_probe(silence)):
            return self._declare_hung(backend, f"it sent nothing for {silence:g} s (STALL_TIMEOUT)")
        since = max(self.last_byte_at, self.granted) if tells else self.granted
        if silent_anyhow and now - since < UNSTREAMED_STALL_FACTOR * silence:
            if not tells:
                self.last_byte_at = time.monotonic()
            return self.error
        return BackendTimeout(
            f"The backend sent nothing for this answer for {silence:g} s (STALL_TIMEOUT), though "
            "it answers others. Try again."
        )

    def _declare_hung(self, backend: state.Process, reason: str) -> ProxyError:
        backend.declare_hung(reason)
        return self.error or BackendTimeout(f"The backend is considered dead: {reason}. Try again.")

    def comment(self) -> bytes:
        """Return what a waiting stream tells its client, as an SSE comment."""
        return self._controller.comment(self)

    def release(self, finished: bool = True) -> None:
        """Give the place back, or leave the queue. May be called any number of times.

        Args:
            finished: whether the backend has sent all of its answer. Otherwise the place is taken
                until the backend has let go of the request: it may be in the middle of a step.
        """
        self.disconnect.on_leave(None)
        connection, backend = self.connection, self.backend
        if not finished and connection is not None and backend is not None:
            connection.abort(backend_lives=backend.ended is None)
            if backend.ended is None:
                connection.wait_released(RELEASE_SECONDS)
        self._controller.release(self)

    # -- by the controller, which has decided it under its lock

    def grant(self) -> None:
        """Wake whoever waits for the place."""
        self.granted = time.monotonic()
        self._decided.set()

    def end(self) -> None:
        """Wake whoever waits, and end the connection: the error is set already."""
        self._decided.set()
        if self.connection is not None:
            lives = self.backend is not None and self.backend.ended is None
            self.connection.abort(backend_lives=lives)
