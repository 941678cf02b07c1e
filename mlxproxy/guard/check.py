"""Checks of requests: nothing may harm the backend's other clients or reach other resources.

The engine has a table of what is allowed, field by field: one wrong value may end every answer in
flight, others make the backend load, fetch or compute at everyone's expense. A field that is in no
table passes as long as it is plain JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

from mlxproxy.errors import ContextLengthExceeded, InvalidRequest
from mlxproxy.guard import shapes
from mlxproxy.guard.defaults import completed
from mlxproxy.guard.shapes import DROP, Limits, Shape

Written = Literal["chat", "text"]
Kind = Literal[Written, "score", "embed", "rerank"]

PATHS: Final[Mapping[Kind, str]] = {
    "chat": "/v1/chat/completions",
    "text": "/v1/completions",
    "score": "/v1/score",
    "embed": "/v1/embeddings",
    "rerank": "/v1/rerank",
}
"""The endpoint of each kind of request; backends have the same."""

MAX_DEPTH = 64  # of lists and objects; templates and parsers recurse, several frames per level
MIN_INTEGER, MAX_INTEGER = -(1 << 63), (1 << 64) - 1
CHARACTERS_PER_TOKEN = 16  # far more than any real text has: a longer prompt cannot fit


class Rule(NamedTuple):
    """The shape of one field, and what happens to the backend without the rule."""

    shape: Shape
    why: str


@dataclass(frozen=True)
class Rules:
    """The rules of one engine for the requests of one endpoint.

    Attributes:
        fields: the rules by the fields' names.
        required: the field that must be present.
        combine: applies what one field implies for another, to a request whose fields are checked.
        prompt: the fields whose text has to fit into the context.
    """

    fields: Mapping[str, Rule]
    required: str
    combine: Callable[[dict[str, Any], Limits], None] = lambda request, limits: None
    prompt: frozenset[str] = frozenset({"messages", "tools", "prompt"})


class Terms(NamedTuple):
    """The rules and limits for a request to a model, and the defaults of its missing fields."""

    rules: Mapping[Kind, Rules]
    limits: Limits
    defaults: Mapping[str, Any] = MappingProxyType({})

    def check(self, body: object, kind: Kind) -> dict[str, Any]:
        """Return a new request body that the backend accepts and survives; see :func:`check`.

        Raises:
            InvalidRequest: the model or its backend answers no requests of this kind.
        """
        rules = self.rules.get(kind)
        if rules is None:
            others = " and ".join(PATHS[other] for other in self.rules)
            raise InvalidRequest(
                f"This model does not answer {PATHS[kind]}, only {others}. Use that, or name "
                "another model.",
                param="model",
            )
        if self.defaults and isinstance(body, dict) and kind in ("chat", "text"):
            body = completed(body, self.defaults, kind)
        return check(body, rules, self.limits)


def check(body: object, rules: Rules, limits: Limits) -> dict[str, Any]:
    """Return a new request body that the backend accepts and survives.

    Checking a checked request again changes nothing, except for limits that were not known before.

    Args:
        body: the request's JSON, as parsed; it is not changed.
        rules: those of the endpoint and the engine.
        limits: what the model and the settings allow, as far as that is known.

    Raises:
        InvalidRequest: the backend cannot accept the request; `param` is the field.
    """
    if not isinstance(body, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    request: dict[str, Any] = {}
    length = 0
    for name, value in body.items():
        if value is None:  # null asks for the default
            continue
        if rule := rules.fields.get(name):
            value = rule.shape(name, value, limits)
            if value is DROP:
                continue
        characters = _characters(name, value)
        length += characters if name in rules.prompt else 0
        request[name] = value
    if rules.required not in request:
        raise InvalidRequest(f"{rules.required} is missing.", param=rules.required)
    if limits.max_context is not None:
        length -= sum(map(len, shapes.images(request.get("messages", ()))))
        if length > limits.max_context * CHARACTERS_PER_TOKEN:
            raise ContextLengthExceeded.of(
                f"{length} characters", limits.max_context, param=rules.required
            )
    rules.combine(request, limits)
    return request


def require_text(body: Mapping[str, Any]) -> None:
    """Return if all text of a body can be written, shown and looked up.

    For bodies that :func:`check` does not see.

    Raises:
        InvalidRequest: it contains lone surrogates, NUL, NaN, numbers beyond 64 bits or deep
            nesting; `param` is the field.
    """
    require_plain(body)
    for name, value in body.items():
        if _has_nul(value):
            raise InvalidRequest(f"{name} contains a NUL character.", param=name)


def require_plain(body: Mapping[str, Any]) -> None:
    """Return if all of a body can be traversed and written.

    Raises:
        InvalidRequest: it contains lone surrogates, NaN, numbers beyond 64 bits or deep nesting;
            `param` is the field.
    """
    for name, value in body.items():
        _characters(name, value)


def _characters(name: str, value: Any, depth: int = MAX_DEPTH) -> int:
    """Return the number of characters in a value that can be written as UTF-8 and as JSON.

    Raises:
        InvalidRequest: it contains lone surrogates, NaN, Infinity, numbers beyond 64 bits or deep
            nesting.
    """
    kind = type(value)
    if kind is str:
        if not value.isascii():
            _require_utf8(name, value)
        return len(value)
    if kind is float:
        if not math.isfinite(value):
            raise InvalidRequest(f"{name} contains a number that is not finite.", param=name)
    elif kind is int:
        if not MIN_INTEGER <= value <= MAX_INTEGER:
            raise InvalidRequest(f"{name} contains a number of more than 64 bits.", param=name)
    elif kind is dict or kind is list:
        if depth == 0:
            raise InvalidRequest(f"{name} is nested more than {MAX_DEPTH} levels deep.", param=name)
        total = 0
        items = value
        if kind is dict:
            total = _characters(name, "".join(value))
            items = value.values()
        for item in items:
            if type(item) is str and item.isascii():  # the most frequent case: save the call
                total += len(item)
            else:
                total += _characters(name, item, depth - 1)
        return total
    return 0


def _has_nul(value: Any) -> bool:
    """Return whether a value that is not nested deeply has a NUL in one of its texts."""
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any("\0" in name for name in value) or any(map(_has_nul, value.values()))
    return isinstance(value, list) and any(map(_has_nul, value))


def _require_utf8(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            f"{name} contains a lone surrogate, which is not a character.", param=name
        ) from None
