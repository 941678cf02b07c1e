"""LM Studio's REST API, v0 and v1: translation of a request into a chat request."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final, Literal

from mlxproxy.dialects import conversation, fields
from mlxproxy.dialects.form import COUNTED, Clock, Json, MakeId, Translated, random_id
from mlxproxy.dialects.lmstudio_answer import LMStudioAnswer, LMStudioV0Answer
from mlxproxy.dialects.responses_items import messages_of
from mlxproxy.dialects.responses_store import ResponsesStore
from mlxproxy.dialects.responses_tools import Tools
from mlxproxy.errors import InvalidRequest

TEMPERATURE: Final = 0.8  # if neither the request nor the model's files set one

_NAMES: Final = {
    "model": "model",
    "stream": "stream",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "max_output_tokens": "max_tokens",
}
_REASONING: Final[Mapping[str, Json]] = {
    "off": {"enable_thinking": False},
    "on": {"enable_thinking": True},
    "low": {"reasoning_effort": "low"},
    "medium": {"reasoning_effort": "medium"},
    "high": {"reasoning_effort": "high"},
}


class NotImplementedHere(InvalidRequest):
    """A feature of LM Studio that this server does not have."""

    status = 501
    code = "not_implemented"


def translate_v0(
    body: Mapping[str, Any],
    kind: Literal["chat", "text"] = "chat",
    now: Clock = time.time,
    clock: Clock = time.monotonic,
) -> Translated:
    """Return the chat request for a v0 completion, and the encoder of its answer.

    The request is in OpenAI's form: the guard checks its messages as they are, and
    :func:`~mlxproxy.dialects.conversation.settled` follows the guard.

    Args:
        kind: the endpoint's kind.
        now: returns seconds since 1970.
        clock: returns seconds, to time the answer.
    """
    body = fields.body_of(body)
    stream = fields.flag(body, "stream", False)
    options = body.get("stream_options")
    wants_usage = isinstance(options, dict) and options.get("include_usage") is True
    chat = {name: value for name, value in body.items() if name != "ttl"} | dict(COUNTED)
    if "messages" in chat:
        chat["messages"] = conversation.repaired(chat["messages"])
    answer = LMStudioV0Answer(fields.model(body), kind, wants_usage, random_id, now, clock)
    return Translated(chat, answer, stream, {}, TEMPERATURE, kind=kind)


def ttl(body: Mapping[str, Any]) -> float | None:
    """Return the idle seconds after which a model that this request loads is unloaded.

    Raises:
        InvalidRequest: it is not a number of seconds.
    """
    value = body.get("ttl")
    if value is not None and (type(value) not in (int, float) or not 0 < value < 1e10):
        fields.refuse("ttl", "a number of seconds above 0")
    return None if value is None else float(value)


def translate_v1(
    body: Mapping[str, Any],
    store: ResponsesStore,
    make_id: MakeId = random_id,
    clock: Clock = time.monotonic,
) -> Translated:
    """Return the chat request for an `/api/v1/chat`, and the encoder of its answer.

    Args:
        store: holds earlier answers, and takes this one.
        clock: returns seconds, to time the answer.

    Raises:
        InvalidRequest: a field cannot be translated; the error has LM Studio's name for it.
        NotImplementedHere: it asks for tools that the server runs.
    """
    body = fields.body_of(body)
    if body.get("integrations"):
        raise NotImplementedHere(
            "integrations: this server runs no tools. Leave it out, or offer tools of your own to "
            "/v1/chat/completions or /v1/responses.",
            param="integrations",
        )
    stream = fields.flag(body, "stream", False)
    items: list[Json] = []
    if (previous := body.get("previous_response_id")) is not None:
        items = store.conversation(fields.a_text(previous, "previous_response_id"))
    if system := fields.a_text(body.get("system_prompt") or "", "system_prompt"):
        items = [item for item in items if item.get("role") != "system"]
        items.insert(0, {"type": "message", "role": "system", "content": system})
    items.append({"type": "message", "role": "user", "content": _input(body.get("input"))})
    chat: Json = {**fields.kept(body, _NAMES), **COUNTED}
    chat.setdefault("max_tokens", -1)
    chat["messages"] = conversation.settled(messages_of(items, Tools()))
    if (reasoning := body.get("reasoning")) is not None:
        if not isinstance(reasoning, str) or reasoning not in _REASONING:
            fields.refuse("reasoning", f"one of {', '.join(_REASONING)}")
        chat |= _REASONING[reasoning]
    answer = LMStudioAnswer(
        fields.model(body),
        make_id=make_id,
        clock=clock,
        remember=(lambda response: store.put(response, items))
        if fields.flag(body, "store", True)
        else None,
    )
    names = fields.inverted(_NAMES)
    names |= {"enable_thinking": "reasoning", "reasoning_effort": "reasoning"}
    return Translated(chat, answer, stream, names, TEMPERATURE)


def _input(given: Any) -> list[Json]:
    """Return the user's text and images as content parts of Responses."""
    if isinstance(given, str) and given:
        return [{"type": "input_text", "text": given}]
    if not isinstance(given, list) or not given:
        fields.refuse("input", "a string or a list of messages and images, and not empty")
    parts: list[Json] = []
    for index, item in enumerate(given):
        place = f"input[{index}]"
        item = fields.an_object(item, place)
        kind = item.get("type")
        if kind in ("message", "text"):  # the docs have both
            parts.append(
                {
                    "type": "input_text",
                    "text": fields.a_text(item.get("content"), f"{place}.content"),
                }
            )
        elif kind == "image":
            url = fields.a_text(item.get("data_url"), f"{place}.data_url")
            if not url.startswith("data:"):
                fields.refuse(f"{place}.data_url", "a data URL (data:image/png;base64,…)")
            parts.append({"type": "input_image", "image_url": url})
        else:
            fields.refuse(f"{place}.type", "message, text or image")
    return parts
