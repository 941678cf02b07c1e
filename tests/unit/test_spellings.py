"""What is edited in the events of a chat: the reasoning's name, and the role's repetition."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxproxy.engines.mlx_lm.wire import MlxLmWire
from mlxproxy.relay.statistics import AnswerStats
from mlxproxy.sse import DONE
from tests.support import chat_wire as wire
from tests.support.fake_connection import FakeConnection, Scene

WIRE = MlxLmWire({"progress"}.__contains__)


def test_thoughts_are_told_under_both_names() -> None:
    data = wire.reasoning('He said "x", then \\ and\n, "reasoning": "y"')
    made = json.loads(WIRE.with_both_spellings(data)[6:])
    delta = made["choices"][0]["delta"]
    assert delta["reasoning"] == delta["reasoning_content"]
    assert delta["reasoning"] == json.loads(data[6:])["choices"][0]["delta"]["reasoning"]


@given(st.text(), st.text())
def test_only_the_name_of_the_field_is_taken_for_it(thought: str, text: str) -> None:
    said = f'{text}, "reasoning": "{text}'
    data = wire.chunk(reasoning=thought, content=said)
    delta = json.loads(WIRE.with_both_spellings(data)[6:])["choices"][0]["delta"]
    assert delta == {
        "role": "assistant",
        "reasoning": thought,
        "reasoning_content": thought,
        "content": said,
    }
    assert WIRE.with_both_spellings(wire.text(said)) == wire.text(said)


def test_an_engine_that_tells_both_itself_is_passed_on() -> None:
    data = wire.chunk(reasoning="Hm.", reasoning_content="Hm.")
    assert WIRE.with_both_spellings(data) == data


def test_several_events_at_once_each_get_both() -> None:
    data = wire.reasoning("a") + wire.text("b") + wire.reasoning("c")
    assert WIRE.with_both_spellings(data).count(b'"reasoning_content": ') == 2


def test_an_event_without_reasoning_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its only cost is one search."""

    def never(self: object, data: bytes) -> bytes:
        raise AssertionError(data)

    monkeypatch.setattr(MlxLmWire, "with_both_spellings", never)
    said = [wire.text('x, "reasoning": "y"'), DONE]
    assert _stream(said) == said


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in one piece"])
def test_each_event_of_a_stream_carries_both(together: bool) -> None:
    said = [wire.reasoning("a"), wire.text("b"), wire.reasoning("c"), wire.chunk("stop"), DONE]
    got = b"".join(_stream([b"".join(said)] if together else said))
    first, *others = map(WIRE.with_both_spellings, said)
    assert got == b"".join([first, *map(WIRE.without_role, others)])
    assert got.count(b'"reasoning_content": ') == 2


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in one piece"])
def test_only_the_first_event_tells_the_role(together: bool) -> None:
    """OpenAI's libraries put the deltas of a field together: "assistantassistantassistant"."""
    spoken = 'He said {"role": "assistant", "x'
    said = [b": keepalive 1/1\n\n", wire.text(spoken), wire.reasoning("b")]
    said += [wire.calls(wire.call("f", {"role": "assistant"})), wire.chunk("stop"), DONE]
    got = b"".join(_stream([b"".join(said)] if together else said))
    events = [json.loads(line[6:]) for line in got.split(b"\n\n") if line.startswith(b"data: {")]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert [delta.pop("role", None) for delta in deltas] == ["assistant", None, None, None]
    assert [delta.keys() - {"reasoning_content"} for delta in deltas] == [
        {"content"},
        {"reasoning"},
        {"tool_calls"},
        set(),
    ]
    assert deltas[0]["content"] == spoken
    assert got.endswith(DONE)


def test_a_translated_answer_is_read_from_one_field() -> None:
    said = [wire.reasoning("a"), wire.chunk("stop"), DONE]
    assert _stream(said, as_chat=False) == said


def _stream(said: list[bytes], as_chat: bool = True) -> list[bytes]:
    scene = Scene(FakeConnection(said)).grant()
    request = replace(scene.request, as_chat=as_chat)
    stream = scene.relay.stream(scene.lease, request, AnswerStats())
    events: list[Any] = list(stream)[1:]  # after the opening comment
    stream.close()
    return events
