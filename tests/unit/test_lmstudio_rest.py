"""LM Studio's REST API, v0 and v1: requests, answers with their progress, and lists of models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxproxy.catalog.model import Capabilities, Model
from mlxproxy.dialects import conversation, lmstudio_models, lmstudio_request
from mlxproxy.dialects.form import NOTHING, Timing, Translated, in_their_words
from mlxproxy.dialects.lmstudio_answer import LMStudioAnswer, LMStudioV0Answer
from mlxproxy.dialects.responses_store import PreviousResponseNotFound, ResponsesStore
from mlxproxy.engines.mlx_lm.rules import RULES
from mlxproxy.errors import InvalidRequest, NoModelLoaded
from mlxproxy.guard import check
from mlxproxy.guard.shapes import Limits
from tests.support import chat_wire as wire
from tests.support.strict_readers import lmstudio_result

LIMITS = Limits(template_kwargs=frozenset({"enable_thinking", "reasoning_effort"}))
USER = {"role": "user", "content": "Hello"}


def translated(
    given: Any = "Hello", kept: ResponsesStore | None = None, **fields: Any
) -> Translated:
    body = json.loads(json.dumps({"model": "alpha", "input": given, **fields}))
    return lmstudio_request.translate_v1(body, kept or ResponsesStore(), wire.numbered())


def chat(given: Any = "Hello", kept: ResponsesStore | None = None, **fields: Any) -> Any:
    """The chat request, which the guard takes as it is."""
    request = translated(given, kept, **fields).chat
    check.check(request, RULES["chat"], LIMITS)
    return request


def ticking(*moments: float) -> Callable[[], float]:
    """A clock that tells these times, then the last one for ever."""
    left = list(moments)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def answer(clock: Callable[[], float] = lambda: 0.0) -> LMStudioAnswer:
    return LMStudioAnswer("alpha", make_id=wire.numbered(), clock=clock)


def kinds(data: bytes) -> list[str]:
    return [event["type"] for event in wire.events(data)]


# -- v1, requests


def test_the_plainest_request_is_a_chat_as_long_as_it_can_be() -> None:
    assert chat(system_prompt="Be brief.", repeat_penalty=1.1, context_length=4096) == {
        "model": "alpha",
        "repetition_penalty": 1.1,
        "max_tokens": -1,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "Be brief."}, USER],
    }


def test_messages_and_images_are_one_turn() -> None:
    url = f"data:image/png;base64,{wire.PNG}"
    given = [
        {"type": "message", "content": "What is"},
        {"type": "text", "content": "this?"},
        {"type": "image", "data_url": url},
    ]
    assert chat(given)["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is\n\nthis?"},
                {"type": "image_url", "image_url": {"url": url}},
            ],
        }
    ]


@pytest.mark.parametrize(
    ("reasoning", "expected"),
    [
        ("off", {"enable_thinking": False}),
        ("on", {"enable_thinking": True}),
        ("high", {"reasoning_effort": "high"}),
        (None, {}),
    ],
)
def test_reasoning_can_be_asked_for(reasoning: Any, expected: Any) -> None:
    assert chat(reasoning=reasoning) == chat() | expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"given": ""}, "input"),
        ({"given": []}, "input"),
        ({"given": [5]}, "input[0]"),
        ({"given": [{"type": "video"}]}, "input[0].type"),
        ({"given": [{"type": "image", "data_url": "https://x/a.png"}]}, "input[0].data_url"),
        ({"reasoning": "some"}, "reasoning"),
        ({"integrations": ["mcp"]}, "integrations"),
        ({"system_prompt": 5}, "system_prompt"),
        ({"store": "yes"}, "store"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        translated(**fields)
    assert refusal.value.param == param


def test_the_guards_refusal_has_the_clients_name_of_the_field() -> None:
    made = translated(max_output_tokens=0)
    with pytest.raises(InvalidRequest) as refusal:
        check.check(made.chat, RULES["chat"], LIMITS)
    assert in_their_words(refusal.value, made.names).param == "max_output_tokens"


def test_a_chat_goes_on_from_any_of_its_answers_with_its_system_prompt() -> None:
    store = ResponsesStore()

    def answered(given: str, text: str, **fields: Any) -> str:
        made = lmstudio_request.translate_v1({"input": given, "stream": True, **fields}, store)
        data = wire.sent(made.answer, wire.reasoning("Hm."), wire.text(text), wire.end())
        identity: str = lmstudio_result(data)["response_id"]
        return identity

    first = answered("One?", "One.", system_prompt="Count.")
    second = answered("Two?", "Two.", previous_response_id=first)
    messages = chat("Three?", store, previous_response_id=second)["messages"]
    said = ["Count.", "One?", "One.", "Two?", "Two.", "Three?"]
    assert [message["content"] for message in messages] == said
    assert messages[2]["reasoning_content"] == "Hm."
    other = chat("Or?", store, previous_response_id=first, system_prompt="Be brief.")["messages"]
    assert [message["content"] for message in other] == ["Be brief.", "One?", "One.", "Or?"]
    with pytest.raises(PreviousResponseNotFound):
        translated("Hi", store, previous_response_id="resp_gone")


def test_what_is_not_to_be_stored_has_no_id() -> None:
    assert "response_id" not in json.loads(translated(store=False).answer.whole(NOTHING))
    assert json.loads(translated().answer.whole(NOTHING))["response_id"] == "resp_1"


# -- v1, answers


def test_a_stream_tells_of_the_load_the_prompt_and_the_answer() -> None:
    encoder = answer(ticking(0.0, 3.0, 5.0, 9.0))
    encoder.loaded = 2.0
    stream = [
        b": loading beta 1s\n\n",
        b": loading beta 2s 50%\n\n",
        wire.sse.comment(),
        b": keepalive 2048/8192\n\n",
        wire.reasoning("Hm."),
        wire.text("\n"),
        wire.text("Hi"),
        wire.end(),
    ]
    data = b"".join(wire.TranslatedStream((item for item in stream), encoder))
    assert kinds(data) == [
        "chat.start",
        "model_load.start",
        "model_load.progress",
        "model_load.end",
        "prompt_processing.start",
        "prompt_processing.progress",
        "prompt_processing.end",
        "reasoning.start",
        "reasoning.delta",
        "reasoning.end",
        "message.start",
        "message.delta",
        "message.end",
        "chat.end",
    ]
    told = {event["type"]: event for event in wire.events(data)}
    assert told["model_load.progress"]["progress"] == 0.5
    assert told["model_load.end"]["load_time_seconds"] == 2.0
    assert told["prompt_processing.progress"]["progress"] == 0.25
    assert lmstudio_result(data) == {
        "model_instance_id": "alpha",
        "output": [
            {"type": "reasoning", "content": "Hm."},
            {"type": "message", "content": "\nHi"},
        ],
        "stats": {
            "input_tokens": 30,
            "total_output_tokens": 7,
            "reasoning_output_tokens": 1,
            "tokens_per_second": 1.75,
            "time_to_first_token_seconds": 5.0,
            "model_load_time_seconds": 2.0,
        },
    }


def test_while_nothing_comes_there_are_comments() -> None:
    data = wire.sent(answer(), b": waiting for the backend\n\n", wire.text("Hi"), wire.end())
    assert b": waiting for the backend\n\n" in data


@pytest.mark.parametrize(
    "before", [[], [b": loading beta 1s\n\n"], [wire.text("Hel")], [wire.reasoning("Hm.")]]
)
def test_the_stream_ends_with_chat_end_after_an_error_too(before: list[bytes]) -> None:
    error = wire.sse.event(NoModelLoaded("Load one.").body())
    stream = (item for item in [*before, error])
    data = b"".join(wire.TranslatedStream(stream, answer()))
    assert kinds(data)[-2:] == ["error", "chat.end"]
    assert wire.events(data)[-2]["error"]["message"] == "Load one."
    assert "response_id" not in lmstudio_result(data)


def test_a_call_of_a_tool_that_nobody_offered_is_told() -> None:
    data = wire.sent(answer(), wire.calls(wire.call("ls", {"a": 1})), wire.end("tool_calls"))
    (call,) = lmstudio_result(data)["output"]
    assert call["type"] == "invalid_tool_call"
    assert call["metadata"] == {"type": "invalid_name", "tool_name": "ls", "arguments": {"a": 1}}


def test_a_whole_answer_is_the_result() -> None:
    completion = wire.whole(reasoning="Hm.", content="Hi.")
    told = json.loads(answer().whole(completion, Timing(1.0, 2.0, 4.0)))
    assert told["output"] == [
        {"type": "reasoning", "content": "Hm."},
        {"type": "message", "content": "Hi."},
    ]
    assert told["stats"] == {
        "input_tokens": 30,
        "total_output_tokens": 7,
        "reasoning_output_tokens": 4,
        "tokens_per_second": 1.75,
        "time_to_first_token_seconds": 3.0,
    }


PIECES = st.one_of(
    st.builds(wire.text, st.text(max_size=5)),
    st.builds(wire.reasoning, st.text(max_size=5)),
    st.just(wire.calls(wire.call("ls", {"a": 1}))),
    st.just(b": waiting\n\n"),
)
WAITS = st.lists(
    st.sampled_from([b": loading beta 1s\n\n", b": loading beta 2s 40%\n\n", b": waiting\n\n"]),
    max_size=3,
)


@given(WAITS, st.integers(0, 2), st.lists(PIECES, max_size=10))
def test_any_stream_is_in_the_documented_order(
    waits: list[bytes], prompts: int, pieces: list[bytes]
) -> None:
    stream = [*waits, wire.sse.comment(), *[b": keepalive 1/2\n\n"] * prompts, *pieces, wire.end()]
    lmstudio_result(b"".join(wire.TranslatedStream((item for item in stream), answer())))


@given(st.lists(PIECES, max_size=6), st.data())
def test_the_same_stream_comes_of_any_pieces(pieces: list[bytes], data: st.DataObject) -> None:
    stream = b"".join([*pieces, wire.end()])
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    assert wire.sent(answer(), *wire.in_pieces(stream, cuts)) == wire.sent(answer(), stream)


# -- v0


def v0(kind: Any = "chat", usage: bool = False) -> LMStudioV0Answer:
    clock = ticking(0.0, 1.0, 3.0, 7.0)
    return LMStudioV0Answer("alpha", kind, usage, wire.numbered(), lambda: 5.0, clock)


def chunks(data: bytes) -> list[Any]:
    blocks = [block for block in data.split(b"\n\n") if block.startswith(b"data: {")]
    return [json.loads(block[6:]) for block in blocks]


def test_v0_is_openais_request_with_a_time_to_live() -> None:
    late = {"role": "system", "content": "Be brief."}
    broken = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "ls", "arguments": "{cut"}}
        ],
    }
    body = {"model": "alpha", "messages": [USER, broken, late], "ttl": 60, "max_tokens": -1}
    made = lmstudio_request.translate_v0(body)
    assert made.chat is not None
    assert "ttl" not in made.chat
    assert lmstudio_request.ttl(body) == 60
    checked = check.check(made.chat, RULES["chat"], LIMITS)
    settled = conversation.settled(checked["messages"])
    assert [message["role"] for message in settled] == ["user", "assistant", "user"]
    with pytest.raises(InvalidRequest):
        lmstudio_request.ttl({"ttl": "soon"})


def test_v0_streams_chunks_and_what_it_took_in_the_last() -> None:
    encoder = v0(usage=True)
    encoder.about = {"model_info": {"arch": "qwen3"}, "runtime": {"name": "mlx-lm"}}
    data = wire.sent(
        encoder,
        wire.reasoning("Hm."),
        wire.text("Hi"),
        wire.calls(wire.call("ls", {})),
        wire.end("tool_calls"),
    )
    assert data.endswith(b"data: [DONE]\n\n")
    thought, said, called, last, usage = chunks(data)
    assert thought["choices"][0]["delta"]["reasoning_content"] == "Hm."
    assert said == {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 5,
        "model": "alpha",
        "choices": [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": "Hi"},
                "finish_reason": None,
            }
        ],
    }
    assert called["choices"][0]["delta"]["tool_calls"][0] == {
        "index": 0,
        "id": wire.UUID,
        "type": "function",
        "function": {"name": "ls", "arguments": "{}"},
    }
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    assert last["stats"] == {
        "tokens_per_second": 1.75,
        "time_to_first_token": 3.0,
        "generation_time": 4.0,
        "stop_reason": "toolCalls",
    }
    assert last["model_info"] == {"arch": "qwen3"}
    assert usage["usage"]["total_tokens"] == 37
    assert usage["choices"] == []
    assert all("usage" not in chunk for chunk in chunks(wire.sent(v0(), wire.end())))


def test_v0_calls_the_model_by_the_name_of_the_one_that_answers() -> None:
    encoder = v0()
    encoder.on_text("a")
    encoder.model = "nc/beta"
    assert chunks(encoder.on_text("b") + encoder.finish())[0]["model"] == "nc/beta"


def test_v0_continues_a_text() -> None:
    choice = {"index": 0, "finish_reason": None, "text": "upon"}
    chunk = wire.sse.event({**wire.HEAD, "object": "text_completion", "choices": [choice]})
    said, last = chunks(wire.sent(v0("text"), chunk, wire.end("length")))
    assert (said["object"], said["choices"][0]["text"]) == ("text_completion", "upon")
    assert last["stats"]["stop_reason"] == "maxPredictedTokensReached"


def test_v0_tells_an_error_in_the_stream() -> None:
    data = wire.sent(v0(), wire.text("Hel"), wire.sse.event(NoModelLoaded("Load one.").body()))
    assert chunks(data)[-1]["error"]["message"] == "Load one."
    assert b"[DONE]" not in data


def test_v0_tells_the_same_of_a_whole_answer() -> None:
    completion = wire.whole(reasoning="Hm.", content="Hi.")
    told = json.loads(v0().whole(completion, Timing(1.0, 2.0, 4.0)))
    assert told["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Hi.",
        "reasoning": "Hm.",
        "reasoning_content": "Hm.",
    }
    assert told["stats"]["stop_reason"] == "eosFound"
    assert told["usage"]["prompt_tokens"] == 30


# -- models


def entry(identity: str = "nc/alpha", **fields: Any) -> dict[str, Any]:
    return Model(identity, Path("/models") / identity, publisher="nc", **fields).to_dict()


def test_models_of_v0_tell_which_is_loaded() -> None:
    known = entry(
        type="llm",
        compatibility_type="mlx",
        architecture="qwen3",
        quantization={"name": "4-bit"},
        max_context_length=40960,
        capabilities=Capabilities(tools=True),
    )
    first, second = lmstudio_models.v0([known, entry("nc/beta")], {"nc/alpha": 8192})["data"]
    assert first == {
        "id": "nc/alpha",
        "object": "model",
        "type": "llm",
        "publisher": "nc",
        "arch": "qwen3",
        "compatibility_type": "mlx",
        "quantization": "4-bit",
        "state": "loaded",
        "max_context_length": 40960,
        "loaded_context_length": 8192,
        "capabilities": ["tool_use"],
    }
    assert second["state"] == "not-loaded"
    assert second["arch"] == "unknown"


def test_models_of_v1_tell_what_they_can_and_where_they_are_loaded() -> None:
    known = entry(
        type="llm",
        compatibility_type="mlx",
        parameters=4_022_468_096,
        quantization={"name": "4-bit", "bits": 4},
        capabilities=Capabilities(tools=True, thinking=True, thinking_switch=True),
    )
    first, second = lmstudio_models.v1([known, entry("nc/beta")], {"nc/alpha": 8192})["models"]
    assert first["loaded_instances"] == [{"id": "nc/alpha", "config": {"context_length": 8192}}]
    assert first["params_string"] == "4.0B"
    assert first["quantization"] == {"name": "4-bit", "bits_per_weight": 4}
    assert first["capabilities"] == {
        "vision": False,
        "trained_for_tool_use": True,
        "reasoning": {"allowed_options": ["off", "on"], "default": "on"},
    }
    assert second["loaded_instances"] == []
    assert second["quantization"] is None
    embedding = lmstudio_models.v1([entry(type="embedding")], {})["models"][0]
    assert embedding["type"] == "embedding"
    assert "capabilities" not in embedding
