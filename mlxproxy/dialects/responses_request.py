"""OpenAI's Responses: translation of a request into a chat request."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from mlxproxy.dialects import conversation, fields
from mlxproxy.dialects.form import COUNTED, Clock, Json, MakeId, Translated, random_id
from mlxproxy.dialects.responses_answer import ResponsesAnswer
from mlxproxy.dialects.responses_items import items_of, messages_of, resolved
from mlxproxy.dialects.responses_store import ResponsesStore
from mlxproxy.dialects.responses_tools import Tools
from mlxproxy.errors import InvalidRequest
from mlxproxy.guard.shapes import EFFORTS

_NAMES: Final = {
    "model": "model",
    "temperature": "temperature",
    "top_p": "top_p",
    "max_output_tokens": "max_tokens",
    "stream": "stream",
}
_REFUSED: Final = {
    "background": "send the request again without it and wait for the answer",
    "conversation": "send previous_response_id, or the whole conversation as input",
    "prompt": "send the text itself as instructions and input",
}


def translate(
    body: Mapping[str, Any],
    store: ResponsesStore,
    make_id: MakeId = random_id,
    now: Clock = time.time,
) -> Translated:
    """Return the chat request for a Responses request, and the encoder of its answer.

    An answer that is to be stored is stored when it is complete, before its last event is sent.

    Args:
        store: holds earlier answers, and takes this one.
        now: returns seconds since 1970.

    Raises:
        InvalidRequest: a field cannot be translated; the error has its name in Responses.
    """
    body = fields.body_of(body)
    stream = fields.flag(body, "stream", False)
    for name, advice in _REFUSED.items():
        if body.get(name):
            raise InvalidRequest(f"{name} is not supported: {advice}.", param=name)
    earlier: list[Json] = []
    if (previous := body.get("previous_response_id")) is not None:
        earlier = store.conversation(fields.a_text(previous, "previous_response_id"))
    items = earlier + resolved(items_of(body.get("input")), store.item)
    tools = Tools()
    tools.add(fields.a_list(body.get("tools") or [], "tools"), "tools")
    for index, item in enumerate(items):
        if item.get("type") == "additional_tools":
            where = f"input[{index}].tools"
            tools.add(fields.a_list(item.get("tools") or [], where), where)
    answer = ResponsesAnswer(
        fields.model(body),
        echo=_echo(body),
        tools=tools,
        make_id=make_id,
        now=now,
        replayable=_includes(body, "reasoning.encrypted_content"),
        remember=(lambda response: store.put(response, items))
        if fields.flag(body, "store", True)
        else None,
    )
    chat = _chat(body, items, tools, len(earlier)) if items else None
    return Translated(
        chat,
        answer,
        stream,
        fields.inverted(_NAMES)
        | {"reasoning_effort": "reasoning.effort", "response_format": "text.format"},
        temperature=1.0,
        optional=frozenset({"reasoning_effort"}),
    )


def _chat(body: Mapping[str, Any], items: list[Json], tools: Tools, earlier: int) -> Json:
    chat = {**fields.kept(body, _NAMES), **COUNTED}
    chat.setdefault("max_tokens", -1)  # Codex sends none, and treats a truncated answer as an error
    messages = messages_of(items, tools, earlier)
    if instructions := fields.a_text(body.get("instructions") or "", "instructions"):
        messages.insert(0, {"role": "system", "content": instructions})
    messages = conversation.settled(messages)
    if not messages or messages[-1]["role"] == "system":
        messages.append({"role": "user", "content": " "})
    chat["messages"] = messages
    choice = tools.choice(body.get("tool_choice"))
    if tools.functions:
        chat["tools"] = tools.functions
        if choice is not None:
            chat["tool_choice"] = choice
    reasoning = fields.an_object(body.get("reasoning") or {}, "reasoning")
    if (effort := reasoning.get("effort")) is not None:
        if not isinstance(effort, str) or effort not in EFFORTS:
            fields.refuse("reasoning.effort", f"one of {', '.join(sorted(EFFORTS))}")
        chat["reasoning_effort"] = effort
    text = fields.an_object(body.get("text") or {}, "text")
    if form := text.get("format"):
        chat["response_format"] = _format(fields.an_object(form, "text.format"))
    return chat


def _format(form: Json) -> Json:
    """Return chat's response format: it is flat here; in chat, a schema is one level deeper."""
    if form.get("type") != "json_schema":
        return form
    schema = fields.an_object(form.get("schema"), "text.format.schema")
    kept = {key: form[key] for key in ("name", "description", "strict") if key in form}
    return {"type": "json_schema", "json_schema": {**kept, "schema": schema}}


def _includes(body: Mapping[str, Any], name: str) -> bool:
    include = body.get("include")
    return isinstance(include, list) and name in include


def _echoed(tool: Json) -> Json:
    """Return a tool as an answer repeats it: with each field of its kind."""
    if tool.get("type") != "function":
        return tool
    return {"description": None, "parameters": None, "strict": None, **tool}


def _echo(body: Mapping[str, Any]) -> Json:
    """Return the fields of the request that an answer repeats."""
    reasoning = body.get("reasoning")
    effort = reasoning.get("effort") if isinstance(reasoning, dict) else None
    summary = reasoning.get("summary") if isinstance(reasoning, dict) else None
    temperature, top_p = body.get("temperature"), body.get("top_p")
    return {
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": body.get("previous_response_id"),
        "reasoning": {"effort": effort, "summary": summary},
        "store": body.get("store") is not False,
        "temperature": 1.0 if temperature is None else temperature,
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": [_echoed(tool) for tool in body.get("tools") or []],
        "top_p": 1.0 if top_p is None else top_p,
        "truncation": "disabled",
        "metadata": body.get("metadata") or {},
        # The schema of a response has all of these, too.
        "background": False,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "top_logprobs": 0,
        "max_tool_calls": body.get("max_tool_calls"),
        "prompt_cache_key": body.get("prompt_cache_key"),
        "safety_identifier": body.get("safety_identifier"),
        "service_tier": "default",
    }
