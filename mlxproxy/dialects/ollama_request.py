"""Ollama's chat and generate: translation of a request into a chat request."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from typing import Any, Final

from mlxproxy.dialects import conversation, fields
from mlxproxy.dialects.form import COUNTED, Clock, Json, MakeId, Translated, random_id
from mlxproxy.dialects.ollama_answer import OllamaAnswer, Only
from mlxproxy.errors import InvalidRequest
from mlxproxy.guard.shapes import EFFORTS

LATEST: Final = ":latest"  # some clients append this to each name without a colon
TEMPERATURE: Final = 0.8  # Ollama's own, if the model's files set none

# All other options tune Ollama's own engine or its memory use.
_OPTIONS: Final = {
    "num_predict": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "repetition_context_size",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
_NAMES: Final = {
    **{chat: f"options.{name}" for name, chat in _OPTIONS.items()},
    "response_format": "format",
    "enable_thinking": "think",
    "reasoning_effort": "think",
}
# How the base64 of each kind of image begins.
_IMAGE_TYPES: Final = {"iVBOR": "png", "/9j/": "jpeg", "R0lGOD": "gif", "UklGR": "webp"}
LONGEST_DURATION: Final = 64  # characters
_FOR_EVER_SECONDS: Final = 1e10
_DURATION = re.compile(r"([-+]?)((?:(?:\d+\.?\d*|\.\d+)(?:ns|us|µs|μs|ms|s|m|h))+)")
_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_UNITS: Final = {
    "ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0,
}  # fmt: skip


def translate_chat(
    body: Mapping[str, Any],
    make_id: MakeId = random_id,
    now: Clock = time.time,
    clock: Clock = time.monotonic,
) -> Translated:
    """Return the chat request for an `/api/chat`, and the encoder of its answer.

    Without messages, it asks for a load or an unload: see :func:`keep_alive`.

    Args:
        now: returns seconds since 1970.
        clock: returns seconds, to time the answer.

    Raises:
        InvalidRequest: a field cannot be translated; the error has Ollama's name for it.
    """
    body = fields.body_of(body)
    _refuse_log_probabilities(body)
    given = fields.a_list(body.get("messages") or [], "messages")
    chat: Json | None = None
    only = _only(body, empty=not given)
    if only is None:
        chat = _common(body)
        chat["messages"] = conversation.settled(_Messages().all(given))
        if body.get("tools"):
            chat["tools"] = fields.a_list(body["tools"], "tools")
    answer = OllamaAnswer(_asked(body), "chat", make_id, now, clock, only)
    return _translated(body, chat, answer, only)


def translate_generate(
    body: Mapping[str, Any],
    make_id: MakeId = random_id,
    now: Clock = time.time,
    clock: Clock = time.monotonic,
) -> Translated:
    """Return the request for an `/api/generate`, and the encoder of its answer.

    If it asks for a raw prompt, without a template, the result is for the backend's text
    completions. Without a prompt, it asks for a load or an unload: see :func:`keep_alive`.

    Args: see :func:`translate_chat`.

    Raises:
        InvalidRequest: a field cannot be translated; the error has Ollama's name for it.
    """
    body = fields.body_of(body)
    _refuse_log_probabilities(body)
    for name, advice in _REFUSED.items():
        if body.get(name):
            raise InvalidRequest(f"{name}: {advice}", param=name)
    prompt = fields.a_text(body.get("prompt") or "", "prompt")
    images = _images(body.get("images"), "images")
    raw = fields.flag(body, "raw", False)
    chat: Json | None = None
    only = _only(body, empty=not prompt and not images)
    if only is None:
        chat = _common(body)
        if raw:
            chat["prompt"] = prompt
            for name in ("enable_thinking", "reasoning_effort"):
                chat.pop(name, None)
        else:
            content = conversation.joined(images, prompt) if images else prompt
            messages = [{"role": "user", "content": content}]
            if system := fields.a_text(body.get("system") or "", "system"):
                messages.insert(0, {"role": "system", "content": system})
            chat["messages"] = messages
    answer = OllamaAnswer(_asked(body), "generate", make_id, now, clock, only)
    made = _translated(body, chat, answer, only)
    return made._replace(kind="text") if raw else made


SHORTEST_TTL_SECONDS: Final = 1.0  # for a keep_alive of 0: the answer comes before the unload

_REFUSED: Final = {
    "suffix": "this model does not support insert.",
    "template": "the model's own chat template is used. With raw, the prompt is used as it is.",
    "context": "send the conversation as messages to /api/chat.",
}


def keep_alive(body: Mapping[str, Any]) -> float | None:
    """Return how many seconds the model is to stay loaded after the answer.

    None: the request does not say; infinity: forever; 0: unload it as soon as it is idle.

    Raises:
        InvalidRequest: it is not a duration.
    """
    value = body.get("keep_alive")
    if value is None:
        return None
    seconds = _seconds(value.strip()) if isinstance(value, str) else value
    if type(seconds) not in (int, float) or seconds != seconds:
        fields.refuse("keep_alive", 'seconds, or a duration such as "5m"; -1 means for ever')
    return float(seconds) if 0 <= seconds < _FOR_EVER_SECONDS else math.inf


def ttl(body: Mapping[str, Any]) -> float | None:
    """Return the ttl of a load that the request causes: 0 means for ever, None the setting's.

    Raises:
        InvalidRequest: see :func:`keep_alive`.
    """
    seconds = keep_alive(body)
    if seconds is None:
        return None
    return 0.0 if math.isinf(seconds) else max(seconds, SHORTEST_TTL_SECONDS)


def _seconds(text: str) -> Any:
    """Return the seconds in a text: a duration in Go's format, or a number of seconds."""
    if len(text) > LONGEST_DURATION:
        return None
    if found := _DURATION.fullmatch(text):
        seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(found[2]))
        return -seconds if found[1] == "-" else seconds
    try:
        return float(text)
    except ValueError:
        return None


def _asked(body: Mapping[str, Any]) -> str:
    return fields.model(body).removesuffix(LATEST)


def _only(body: Mapping[str, Any], empty: bool) -> Only:
    """Return what a request without a prompt asks for: a load or an unload."""
    seconds = keep_alive(body)
    if not empty:
        return None
    return "unload" if seconds == 0 else "load"


def _translated(
    body: Mapping[str, Any], chat: Json | None, answer: OllamaAnswer, only: Only
) -> Translated:
    # Ollama answers a load with one object; whoever asks for a stream of it learns that it goes on.
    stream = fields.flag(body, "stream", only is None) and only != "unload"
    if chat is not None:
        chat["stream"] = stream
    return Translated(chat, answer, stream, _NAMES, TEMPERATURE)


def _common(body: Mapping[str, Any]) -> Json:
    """Return the fields that chat and generate have in common."""
    options = fields.an_object(body.get("options") or {}, "options")
    chat: Json = {"model": _asked(body), **fields.kept(options, _OPTIONS), **COUNTED}
    if chat.get("max_tokens", -1) in (-1, -2):  # no limit except the end of the context
        chat["max_tokens"] = -1
    if chat.get("repetition_context_size") == -1:  # all of the context
        del chat["repetition_context_size"]
    elif chat.get("repetition_context_size") == 0:  # none of it
        del chat["repetition_context_size"]
        chat.pop("repetition_penalty", None)
    think = body.get("think")
    if isinstance(think, bool):
        chat["enable_thinking"] = think
    elif think is not None and think != "":
        if not isinstance(think, str) or think not in EFFORTS:
            fields.refuse("think", "true, false, low, medium or high")
        chat["reasoning_effort"] = think
    form = body.get("format")
    if form == "json":
        chat["response_format"] = {"type": "json_object"}
    elif form is not None and form != "":
        schema = fields.an_object(form, "format")
        chat["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema},
        }
    return chat


def _refuse_log_probabilities(body: Mapping[str, Any]) -> None:
    for name in ("logprobs", "top_logprobs"):
        if body.get(name):
            raise InvalidRequest(
                f"{name} is not supported here: use /v1/chat/completions.", param=name
            )


class _Messages:
    """Messages in chat's form, which has ids for calls; Ollama's clients mostly send none."""

    def __init__(self) -> None:
        self._calls = 0
        self._open: list[tuple[str, str]] = []  # calls without a result: id and name

    def all(self, given: list[Any]) -> list[Json]:
        return [
            self._message(fields.an_object(message, f"messages[{index}]"), f"messages[{index}]")
            for index, message in enumerate(given)
        ]

    def _message(self, message: Json, place: str) -> Json:
        role = message.get("role")
        if not isinstance(role, str) or role not in ("system", "user", "assistant", "tool"):
            fields.refuse(f"{place}.role", "system, user, assistant or tool")
        text = fields.a_text(message.get("content") or "", f"{place}.content")
        if role == "tool":
            return self._result(message, text)
        made: Json = {"role": role, "content": text}
        if images := _images(message.get("images"), f"{place}.images"):
            made["content"] = conversation.joined(images, text)
        if role == "assistant":
            if thought := message.get("thinking"):
                made["reasoning_content"] = fields.a_text(thought, f"{place}.thinking")
            calls = fields.a_list(message.get("tool_calls") or [], f"{place}.tool_calls")
            if calls:
                self._open = []
                made["tool_calls"] = [
                    self._call(call, f"{place}.tool_calls[{index}]")
                    for index, call in enumerate(calls)
                ]
        return made

    def _call(self, call: Any, place: str) -> Json:
        call = fields.an_object(call, place)
        function = fields.an_object(call.get("function"), f"{place}.function")
        name = fields.a_text(function.get("name"), f"{place}.function.name")
        identity = call.get("id")
        if not isinstance(identity, str) or not identity:
            identity = f"call_{self._calls}"
        self._calls += 1
        self._open.append((identity, name))
        arguments = conversation.arguments(function.get("arguments"))
        made = {"name": name, "arguments": arguments}
        return {"id": identity, "type": "function", "function": made}

    def _result(self, message: Json, text: str) -> Json:
        """Return the result as a message, matched to a call.

        The call is the one that it names, else the first open call of that tool, else the first
        open call. A call is open while it has no result.
        """
        made: Json = {"role": "tool", "content": text}
        wanted, tool = message.get("tool_call_id"), message.get("tool_name")
        found = next(
            (
                call
                for wish in (
                    lambda call: call[0] == wanted,
                    lambda call: call[1] == tool,
                    lambda call: True,
                )
                for call in self._open
                if wish(call)
            ),
            None,
        )
        if found is not None:
            self._open.remove(found)
            wanted, tool = found
        if isinstance(wanted, str):
            made["tool_call_id"] = wanted
        if isinstance(tool, str):
            made["name"] = tool
        return made


def _images(value: object, place: str) -> list[Json]:
    """Return the images as content parts; clients send them without their type."""
    images = []
    for index, image in enumerate(fields.a_list(value or [], place)):
        data = fields.a_text(image, f"{place}[{index}]")
        if not data.startswith("data:"):
            kinds = (kind for start, kind in _IMAGE_TYPES.items() if data.startswith(start))
            data = f"data:image/{next(kinds, 'png')};base64,{data}"
        images.append(conversation.image(data))
    return images
