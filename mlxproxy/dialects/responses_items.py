"""Conversion of the items of a Responses conversation into chat messages."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from mlxproxy.dialects import conversation, fields
from mlxproxy.dialects.form import Json
from mlxproxy.dialects.responses_tools import Tools
from mlxproxy.errors import InvalidRequest

Find = Callable[[str], Json | None]
"""Return a stored item by its id."""

_TEXTS: Final = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_TEXT_FILE = re.compile(r"data:text/[^,]{0,100};base64,", re.IGNORECASE)


def items_of(given: Any, place: str = "input") -> list[Json]:
    """Return the input of a request as a list of items.

    Raises:
        InvalidRequest: it is not a valid input.
    """
    if given is None or given == "":
        return []
    if isinstance(given, str):
        content = [{"type": "input_text", "text": given}]
        return [{"type": "message", "role": "user", "content": content}]
    if not isinstance(given, list):
        fields.refuse(place, "a string or a list of items")
    return [fields.an_object(item, f"{place}[{index}]") for index, item in enumerate(given)]


def resolved(items: Sequence[Json], find: Find, place: str = "input") -> list[Json]:
    """Return the items with each reference replaced by the item that it names.

    Raises:
        InvalidRequest: no item with that id is stored.
    """
    result = []
    for index, item in enumerate(items):
        if item.get("type") == "item_reference":
            where = f"{place}[{index}].id"
            identity = fields.a_text(item.get("id"), where)
            found = find(identity)
            if found is None:
                raise InvalidRequest(
                    f"Item with id '{identity}' not found. Send the item itself: this server keeps "
                    "the latest answers alone.",
                    param=where,
                )
            item = found
        result.append(item)
    return result


def messages_of(items: Sequence[Json], tools: Tools, earlier: int = 0) -> list[Json]:
    """Return the chat messages for the items.

    Items without a counterpart in chat are left out: resumed sessions contain items from other
    servers.

    Args:
        tools: the tools of the request, for the names of old calls.
        earlier: how many of the items precede this request's own input.

    Raises:
        InvalidRequest: an item cannot be converted, and its content would be missed.
    """
    made = _Conversation(tools)
    for index, item in enumerate(items):
        made.add(item, f"input[{index - earlier}]")
    return made.end()


class _Conversation:
    """The messages for the items so far.

    All that an assistant does in a row (text, reasoning and calls) is one message; the outputs of
    its calls follow it, and the images in these outputs follow them.
    """

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._messages: list[Json] = []
        self._thoughts: list[str] = []
        self._shown: list[Json] = []

    def add(self, item: Json, place: str) -> None:
        kind = item.get("type")
        if kind == "message" or (kind is None and "role" in item):
            self._message(item, place)
        elif kind == "reasoning":
            if text := _thought(item):
                self._thoughts.append(text)
        elif kind in ("function_call", "custom_tool_call"):
            self._call(item, place)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            self._output(item, place)

    def end(self) -> list[Json]:
        self._show()
        return self._messages

    def _message(self, item: Json, place: str) -> None:
        role = item.get("role")
        if not isinstance(role, str) or role not in ("user", "assistant", "system", "developer"):
            fields.refuse(f"{place}.role", "user, assistant, system or developer")
        content = conversation.content_of(_parts(item.get("content"), f"{place}.content"))
        if role == "assistant":
            message = self._assistant()
            message["content"] = conversation.joined(message["content"], content)
            return
        self._show()
        self._thoughts.clear()
        if not content:
            return
        last = self._messages[-1] if self._messages else None
        if last is not None and role == last["role"] == "user":  # templates want turns
            last["content"] = conversation.joined(last["content"], content)
        else:
            self._messages.append({"role": role, "content": content})

    def _call(self, item: Json, place: str) -> None:
        custom = item["type"] == "custom_tool_call"
        name = fields.a_text(item.get("name"), f"{place}.name")
        given = item.get("input" if custom else "arguments")
        arguments = {"input": given} if custom else conversation.arguments(given)
        call = {
            "id": fields.a_text(item.get("call_id"), f"{place}.call_id"),
            "type": "function",
            "function": {
                "name": self._tools.name(name, item.get("namespace")),
                "arguments": arguments,
            },
        }
        self._assistant().setdefault("tool_calls", []).append(call)

    def _output(self, item: Json, place: str) -> None:
        call_id = fields.a_text(item.get("call_id"), f"{place}.call_id")
        parts = list(_parts(item.get("output"), f"{place}.output"))
        text = conversation.PARAGRAPH.join(part["text"] for part in parts if part["type"] == "text")
        self._shown += [part for part in parts if part["type"] != "text"]
        self._messages.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def _assistant(self) -> Json:
        """Return the assistant's message that continues, or a new one."""
        self._show()
        if not self._messages or self._messages[-1]["role"] != "assistant":
            self._messages.append({"role": "assistant", "content": ""})
        message = self._messages[-1]
        if self._thoughts:
            thoughts = [message.get("reasoning_content", ""), *self._thoughts]
            message["reasoning_content"] = conversation.PARAGRAPH.join(filter(None, thoughts))
            self._thoughts.clear()
        return message

    def _show(self) -> None:
        """Append the images in tool outputs as a user's message: templates take none in outputs."""
        if self._shown:
            self._messages.append({"role": "user", "content": self._shown})
            self._shown = []


def _thought(item: Json) -> str:
    """Return the model's reasoning, as this server has sent it."""
    for key in ("content", "summary"):
        parts = item.get(key)
        if isinstance(parts, list):
            texts = [part.get("text") for part in parts if isinstance(part, dict)]
            if text := conversation.PARAGRAPH.join(text for text in texts if isinstance(text, str)):
                return text
    return ""


def _parts(content: Any, place: str) -> Iterator[Json]:
    """Yield the content parts of a message or of an output."""
    if content is None:
        return
    if isinstance(content, str):
        if content:
            yield {"type": "text", "text": content}
        return
    if not isinstance(content, list):
        fields.refuse(place, "a string or a list of content parts")
    for index, part in enumerate(content):
        where = f"{place}[{index}]"
        part = fields.an_object(part, where)
        kind = part.get("type")
        if isinstance(kind, str) and (key := _TEXTS.get(kind)):
            if text := fields.a_text(part.get(key), f"{where}.{key}"):
                yield {"type": "text", "text": text}
        elif kind == "input_image":
            yield conversation.image(_image(part, where))
        elif kind == "input_file":
            yield {"type": "text", "text": _file(part, where)}
        elif kind == "input_audio":
            fields.refuse(f"{where}.type", "input_text or input_image: no model here can listen")


def _image(part: Json, place: str) -> str:
    url = part.get("image_url")
    if isinstance(url, dict):
        url = url.get("url")
    if not isinstance(url, str) or not url.startswith("data:"):
        fields.refuse(
            f"{place}.image_url",
            "a data URL (data:image/png;base64,…): this server does not fetch images",
        )
    return url


def _file(part: Json, place: str) -> str:
    data = part.get("file_data")
    if not isinstance(data, str) or not (start := _TEXT_FILE.match(data)):
        fields.refuse(place, "the data URL of a text (file_data): this server reads no other files")
    try:
        text = base64.b64decode(data[start.end() :], validate=True).decode()
    except (binascii.Error, ValueError):
        fields.refuse(f"{place}.file_data", "valid base64 of UTF-8 after the comma")
    name = part.get("filename")
    return f"{name}\n{text}" if isinstance(name, str) and name else text
