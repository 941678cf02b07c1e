"""Fields of another dialect's request: read as what they must be, or rejected by their own name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from mlxproxy.errors import InvalidRequest


def refuse(place: str, expected: str) -> NoReturn:
    """Raise the error for the field at that place; it says what the field must be."""
    raise InvalidRequest(f"{place} must be {expected}.", param=place)


def an_object(value: Any, place: str) -> dict[str, Any]:
    """Return the value if it is an object."""
    if not isinstance(value, dict):
        refuse(place, "an object")
    return value


def a_list(value: Any, place: str) -> list[Any]:
    """Return the value if it is a list."""
    if not isinstance(value, list):
        refuse(place, "a list")
    return value


def a_text(value: Any, place: str) -> str:
    """Return the value if it is a string."""
    if not isinstance(value, str):
        refuse(place, "a string")
    return value


def body_of(value: Any) -> dict[str, Any]:
    """Return the body of a request."""
    if not isinstance(value, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    return value


def model(body: Mapping[str, Any]) -> str:
    """Return the model name that the request asks for; empty if it has none."""
    value = body.get("model")
    return "" if value is None else a_text(value, "model")


def flag(body: Mapping[str, Any], name: str, default: bool) -> bool:
    """Return a boolean field; the default if it is left out."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        refuse(name, "true or false")
    return value


def kept(body: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields that are present, under chat's names for them.

    The guard checks their values.

    Args:
        names: chat's names of the fields, by the dialect's.
    """
    return {chat: body[theirs] for theirs, chat in names.items() if body.get(theirs) is not None}


def inverted(names: Mapping[str, str]) -> dict[str, str]:
    """Return the dialect's names of chat's fields, for those whose names differ."""
    return {chat: theirs for theirs, chat in names.items() if chat != theirs}
