"""A backend's connection that follows a script, and a lease that was granted on that backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mlxproxy.backend.connection import ReadTimeout
from mlxproxy.backend.protocol import Address
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.controller import Lease
from mlxproxy.disconnect import Disconnect
from mlxproxy.errors import ProxyError
from mlxproxy.relay.open import Request
from mlxproxy.relay.relay import Relay
from tests.support.fake_backend import FakeBackend, model_spec

Piece = bytes | Exception | Callable[[], bytes]
SILENCE = ReadTimeout()


def after(action: Callable[[], object], piece: bytes | Exception = b"") -> Callable[[], bytes]:
    """Return a piece that is preceded by an action."""

    def happens() -> bytes:
        action()
        return _value(piece)

    return happens


class FakeConnection:
    """A connection that returns the pieces of a script; after the last one it ends.

    Args:
        pieces: bytes of the body; exceptions are raised; callables are called first.
        head: the same for the time before the head arrives; bytes are ignored there.
    """

    whole = True

    def __init__(
        self, pieces: Iterable[Piece] = (), status: int = 200, head: Iterable[Piece] = ()
    ) -> None:
        self.pieces = iter(pieces)
        self.head = iter(head)
        self.status = status
        self.sent: list[tuple[str, bytes]] = []
        self.calls: list[str] = []  # abort, wait_released, close

    def send(self, path: str, body: bytes, authorization: str = "") -> None:
        self.sent.append((path, body))

    def read_head(self) -> None:
        for piece in self.head:
            _value(piece)

    def read(self) -> bytes:
        return _value(next(self.pieces, b""))

    def read_rest(self, limit: int, seconds: float) -> bytes:
        return b"".join(map(_value, self.pieces))[:limit]

    def abort(self, backend_lives: bool = True) -> None:
        self.calls.append("abort")

    def wait_released(self, timeout: float) -> None:
        self.calls.append("wait_released")

    def close(self) -> None:
        self.calls.append("close")


def _value(piece: Piece) -> bytes:
    if isinstance(piece, Exception):
        raise piece
    return piece if isinstance(piece, bytes) else piece()


class FakeController:
    """A record of the calls that leases make."""

    def __init__(self) -> None:
        self.released = 0

    def release(self, lease: Lease) -> None:
        self.released += 1

    def waiting_for(self, lease: Lease) -> str:
        return "loading it"

    def notice_exits(self) -> None:
        """Do nothing, in place of the real method."""


class FakeBody:
    """The body of a request, which a model may reject."""

    def __init__(self, fields: Mapping[str, Any], refused: ProxyError | None = None) -> None:
        self._fields = fields
        self._refused = refused

    def for_spec(self, spec: ModelSpec) -> Mapping[str, Any]:
        if self._refused is not None:
            raise self._refused
        return self._fields


class Scene:
    """One request to a backend, in which only the lease and the relay are real.

    Args:
        connection: what the backend sends; an exception: the backend does not accept connections.
        refused: the error with which the model rejects the request.
        stall_timeout: in seconds.
        fields: the fields of the request.
    """

    def __init__(
        self,
        connection: FakeConnection | ProxyError,
        refused: ProxyError | None = None,
        stall_timeout: float = 300.0,
        **fields: Any,
    ) -> None:
        self.connection = connection
        self.opened = 0
        self.disconnect = Disconnect()
        self.controller: Any = FakeController()
        self.lease = Lease(self.controller, None, "someone", self.disconnect, exclusive=False)
        nowhere: Any = None
        self.backend = FakeBackend(nowhere, model_spec("org/name"), lambda reason: None)
        self.request = Request("/v1/x", FakeBody(fields, refused))
        self.relay = Relay(stall_timeout, self._connect)

    def grant(self) -> Scene:
        """Grant the lease."""
        self.lease.backend = self.backend
        self.lease.grant()
        return self

    def leave(self) -> None:
        """Disconnect the client, after which the controller ends the lease."""
        self.disconnect.leave()
        self.end(ProxyError("gone"))

    def end(self, error: ProxyError) -> None:
        """End the lease, as the controller does."""
        self.lease.error = error
        self.lease.end()

    def _connect(self, address: Address, interval: float, lets_go: bool) -> Any:
        self.opened += 1
        if isinstance(self.connection, ProxyError):
            raise self.connection
        return self.connection
