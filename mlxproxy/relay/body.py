"""The body of a client's request, checked once for each model that may answer it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from mlxproxy.backend.spec import ModelSpec
from mlxproxy.guard.check import Kind


class Check(Protocol):
    """The check of requests to a model, or to any model."""

    def check(self, body: dict[str, Any], kind: Kind, /) -> dict[str, Any]:
        """Return the fields of a request body, checked.

        Raises:
            InvalidRequest: they are not acceptable.
        """


class RequestBody:
    """A request's JSON, checked for the model that was loaded when it came.

    Args:
        given: the JSON, as parsed.
        kind: the kind of endpoint.
        known: the loaded model; None if nothing is loaded.
        terms_of: finds what a request may say to a model, or to any model.

    Attributes:
        fields: those of the request, checked as far as is possible without the model.

    Raises:
        InvalidRequest: no model that may answer accepts this request.
    """

    def __init__(
        self,
        given: dict[str, Any],
        kind: Kind,
        known: ModelSpec | None,
        terms_of: Callable[[ModelSpec | None], Check],
    ) -> None:
        self.fields = terms_of(known).check(given, kind)
        self._given = given
        self._kind = kind
        self._known = known
        self._terms_of = terms_of

    def for_spec(self, spec: ModelSpec) -> dict[str, Any]:
        """Return the fields for the model that answers.

        Raises:
            InvalidRequest: the model cannot accept them.
        """
        if spec is self._known:
            return self.fields
        return self._terms_of(spec).check(self._given, self._kind)
