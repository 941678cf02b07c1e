"""The start of an answer: check and send a request that has a place, and wait for the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final, Protocol

from mlxproxy.backend.connection import BackendConnection, ReadTimeout
from mlxproxy.backend.protocol import Address
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.controller import Lease
from mlxproxy.errors import BackendFailed, InvalidRequest, ProxyError
from mlxproxy.relay.stall import INTERVAL_SECONDS, Patience

ERROR_BYTES: Final = 1 << 16  # of the backend's own error

Connect = Callable[[Address, float, bool], BackendConnection]


class Body(Protocol):
    """The body of a client's request."""

    def for_spec(self, spec: ModelSpec) -> Mapping[str, Any]:
        """Return its fields, checked for this model.

        Raises:
            InvalidRequest: the model cannot accept them.
        """


@dataclass(frozen=True)
class Request:
    """A client's request.

    Attributes:
        path: the backend's path.
        called: returns the name in the answer of the model that gives it.
        as_chat: whether the client reads the events of a chat themselves, not a translation: it
            finds the reasoning in `reasoning_content`, too, and the role in the first event alone.
        reworded: returns a rejection in the client's own words.
    """

    path: str
    body: Body
    called: Callable[[ModelSpec], str] = attrgetter("model_id")
    as_chat: bool = False
    reworded: Callable[[InvalidRequest], InvalidRequest] = lambda error: error


class Exchange:
    """A request to the backend, and its answer.

    Whatever can be rejected is rejected before there is a connection.

    Args:
        lease: the request's lease, which has been granted.
        streamed: whether the client reads a stream. A whole answer is also requested as a stream,
            if a stream carries all of it: then a client that disconnects ends it, and a hang can be
            detected.
        connect: opens a connection to an address, with an interval in seconds, and with whether the
            backend releases a request that has been aborted (see `BackendConnection`).

    Attributes:
        streamed: whether the answer comes as a stream.
        wants_usage: whether the client asks for the token count at the end of its stream.
        reasoning_mark: what an event contains that :meth:`with_both_spellings` is to change; None:
            no event is to be changed.
        without_role: what takes the role out of all events but the first; None: it stays in them.

    Raises:
        ProxyError: the request is rejected, the lease has been ended, or nothing accepts the
            connection.
    """

    def __init__(
        self, lease: Lease, request: Request, streamed: bool, stall_timeout: float, connect: Connect
    ) -> None:
        backend = lease.backend
        assert backend is not None
        spec = backend.spec
        fields = request.body.for_spec(spec)
        self.backend = backend
        self.wire = backend.wire
        self.streamed = streamed or self.wire.streams_all(fields)
        self.wants_usage = (fields.get("stream_options") or {}).get("include_usage") is True
        self.reasoning_mark = self.wire.reasoning_mark if request.as_chat else None
        self.with_both_spellings = self.wire.with_both_spellings
        self.without_role = self.wire.without_role if request.as_chat else None
        self._reworded = request.reworded
        try:
            payload = self.wire.encode(fields, spec.path, self.streamed)
        except InvalidRequest as error:
            raise request.reworded(error) from None
        self.model_field = self.wire.model_field(spec.path)
        self.shown_field = self.wire.model_field(request.called(spec))
        self.patience = Patience(lease, backend, stall_timeout, unstreamed=not self.streamed)
        self._lease = lease
        try:
            self.connection = connect(
                backend.address, self.patience.interval, backend.has("departures")
            )
        except BackendFailed as error:
            raise lease.fault(error) from None
        lease.attach(self.connection)
        self.connection.send(request.path, payload, self.wire.authorization)

    def await_head(self) -> bool:
        """Wait for the answer's head for one interval; return whether it has come.

        Raises:
            ProxyError: the backend rejects the request, hangs, or has ended the connection.
        """
        try:
            self.connection.read_head()
        except ReadTimeout:
            self.patience.check()
            return False
        except BackendFailed as error:
            raise self._lease.fault(error) from None
        if self.connection.status != 200:
            raise self._refusal()
        return True

    def cut_off(self) -> ProxyError:
        """Return why the answer ended before it was complete."""
        return self._lease.fault(
            BackendFailed(
                "The backend closed the connection before the answer was complete. Try again; if "
                "the same request fails again, see the backend's log."
            )
        )

    def failure(self, events: bytes) -> ProxyError | None:
        """Return the error in whole events of a stream, if the backend tells one there."""
        at = events.rfind(b'data: {"error"')
        error = self.wire.failure(events[at:]) if at >= 0 else None
        return self._lease.fault(error) if isinstance(error, BackendFailed) else error

    def usage_of(self, answer: bytes) -> Mapping[str, Any]:
        """Return the token count in a whole answer that the backend sent.

        Raises:
            ProxyError: it is not an answer.
        """
        try:
            return self.wire.usage_of(answer)
        except BackendFailed as error:
            raise self._lease.fault(error) from None

    def shown(self, data: bytes) -> bytes:
        """Return events, or a whole answer, as the client is to see them.

        They have the model's name instead of its path, and the reasoning in the spellings that the
        request asks for.
        """
        data = data.replace(self.model_field, self.shown_field)
        if self.reasoning_mark is not None and self.reasoning_mark in data:
            data = self.with_both_spellings(data)
        return data

    def _refusal(self) -> ProxyError:
        body = self.connection.read_rest(ERROR_BYTES, INTERVAL_SECONDS)
        if self._lease.error is not None:
            return self._lease.error
        error = self.wire.error(self.connection.status, body)
        if isinstance(error, InvalidRequest):
            return self._reworded(error)
        return self._lease.fault(error) if isinstance(error, BackendFailed) else error
