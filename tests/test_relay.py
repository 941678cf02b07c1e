"""What the relay makes of bytes: whole events, and whole answers out of a stream's events."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlxproxy.assembly import DONE, Assembly
from mlxproxy.errors import BackendFailed
from mlxproxy.relay import _whole_events

HEAD = {"id": "x", "system_fingerprint": "f", "model": "m", "created": 1}


def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": finish, "delta": {"role": "assistant", **delta}}
    return {**HEAD, "object": "chat.completion.chunk", "choices": [choice]}


def usage(**counts: int) -> dict[str, Any]:
    return {**HEAD, "object": "chat.completion", "choices": [], "usage": counts}


def assemble(events: list[Any], together: bool = False) -> dict[str, Any]:
    """The answer of these events, which come one by one or all in one piece."""
    pieces = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events] + [DONE]
    assembly = Assembly()
    for piece in [b"".join(pieces)] if together else pieces:
        assert not assembly.complete
        assembly.add(piece)
    assert assembly.complete
    answer: dict[str, Any] = json.loads(assembly.answer())
    return answer


def test_half_an_event_waits_for_its_other_half() -> None:
    """An error after half an event could be read by no client."""
    assert _whole_events(b"data: 1\n\nda") == (b"data: 1\n\n", b"da")
    assert _whole_events(b"data: 1\n") == (b"", b"data: 1\n")
    assert _whole_events(b"data: 1\n\n") == (b"data: 1\n\n", b"")


def test_a_whole_answer_has_the_text_the_thoughts_and_the_calls_of_all_events() -> None:
    call = {"function": {"name": "f", "arguments": "{}"}, "type": "function", "id": "c"}
    events = [
        chunk({"reasoning": "hm"}),
        chunk({"content": "a"}),
        chunk({"content": "b", "tool_calls": [{**call, "index": 0}]}),
        chunk({}, "tool_calls"),
        usage(prompt_tokens=1, completion_tokens=2, total_tokens=3),
    ]
    answer = assemble(events)
    assert answer == assemble(events, together=True)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    message = answer["choices"][0]["message"]
    assert message["content"] == "ab"
    assert message["reasoning"] == "hm"
    assert message["tool_calls"] == [call]
    assert answer["usage"]["total_tokens"] == 3


@pytest.mark.parametrize(
    "events",
    [
        [],
        [usage(total_tokens=1)],
        [chunk({"content": "a"}, "stop")],
        [chunk({"content": 5}, "stop"), usage(total_tokens=1)],
        [chunk({"tool_calls": "abc"}, "stop"), usage(total_tokens=1)],
        [{**HEAD, "object": "text_completion", "choices": [{"text": None}]}, usage(total_tokens=1)],
        [{"error": "no event"}],
        ["no event"],
    ],
)
def test_events_that_amount_to_no_answer_are_the_backends_failure(events: list[Any]) -> None:
    with pytest.raises(BackendFailed):
        assemble(events)


def test_an_answer_without_text_has_null_for_content() -> None:
    answer = assemble([chunk({}, "length"), usage(prompt_tokens=1)])
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": None}
