"""Readers of streams as strict as the strictest clients, each with the checks that are known."""

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
    """The message of a stream, if Claude Code would take it.

    Each block has the next index, one is open at a time, each delta fits its block and is text, and
    the message has a start, a reason for its end, and an end.
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
