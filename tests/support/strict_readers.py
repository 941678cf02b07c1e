"""Stream readers as strict as the strictest clients, each with the checks that are known."""

from __future__ import annotations

import json
from typing import Any

from tests.support.chat_wire import events

Json = dict[str, Any]

_ANTHROPIC_DELTAS = {
    "text_delta": ("text", "text"),
    "thinking_delta": ("thinking", "thinking"),
    "signature_delta": ("thinking", "signature"),
    "input_json_delta": ("tool_use", "partial_json"),
}


def anthropic_message(data: bytes) -> Json:
    """Return the message of a stream, if Claude Code would accept it.

    Each block has the next index, one is open at a time, each delta fits its block and is text, and
    the message has a start, a stop reason, and an end.
    """
    message: Json = {}
    open_index: int | None = None
    buffer = ""
    stopped = False
    for event in events(data):
        kind = event["type"]
        assert not stopped, "an event after the end"
        if kind == "message_start":
            assert not message, "two starts"
            message = event["message"]
            assert message["content"] == []
            assert message["stop_reason"] is None
            assert message["usage"]["input_tokens"] > 0
            continue
        assert message, f"{kind} before the start"
        if kind == "content_block_start":
            assert open_index is None, "a block is still open"
            open_index = event["index"]
            assert open_index == len(message["content"])
            message["content"].append(event["content_block"])
            buffer = ""
        elif kind == "content_block_delta":
            assert event["index"] == open_index, "a delta of a block that is not open"
            block, delta = message["content"][open_index], event["delta"]
            of, field = _ANTHROPIC_DELTAS[delta["type"]]
            assert block["type"] == of, f"{delta['type']} in {block['type']}"
            assert isinstance(delta[field], str)
            if field == "partial_json":
                buffer += delta[field]
            else:
                block[field] += delta[field]
        elif kind == "content_block_stop":
            assert event["index"] == open_index, "the end of a block that is not open"
            block = message["content"][open_index]
            assert isinstance(block.get("signature", ""), str)
            if block["type"] == "tool_use":
                block["input"] = json.loads(buffer or "{}")
                assert isinstance(block["input"], dict)
            open_index = None
        elif kind == "message_delta":
            assert open_index is None, "dropped connection: an open block"
            assert event["delta"]["stop_reason"], "no reason"
            message |= event["delta"]
            message["usage"] |= event["usage"]
        elif kind == "message_stop":
            assert message["stop_reason"], "no reason"
            stopped = True
        else:
            raise AssertionError(f"unknown event {kind}")
    assert stopped, "dropped connection"
    return message


def response(data: bytes) -> Json:
    """Return the response of a stream, if Codex and OpenAI's SDK would accept it.

    Events are numbered without a gap; an item is announced before any of it arrives, is the same
    at its end and in the whole response, and one is open at a time; the response has one id, and
    one end.
    """
    ids: set[str] = set()
    items: list[Json] = []
    item: Json | None = None
    parts: list[str] = []
    whole: Json = {}
    for number, event in enumerate(events(data)):
        kind = event["type"]
        assert event["sequence_number"] == number
        assert not whole, "an event after the end"
        assert (number == 0) == (kind == "response.created")
        if "response" in event:
            ids.add(event["response"]["id"])
            assert len(ids) == 1, "Lifecycle response identity changed."
            _complete(event["response"])
            if kind in ("response.completed", "response.incomplete", "response.failed"):
                whole = event["response"]
                assert kind == f"response.{whole['status']}"
            continue
        assert event["output_index"] == len(items)
        if kind == "response.output_item.added":
            assert item is None, "an item is still open"
            item, parts = event["item"], []
            assert item["id"] not in {done["id"] for done in items}
            continue
        assert item is not None, f"{kind} without active item"
        if kind == "response.output_item.done":
            done = event["item"]
            same = ("type", "id", "call_id", "name", "namespace")
            assert [done.get(key) for key in same] == [item.get(key) for key in same]
            assert "".join(parts) == _said(done)
            items.append(done)
            item = None
            continue
        assert event["item_id"] == item["id"]
        if kind.endswith("part.added"):
            index = event.get("content_index", event.get("summary_index"))
            held = item["content" if item["type"] == "message" else "summary"]
            assert index == len(held)
            held.append(event["part"])
        elif kind.endswith(".delta"):
            assert kind in _RESPONSE_DELTAS[item["type"]]
            if item["type"] in ("message", "reasoning"):
                held = item["content" if item["type"] == "message" else "summary"]
                assert held[event.get("content_index", event.get("summary_index"))]
            assert isinstance(event["delta"], str)
            parts.append(event["delta"])
        else:
            assert kind.endswith(".done"), f"unknown event {kind}"
            text = event.get("text", event.get("arguments", event.get("input")))
            assert "".join(parts) == (event["part"]["text"] if "part" in event else text)
    assert whole, "stream closed before response.completed"
    if whole["status"] != "failed":
        assert item is None, "Cannot complete response with unfinished output items."
        assert whole["output"] == items
    return whole


_RESPONSE_DELTAS = {
    "message": {"response.output_text.delta"},
    "reasoning": {"response.reasoning_summary_text.delta"},
    "function_call": {"response.function_call_arguments.delta"},
    "custom_tool_call": {"response.custom_tool_call_input.delta"},
}


def _complete(whole: Json) -> None:
    """Check the fields that the types of the SDK require."""
    required = "id created_at model object output parallel_tool_calls tool_choice tools"
    assert not set(required.split()) - whole.keys()
    if whole["usage"] is not None:
        assert type(whole["usage"]["input_tokens_details"]["cached_tokens"]) is int
        assert type(whole["usage"]["output_tokens_details"]["reasoning_tokens"]) is int


def _said(item: Json) -> str:
    if item["type"] == "message":
        return "".join(part["text"] for part in item["content"])
    if item["type"] == "reasoning":
        return "".join(part["text"] for part in item["summary"])
    said: str = item["input" if item["type"] == "custom_tool_call" else "arguments"]
    return said


def ollama_answer(data: bytes) -> Json:
    """Return the message of a stream, if Zed, VS Code, Home Assistant and Ollama's package take it.

    Every line is JSON with text as its content and objects as arguments; only the last one is done,
    and it reports durations that can be divided by.
    """
    assert data.endswith(b"\n")
    message: Json = {"content": "", "thinking": "", "tool_calls": []}
    lines = [json.loads(line) for line in data.decode().split("\n")[:-1]]
    for line in lines:
        assert line["model"]
        assert line["created_at"].endswith("Z")
        assert line["done"] is (line is lines[-1])
        said = line["message"]
        assert said["role"] == "assistant"
        assert isinstance(said["content"], str)
        message["content"] += said["content"]
        message["thinking"] += said.get("thinking", "")
        for call in said.get("tool_calls", ()):
            assert isinstance(call["function"]["arguments"], dict)
            assert call["function"]["index"] == len(message["tool_calls"])
            message["tool_calls"].append(call)
    for name in ("total", "load", "prompt_eval", "eval"):
        duration = lines[-1][f"{name}_duration"]
        assert type(duration) is int
        assert duration > 0
    return {**lines[-1], "message": message}


_V1_PHASES = ("chat", "model_load", "prompt_processing", "answer")


def lmstudio_result(data: bytes) -> Json:
    """Return the result of a v1 stream whose events come in the documented order.

    Each thing that is started is ended before the next one starts, a load comes before the prompt,
    and the prompt before the answer.
    """
    output: list[Json] = []
    open_kind: str | None = None
    phase = 0
    result: Json = {}
    for number, event in enumerate(events(data)):
        kind, _, step = event["type"].partition(".")
        assert not result, "an event after the end"
        assert (number == 0) == (event["type"] == "chat.start")
        if kind in ("chat", "error"):
            if step == "end":
                assert open_kind in (None, "model_load", "prompt_processing")
                result = event["result"]
            continue
        now = _V1_PHASES.index(kind) if kind in _V1_PHASES else 3
        assert now >= phase, f"{kind} after {_V1_PHASES[phase]}"
        phase = now
        if step == "start":
            assert open_kind is None, f"{open_kind} is still open"
            open_kind = kind
            if now == 3:
                output.append({"type": kind, "content": ""})
        elif kind == "tool_call":
            assert open_kind is None
            output.append(
                {"type": "invalid_tool_call", **{k: event[k] for k in ("reason", "metadata")}}
            )
        else:
            assert open_kind == kind, f"{kind}.{step} of what is not open"
            if step == "delta":
                output[-1]["content"] += event["content"]
            elif step == "progress":
                assert 0 <= event["progress"] <= 1
            else:
                assert step == "end"
                open_kind = None
    assert result, "no chat.end"
    assert result["output"] == output
    return result
