"""Anthropic's Messages: translation of a request into a chat request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from mlxproxy.dialects import conversation, fields
from mlxproxy.dialects.anthropic_answer import AnthropicAnswer
from mlxproxy.dialects.form import COUNTED, Json, MakeId, Translated, random_id
from mlxproxy.errors import InvalidRequest
from mlxproxy.guard.shapes import EFFORTS

# Claude Code's first block of system text. It changes with every request, and everything after a
# change must be read again.
BILLING: Final = "x-anthropic-billing-header:"
CHARACTERS_PER_TOKEN = 4  # a rule of thumb

_NAMES: Final = {
    "model": "model",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "max_tokens": "max_tokens",
    "stream": "stream",
    "stop_sequences": "stop",
}


def translate(body: Mapping[str, Any], make_id: MakeId = random_id) -> Translated:
    """Return the chat request for a Messages request, and the encoder of its answer.

    Unknown fields and unknown blocks are left out: clients add some with every release.

    Raises:
        InvalidRequest: a field cannot be translated; the error has Anthropic's name for it.
    """
    body = fields.body_of(body)
    stream = fields.flag(body, "stream", False)
    chat = {**fields.kept(body, _NAMES), **COUNTED}
    if chat.get("max_tokens") == 0:  # the prompt is to be read and cached; one token is the minimum
        chat["max_tokens"] = 1
    if stops := chat.pop("stop", None):
        stops = fields.a_list(stops, "stop_sequences")
        chat["stop"] = [
            text
            for index, stop in enumerate(stops)
            if (text := fields.a_text(stop, f"stop_sequences[{index}]")).strip()
        ]
    chat["messages"] = _conversation(body)
    chat |= _tools(body)
    chat |= _thinking(body)
    answer = AnthropicAnswer(fields.model(body), make_id, estimate=estimated_tokens(chat))
    return Translated(
        chat,
        answer,
        stream,
        fields.inverted(_NAMES) | {"tools": "tools", "response_format": "output_config.format"},
        temperature=1.0,
        optional=frozenset({"enable_thinking", "reasoning_effort"}),
    )


def estimated_tokens(chat: Mapping[str, Any]) -> int:
    """Return about how many tokens the prompt of a chat request has."""
    messages = chat.get("messages", ())
    characters = sum(map(_characters, messages)) + _characters(chat.get("tools"))
    return max(1, characters // CHARACTERS_PER_TOKEN)


def counted(tokens: int) -> Json:
    """Return the answer to `count_tokens`."""
    return {"input_tokens": tokens}


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return 0 if value.startswith("data:image/") else len(value)
    if isinstance(value, Mapping):
        return sum(len(name) + _characters(item) for name, item in value.items())
    return sum(map(_characters, value)) if isinstance(value, list) else 0


# -- messages


def _conversation(body: Mapping[str, Any]) -> list[Json]:
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        fields.refuse("messages", "a list of at least one message")
    messages: list[Json] = []
    if system := _system(body.get("system"), "system"):
        messages.append({"role": "system", "content": system})
    for index, message in enumerate(given):
        place = f"messages[{index}]"
        for made in _message(fields.an_object(message, place), place):
            last = messages[-1] if messages else None
            if last is not None and made["role"] == last["role"] and made["role"] in _MERGED:
                messages[-1] = _merged(last, made)
            else:
                messages.append(made)
    messages = conversation.settled(messages)
    if given[-1].get("role") == "assistant":
        raise InvalidRequest(
            "The conversation must end with a user message: a model here cannot continue an answer "
            "that has begun. Remove the last message.",
            param=f"messages[{len(given) - 1}]",
        )
    if not messages or messages[-1]["role"] in ("assistant", "system"):
        messages.append({"role": "user", "content": " "})  # it was empty, and there must be a turn
    return messages


_MERGED = frozenset({"user", "assistant"})  # templates want them to alternate, the API does not


def _merged(one: Json, other: Json) -> Json:
    merged = {**one, "content": conversation.joined(one["content"], other["content"])}
    if "reasoning_content" in other:
        thoughts = (one.get("reasoning_content", ""), other["reasoning_content"])
        merged["reasoning_content"] = conversation.joined(*thoughts)
    if "tool_calls" in other:
        merged["tool_calls"] = one.get("tool_calls", []) + other["tool_calls"]
    return merged


def _message(message: Json, place: str) -> Iterator[Json]:
    role, content = message.get("role"), message.get("content")
    if role == "system":
        if text := _system(content, f"{place}.content"):
            yield {"role": "system", "content": text}
    elif role == "assistant":
        yield from _assistant(_blocks(content, f"{place}.content"))
    elif role == "user":
        yield from _user(_blocks(content, f"{place}.content"))
    else:
        fields.refuse(f"{place}.role", "user, assistant or system")


def _system(value: object, place: str) -> str:
    """Return the system text, without the line that would spoil the prompt cache."""
    texts = [block.get("text", "") for _, block in _blocks(value, place) if _kind(block) == "text"]
    texts = [fields.a_text(text, place) for text in texts]
    return conversation.PARAGRAPH.join(
        text for text in texts if text and not text.lstrip().startswith(BILLING)
    )


def _blocks(content: object, place: str) -> list[tuple[str, Json]]:
    """Return the blocks of a content, each with its place in the request."""
    if content is None:
        return []
    if isinstance(content, str):
        return [(place, {"type": "text", "text": content})]
    if not isinstance(content, list):
        fields.refuse(place, "a string or a list of content blocks")
    blocks = [(f"{place}[{index}]", block) for index, block in enumerate(content)]
    return [(where, fields.an_object(block, where)) for where, block in blocks]


def _kind(block: Json) -> str:
    return str(block.get("type"))


def _assistant(blocks: list[tuple[str, Json]]) -> Iterator[Json]:
    """Yield one message, if any: thoughts, text and calls belong together."""
    thoughts, texts, calls = [], [], []
    for place, block in blocks:
        kind = _kind(block)
        if kind == "text":
            texts.append(fields.a_text(block.get("text"), f"{place}.text"))
        elif kind == "thinking":
            thoughts.append(fields.a_text(block.get("thinking"), f"{place}.thinking"))
        elif kind == "tool_use":
            calls.append(_call(block, place))
    message: Json = {
        "role": "assistant",
        "content": conversation.PARAGRAPH.join(filter(None, texts)),
    }
    if any(thoughts):
        message["reasoning_content"] = conversation.PARAGRAPH.join(filter(None, thoughts))
    if calls:
        message["tool_calls"] = calls
    if len(message) > 2 or message["content"]:
        yield message


def _call(block: Json, place: str) -> Json:
    name = fields.a_text(block.get("name"), f"{place}.name")
    function = {"name": name, "arguments": conversation.arguments(block.get("input"))}
    call_id = fields.a_text(block.get("id"), f"{place}.id")
    return {"id": call_id, "type": "function", "function": function}


def _user(blocks: list[tuple[str, Json]]) -> Iterator[Json]:
    """Yield the tool results first, which templates want right after the calls; then the rest."""
    images: list[Json] = []
    rest: list[Json] = []
    for place, block in blocks:
        if _kind(block) == "tool_result":
            text, more = _result(block, place)
            images += more
            call_id = fields.a_text(block.get("tool_use_id"), f"{place}.tool_use_id")
            yield {"role": "tool", "tool_call_id": call_id, "content": text}
        else:
            rest += _parts(block, place)
    if content := conversation.content_of(images + rest):
        yield {"role": "user", "content": content}


def _result(block: Json, place: str) -> tuple[str, list[Json]]:
    """Return the text of a tool's result, and its images, which no template accepts there."""
    texts, images = [], []
    for where, inner in _blocks(block.get("content"), f"{place}.content"):
        for part in _parts(inner, where):
            if part["type"] == "text":
                texts.append(part["text"])
            else:
                images.append(part)
    text = conversation.PARAGRAPH.join(texts)
    return (f"Error: {text}" if block.get("is_error") is True else text), images


def _parts(block: Json, place: str) -> Iterator[Json]:
    """Yield the content parts for a block of a user's turn."""
    kind = _kind(block)
    if kind == "text":
        if text := fields.a_text(block.get("text"), f"{place}.text"):
            yield _text(text)
    elif kind == "image":
        yield conversation.image(_image(block, place))
    elif kind == "document":
        yield from _document(block, place)
    elif kind == "search_result":
        found = _blocks(block.get("content"), f"{place}.content")
        about = [str(block[key]) for key in ("title", "source") if block.get(key)]
        texts = [part["text"] for where, inner in found for part in _parts(inner, where)]
        yield _text("\n".join(about + texts))
    elif kind == "tool_reference":
        yield _text(f"The tool {block.get('tool_name')} is available.")


def _text(text: str) -> Json:
    return {"type": "text", "text": text}


def _image(block: Json, place: str) -> str:
    source = fields.an_object(block.get("source"), f"{place}.source")
    if source.get("type") != "base64":
        fields.refuse(f"{place}.source", 'of the type "base64": this server does not fetch images')
    media = fields.a_text(source.get("media_type"), f"{place}.source.media_type")
    data = fields.a_text(source.get("data"), f"{place}.source.data")
    return f"data:{media};base64,{data}"


def _document(block: Json, place: str) -> Iterator[Json]:
    source = fields.an_object(block.get("source"), f"{place}.source")
    kind = source.get("type")
    if title := block.get("title"):
        yield _text(fields.a_text(title, f"{place}.title"))
    if kind == "text":
        yield _text(fields.a_text(source.get("data"), f"{place}.source.data"))
    elif kind == "content":
        for where, inner in _blocks(source.get("content"), f"{place}.source.content"):
            yield from _parts(inner, where)
    else:  # Claude Code knows the phrase, and continues without the document
        raise InvalidRequest(
            f"{place}: this server does not support PDF input. Send the document's text.",
            param=f"{place}.source",
        )


# -- tools and thinking


def _tools(body: Mapping[str, Any]) -> Json:
    """Return the functions among the tools. Server tools have no schema: nothing here runs them."""
    tools: list[Json] = []
    for index, tool in enumerate(fields.a_list(body.get("tools") or [], "tools")):
        place = f"tools[{index}]"
        tool = fields.an_object(tool, place)
        if tool.get("type") not in (None, "custom"):
            continue
        function: Json = {"name": fields.a_text(tool.get("name"), f"{place}.name")}
        if tool.get("description") is not None:
            function["description"] = fields.a_text(tool["description"], f"{place}.description")
        schema = tool.get("input_schema") or {"type": "object", "properties": {}}
        function["parameters"] = fields.an_object(schema, f"{place}.input_schema")
        if fields.flag(tool, "strict", False):
            function["strict"] = True
        tools.append({"type": "function", "function": function})
    if not tools:
        return {}
    return {"tools": tools, **_choice(body, {tool["function"]["name"] for tool in tools})}


_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def _choice(body: Mapping[str, Any], names: set[str]) -> Json:
    choice = body.get("tool_choice")
    if choice is None:
        return {}
    choice = fields.an_object(choice, "tool_choice")
    once: Json = {}
    if fields.flag(choice, "disable_parallel_tool_use", False):
        once["parallel_tool_calls"] = False
    kind = choice.get("type")
    if kind == "tool":
        name = fields.a_text(choice.get("name"), "tool_choice.name")
        if name not in names:
            return {}  # a server tool
        return {"tool_choice": {"type": "function", "function": {"name": name}}, **once}
    if not isinstance(kind, str) or kind not in _CHOICES:
        fields.refuse("tool_choice.type", "auto, any, tool or none")
    return {"tool_choice": _CHOICES[kind], **once}


_THINKING = {"enabled": True, "adaptive": True, "between_tools": True, "disabled": False}


def _thinking(body: Mapping[str, Any]) -> Json:
    chat: Json = {}
    thinking = fields.an_object(body.get("thinking") or {}, "thinking")
    kind = thinking.get("type")
    if kind is not None:
        if not isinstance(kind, str) or kind not in _THINKING:
            fields.refuse("thinking.type", f"one of {', '.join(_THINKING)}")
        chat["enable_thinking"] = _THINKING[kind]
    config = fields.an_object(body.get("output_config") or {}, "output_config")
    effort = config.get("effort")
    if effort is not None:
        if not isinstance(effort, str) or effort not in EFFORTS:
            fields.refuse("output_config.effort", f"one of {', '.join(sorted(EFFORTS))}")
        if chat.get("enable_thinking"):  # effort alone does not ask a model to think
            chat["reasoning_effort"] = effort
    wanted = config.get("format") or body.get("output_format")
    if wanted is not None:
        wanted = fields.an_object(wanted, "output_config.format")
        if wanted.get("type") != "json_schema":
            fields.refuse("output_config.format.type", "json_schema")
        schema = fields.an_object(wanted.get("schema"), "output_config.format.schema")
        form = {"name": "answer", "schema": schema}
        chat["response_format"] = {"type": "json_schema", "json_schema": form}
    return chat
