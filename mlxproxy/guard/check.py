"""What a request may say: nothing that hurts the backend's other clients or reaches elsewhere.

What passes, field by field, is a table of the engine's: one wrong value may end every answer in
flight, others make it load, fetch or compute at everyone's expense. Whatever is in no table passes
as long as it is plain JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from mlxproxy.errors import ContextLengthExceeded, InvalidRequest
from mlxproxy.guard import shapes
from mlxproxy.guard.defaults import completed
from mlxproxy.guard.shapes import DROP, Limits, Shape

Kind = Literal["chat", "text"]

MAX_DEPTH = 64  # of lists and objects; templates and parsers recurse, some frames a level
MIN_INTEGER, MAX_INTEGER = -(1 << 63), (1 << 64) - 1
CHARACTERS_PER_TOKEN = 16  # far above what any real text has: a longer prompt cannot fit


class Rule(NamedTuple):
    """What one field may be, and what happens to the backend without the rule."""

    shape: Shape
    why: str


@dataclass(frozen=True)
class Rules:
    """What the requests of one endpoint may say to an engine.

    Attributes:
        fields: by their names.
        required: the field that must be there.
        combine: applies what one field says about another, to a request whose fields are checked.
        prompt: the fields whose text has to fit into the context.
    """

    fields: Mapping[str, Rule]
    required: str
    combine: Callable[[dict[str, Any], Limits], None] = lambda request, limits: None
    prompt: frozenset[str] = frozenset({"messages", "tools", "prompt"})


class Terms(NamedTuple):
    """What a request may say to what answers it, and what it is given that it does not say."""

    rules: Mapping[Kind, Rules]
    limits: Limits
    defaults: Mapping[str, Any] = MappingProxyType({})

    def check(self, body: object, kind: Kind) -> dict[str, Any]:
        """Return a new request body that the backend takes and survives; see :func:`check`."""
        if self.defaults and isinstance(body, dict):
            body = completed(body, self.defaults, kind)
        return check(body, self.rules[kind], self.limits)


def check(body: object, rules: Rules, limits: Limits) -> dict[str, Any]:
    """Return a new request body that the backend takes and survives.

    Checking a checked request again changes nothing, except by limits that were not known before.

    Args:
        body: the request's JSON, as parsed; it is left as it is.
        rules: of the endpoint and the engine.
        limits: what the model and the settings allow, as far as it is known.

    Raises:
        InvalidRequest: what the backend cannot take, with the field as `param`.
    """
    if not isinstance(body, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    request: dict[str, Any] = {}
    length = 0
    for name, value in body.items():
        if value is None:  # asks for the default
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
        InvalidRequest: lone surrogates, NUL, NaN, numbers beyond 64 bits or deep nesting, with the
            field as `param`.
    """
    require_plain(body)
    for name, value in body.items():
        if _has_nul(value):
            raise InvalidRequest(f"{name} contains a NUL character.", param=name)


def require_plain(body: Mapping[str, Any]) -> None:
    """Return if all of a body can be walked through and written.

    Raises:
        InvalidRequest: lone surrogates, NaN, numbers beyond 64 bits or deep nesting, with the field
            as `param`.
    """
    for name, value in body.items():
        _characters(name, value)


def _characters(name: str, value: Any, depth: int = MAX_DEPTH) -> int:
    """How much text is in a value, all of which can be written as UTF-8 and as JSON.

    Raises:
        InvalidRequest: lone surrogates, NaN and Infinity, numbers beyond 64 bits, deep nesting.
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
            if type(item) is str and item.isascii():  # most of what there is: spare it the call
                total += len(item)
            else:
                total += _characters(name, item, depth - 1)
        return total
    return 0


def _has_nul(value: Any) -> bool:
    """Whether a value that is not nested deeply has a NUL in one of its texts."""
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
