"""The body of a client's request, which is checked once for each model that may answer it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from mlxproxy.backend.spec import ModelSpec
from mlxproxy.guard.check import Kind


class Check(Protocol):
    """What a request may say to a model, or to any."""

    def check(self, body: dict[str, Any], kind: Kind, /) -> dict[str, Any]:
        """Return its fields, checked.

        Raises:
            InvalidRequest: they cannot be taken.
        """


class RequestBody:
    """A request's JSON, checked for what was loaded when it came.

    Args:
        given: the JSON, as parsed.
        kind: of which endpoint.
        known: what is loaded; None where nothing is.
        terms_of: finds what a request may say to a model, or to any.

    Attributes:
        fields: what is asked for, checked as far as it can be told without the model.

    Raises:
        InvalidRequest: no model that may answer takes this.
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
        """Return the fields for what answers.

        Raises:
            InvalidRequest: it cannot take them.
        """
        if spec is self._known:
            return self.fields
        return self._terms_of(spec).check(self._given, self._kind)
