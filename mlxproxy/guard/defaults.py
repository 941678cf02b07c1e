"""Defaults for the fields that a request does not set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def completed(body: Mapping[str, Any], defaults: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return a request with defaults for the fields that it does not set.

    Args:
        kind: the kind of endpoint.
        defaults: fields of a request; `system` becomes a message if the conversation has no system
            message of its own.
    """
    filled = dict(body)
    for name, value in defaults.items():
        if name == "system":
            if kind == "chat":
                filled["messages"] = _with_system(filled.get("messages"), value)
        elif filled.get(name) is None and not (
            name == "max_tokens" and filled.get("max_completion_tokens") is not None
        ):
            filled[name] = value
    return filled


def _with_system(messages: Any, text: str) -> Any:
    if not isinstance(messages, list):
        return messages  # the guard rejects it
    roles = (message.get("role") for message in messages if isinstance(message, dict))
    if any(role in ("system", "developer") for role in roles):
        return messages
    return [{"role": "system", "content": text}, *messages]
