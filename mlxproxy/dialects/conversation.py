"""Conversations as clients send them, changed so that chat templates accept them.

Templates raise errors for system text anywhere but at the beginning and for malformed arguments of
old calls, and they read a model's old reasoning from only one field.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlxproxy.dialects.form import Json

SYSTEM = frozenset({"system", "developer"})
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
PARAGRAPH = "\n\n"


def settled(messages: Sequence[Json]) -> list[Json]:
    """Return a conversation with at most one system message, which comes first.

    The system messages at the beginning become one. The text of a later one stays where it is, in
    the user's turn next to it: at the beginning, it would invalidate all that the backend has read
    and cached of the conversation. It is marked as Claude Code marks such text.

    Args:
        messages: each with a role, as the guard returns them or a translator makes them.
    """
    beginning = 0
    while beginning < len(messages) and messages[beginning]["role"] in SYSTEM:
        beginning += 1
    result: list[Json] = []
    if beginning:
        text = PARAGRAPH.join(filter(None, map(text_of, messages[:beginning])))
        result.append({**messages[0], "role": "system", "content": text})
    folded = False  # a system message is in the last of the result, which the user's next one joins
    for message in messages[beginning:]:
        role = message["role"]
        if role in SYSTEM:
            text = text_of(message)
            if not text.strip():
                continue
            reminder = f"<system-reminder>\n{text}\n</system-reminder>"
            message = {"role": "user", "content": reminder}
            joins = bool(result) and result[-1]["role"] == "user"
            folded = True
        else:
            joins = folded and role == "user"
            folded = False
        if joins:
            last = result[-1]
            content = joined(last["content"], message["content"])
            result[-1] = {**last, "content": content}
        else:
            result.append(message)
    return result


def text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def joined(one: str | list[Json], other: str | list[Json]) -> str | list[Json]:
    """Return two contents as one: as text if both are text."""
    if isinstance(one, str) and isinstance(other, str):
        return PARAGRAPH.join(filter(None, (one, other)))
    return [*_parts(one), *_parts(other)]


def _parts(content: str | list[Json]) -> list[Json]:
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content}] if content else []


def content_of(parts: Iterable[Json]) -> str | list[Json]:
    """Return content parts as the content of one message: as text if all of them are text."""
    content: str | list[Json] = ""
    for part in parts:
        content = joined(content, part["text"] if part["type"] == "text" else [part])
    return content


def image(url: str) -> Json:
    """Return the content part of an image."""
    return {"type": "image_url", "image_url": {"url": url}}


# -- what a chat request itself may contain


def repaired(messages: object) -> object:
    """Return the messages of an unchecked chat request, with clients' common mistakes corrected.

    If the arguments of a call are not an object, they become an empty one: the model wrote them,
    and rejecting them would end the session. Reasoning moves to the field that templates read.
    Every message keeps its index, so that the guard's errors name the right one.
    """
    if not isinstance(messages, list):
        return messages
    return [_repaired(message) for message in messages]


def _repaired(message: Any) -> Any:
    if not isinstance(message, dict) or message.get("role") != "assistant":
        return message
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        message = {**message, "tool_calls": [_repaired_call(call) for call in calls]}
    if not message.keys().isdisjoint(REASONING_KEYS):
        thought = next((text for key in REASONING_KEYS if (text := message.get(key))), None)
        message = {key: value for key, value in message.items() if key not in REASONING_KEYS}
        if isinstance(thought, str):
            message["reasoning_content"] = thought
    return message


def _repaired_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments(function.get("arguments"))}}


def arguments(value: object) -> Json:
    """Return the arguments of a call, parsed; an empty object if they cannot be read."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}
