"""Ollama's chat and generate: what becomes of a request, what its clients get, and its lists."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxproxy.catalog.model import Model
from mlxproxy.dialects import ollama_models, ollama_request
from mlxproxy.dialects.form import NOTHING, Timing, Translated, in_their_words
from mlxproxy.dialects.ollama_answer import OllamaAnswer
from mlxproxy.engines.mlx_lm.rules import RULES
from mlxproxy.errors import InvalidRequest, NoModelLoaded
from mlxproxy.guard import check
from mlxproxy.guard.shapes import Limits
from tests.support import chat_wire as wire
from tests.support.strict_readers import ollama_answer

LIMITS = Limits(template_kwargs=frozenset({"enable_thinking", "reasoning_effort"}))
USER = {"role": "user", "content": "Hello"}
LS = {"type": "function", "function": {"name": "ls", "parameters": {"type": "object"}}}


def translated(*messages: Any, **fields: Any) -> Translated:
    body = {"model": "alpha", "messages": messages, **fields}
    return ollama_request.translate_chat(json.loads(json.dumps(body)), wire.numbered())


def generated(**fields: Any) -> Translated:
    return ollama_request.translate_generate({"model": "alpha", **fields}, wire.numbered())


def chat(*messages: Any, **fields: Any) -> Any:
    """The chat request, which the guard takes as it is."""
    request = translated(*(messages or [USER]), **fields).chat
    check.check(request, RULES["chat"], LIMITS)
    return request


def ticking(*moments: float) -> Callable[[], float]:
    """A clock that tells these times, then the last one for ever."""
    left = list(moments)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def answer(kind: Any = "chat", clock: Callable[[], float] = lambda: 0.0) -> OllamaAnswer:
    return OllamaAnswer("alpha", kind, wire.numbered(), lambda: 1764000000.5, clock)


def call(name: str, arguments: Any, **fields: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments}, **fields}


def result(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "content": text, **fields}


# -- requests


def test_the_plainest_request_is_streamed_and_without_a_limit() -> None:
    assert chat() == {
        "model": "alpha",
        "messages": [USER],
        "max_tokens": -1,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert translated(USER, stream=False).stream is False


def test_a_model_may_be_called_the_latest() -> None:
    made = translated(USER, model="nc/alpha:latest")
    assert made.chat is not None
    assert (made.chat["model"], made.answer.model) == ("nc/alpha", "nc/alpha")


def test_options_are_the_fields_of_chat_and_those_of_ollamas_engine_are_left_out() -> None:
    options = {
        "num_ctx": 8192,
        "num_gpu": 1,
        "mirostat": 2,
        "num_predict": 50,
        "temperature": 0.1,
        "top_k": 10,
        "min_p": 0.1,
        "repeat_penalty": 1.1,
        "repeat_last_n": 64,
        "presence_penalty": 0.5,
        "stop": "END",
        "seed": 7,
    }
    request = chat(options=options)
    expected = {
        "max_tokens": 50,
        "temperature": 0.1,
        "top_k": 10,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "repetition_context_size": 64,
        "presence_penalty": 0.5,
        "stop": "END",
        "seed": 7,
    }
    assert request == chat() | expected
    assert chat(options={"num_predict": -2, "repeat_last_n": -1, "seed": None}) == chat()
    assert chat(options={"repeat_penalty": 1.1, "repeat_last_n": 0}) == chat()


@pytest.mark.parametrize(
    ("think", "expected"),
    [
        (True, {"enable_thinking": True}),
        (False, {"enable_thinking": False}),
        ("low", {"reasoning_effort": "low"}),
        (None, {}),
    ],
)
def test_thinking_can_be_asked_for(think: Any, expected: Any) -> None:
    assert chat(think=think) == chat() | expected
    assert not translated(USER, think=think).optional  # whoever asks is told if it cannot


def test_a_format_is_a_response_format() -> None:
    made = translated(USER, format="json")
    assert made.chat is not None
    assert made.chat["response_format"] == {"type": "json_object"}
    assert made.names["response_format"] == "format"
    schema = {"type": "object"}
    made = translated(USER, format=schema)
    assert made.chat is not None
    assert made.chat["response_format"]["json_schema"]["schema"] == schema
    assert chat(format="") == chat()


def test_calls_without_ids_are_tied_to_their_results() -> None:
    calls = [call("ls", {"path": "."}), call("cat", {"path": "a"}), call("ls", {"path": "b"})]
    made = chat(
        USER,
        {"role": "assistant", "content": None, "thinking": "Hm.", "tool_calls": calls},
        result("of cat", tool_name="cat"),
        result("of ls"),
        result("of ls b", tool_name="ls"),
        {"role": "assistant", "tool_calls": [call("ls", '{"path": "c"}', id="own")]},
        result("of c", tool_call_id="own"),
        result("of none"),
    )["messages"]
    ids = [call["id"] for call in made[1]["tool_calls"]]
    assert ids == ["call_0", "call_1", "call_2"]
    assert made[1]["reasoning_content"] == "Hm."
    assert [message.get("tool_call_id") for message in made[2:5]] == ["call_1", "call_0", "call_2"]
    assert made[5]["tool_calls"][0] == {
        "id": "own",
        "type": "function",
        "function": {"name": "ls", "arguments": {"path": "c"}},
    }
    assert made[6] == {"role": "tool", "content": "of c", "tool_call_id": "own", "name": "ls"}
    assert made[7] == {"role": "tool", "content": "of none"}


@pytest.mark.parametrize(
    ("image", "kind"),
    [(wire.PNG, "png"), ("/9j/4AAQ", "jpeg"), ("R0lGODlh", "gif"), ("UklGRg", "webp")],
)
def test_an_image_says_itself_what_it_is(image: str, kind: str) -> None:
    made = translated({"role": "user", "content": "What?", "images": [image]})
    assert made.chat is not None
    assert made.chat["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{image}"}},
        {"type": "text", "text": "What?"},
    ]


def test_a_late_system_message_does_not_fail_the_template() -> None:
    said = {"role": "assistant", "content": "Hi"}
    late = {"role": "system", "content": "Be brief."}
    roles = [message["role"] for message in chat(USER, said, late)["messages"]]
    assert roles == ["user", "assistant", "user"]


@pytest.mark.parametrize("fields", [{}, {"messages": []}, {"messages": None}])
def test_a_request_without_messages_loads_the_model(fields: Any) -> None:
    made = ollama_request.translate_chat({"model": "alpha", **fields}, now=lambda: 0.0)
    assert (made.chat, made.stream) == (None, False)
    assert json.loads(made.answer.whole(NOTHING)) == {
        "model": "alpha",
        "created_at": "1970-01-01T00:00:00.000000Z",
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": "load",
    }


def test_open_webui_unloads_by_a_generate_without_a_prompt() -> None:
    made = generated(prompt="", keep_alive=0)
    assert made.chat is None
    told = json.loads(made.answer.whole(NOTHING))
    assert (told["response"], told["done_reason"]) == ("", "unload")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (300, 300),
        (0, 0),
        (-1, math.inf),
        ("5m", 300),
        ("1h30m", 5400),
        ("300s", 300),
        ("0", 0),
        ("-1m", math.inf),
        ("1.5s", 1.5),
        ("100ms", 0.1),
        (10**400, math.inf),
        (f"{'9' * 40}h", math.inf),
    ],
)
def test_how_long_a_model_is_kept(value: Any, seconds: Any) -> None:
    assert ollama_request.keep_alive({"keep_alive": value}) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "robot"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "images": "x"}]}, "messages[0].images"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"keep_alive": "9" * 1_000_000}, "keep_alive"),
        ({"keep_alive": math.nan}, "keep_alive"),
        ({"keep_alive": [1]}, "keep_alive"),
        ({"think": "a lot"}, "think"),
        ({"think": ["low"]}, "think"),
        ({"format": 5}, "format"),
        ({"options": 5}, "options"),
        ({"logprobs": True}, "logprobs"),
        ({"stream": "no"}, "stream"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        ollama_request.translate_chat({"model": "alpha", "messages": [USER], **fields})
    assert refusal.value.param == param


def test_the_guards_refusal_has_the_clients_name_of_the_field() -> None:
    made = translated(USER, options={"temperature": 5})
    with pytest.raises(InvalidRequest) as refusal:
        check.check(made.chat, RULES["chat"], LIMITS)
    error = in_their_words(refusal.value, made.names)
    assert error.message == "options.temperature must be a number from 0 to 2."


def test_a_prompt_is_a_conversation_of_one_turn() -> None:
    made = generated(prompt="Why?", system="Be brief.", images=[wire.PNG])
    assert made.kind == "chat"
    assert made.chat is not None
    assert [message["role"] for message in made.chat["messages"]] == ["system", "user"]
    assert made.chat["messages"][1]["content"][1] == {"type": "text", "text": "Why?"}


def test_a_raw_prompt_is_continued_as_it_is() -> None:
    made = generated(prompt="Once", raw=True, think=True, options={"num_predict": 5})
    assert made.kind == "text"
    assert made.chat == {
        "model": "alpha",
        "prompt": "Once",
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    check.check(made.chat, RULES["text"], LIMITS)


@pytest.mark.parametrize("name", ["suffix", "template", "context"])
def test_what_would_change_the_answer_and_cannot_be_done_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        generated(prompt="Once", **{name: [1] if name == "context" else "x"})
    assert refusal.value.param == name


# -- answers


def test_an_answer_on_the_wire() -> None:
    clock = ticking(0.0, 1.0, 3.0, 7.0)
    encoder = answer(clock=clock)
    encoder.loaded = 0.5
    data = wire.sent(encoder, wire.text("Hé\n"), wire.end())
    lines = data.decode().splitlines()
    assert lines[0] == (
        '{"model":"alpha","created_at":"2025-11-24T16:00:00.500000Z",'
        '"message":{"role":"assistant","content":""},"done":false}'
    )
    assert lines[1] == lines[0].replace('""', '"H\\u00e9\\n"')
    assert json.loads(lines[2]) == {
        "model": "alpha",
        "created_at": "2025-11-24T16:00:00.500000Z",
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": "stop",
        "total_duration": 7_000_000_000,
        "load_duration": 500_000_000,
        "prompt_eval_count": 30,
        "prompt_eval_duration": 2_000_000_000,
        "eval_count": 7,
        "eval_duration": 4_000_000_000,
    }


def test_arguments_of_a_call_are_an_object_and_two_calls_have_two_numbers() -> None:
    both = wire.calls(wire.call("ls", {"path": "."}), wire.call("ls", {}, 1))
    told = ollama_answer(wire.sent(answer(), both, wire.end("tool_calls")))
    assert told["message"]["tool_calls"] == [
        {
            "id": f"call_{wire.TOOL_ID}",
            "function": {"index": 0, "name": "ls", "arguments": {"path": "."}},
        },
        {"id": "call_1", "function": {"index": 1, "name": "ls", "arguments": {}}},
    ]
    assert told["done_reason"] == "stop"


def test_a_client_that_parses_every_line_gets_lines_while_nothing_comes() -> None:
    waiting = b": loading alpha 3s\n\n", b": waiting\n\n", b": keepalive 2048/4096\n\n"
    told = ollama_answer(wire.sent(answer(), *waiting, wire.text("Hi"), wire.end("length")))
    assert told["message"]["content"] == "Hi"
    assert told["done_reason"] == "length"


def test_thoughts_are_told_apart() -> None:
    data = wire.sent(answer(), wire.reasoning("Hm."), wire.text("Hi"), wire.end())
    assert ollama_answer(data)["message"]["thinking"] == "Hm."
    assert b'"content":"","thinking"' in data or b'"thinking":"Hm.","content":""' in data


def test_the_model_that_answers_gives_its_name() -> None:
    encoder = answer()
    first = encoder.on_text("a")
    encoder.model = "beta"
    assert json.loads(first)["model"] == "alpha"
    assert json.loads(encoder.on_text("b"))["model"] == "beta"


def test_an_error_is_the_last_line() -> None:
    data = wire.sent(answer(), wire.text("Hel"), wire.sse.event(NoModelLoaded("Load one.").body()))
    assert data.decode().splitlines()[-1] == '{"error":"Load one."}'


def test_generate_has_its_own_name_for_the_text() -> None:
    data = wire.sent(answer("generate"), wire.reasoning("Hm."), wire.text("Hi"), wire.end())
    lines = [json.loads(line) for line in data.splitlines()]
    assert [line["response"] for line in lines] == ["", "", "Hi", ""]
    assert lines[1]["thinking"] == "Hm."
    assert lines[-1]["done"] is True


def test_a_text_completion_is_an_answer_too() -> None:
    choice = {"index": 0, "finish_reason": None, "text": "upon"}
    chunk = wire.sse.event({**wire.HEAD, "object": "text_completion", "choices": [choice]})
    data = wire.sent(answer("generate"), chunk, wire.end())
    assert json.loads(data.splitlines()[1])["response"] == "upon"


def test_a_whole_answer_is_one_object() -> None:
    completion = wire.whole(reasoning="Hm.", content="Hi", tool_calls=[wire.call("ls", {"a": 1})])
    told = json.loads(answer().whole(completion, Timing(1.0, 2.0, 4.0)))
    assert told["message"] == {
        "role": "assistant",
        "thinking": "Hm.",
        "tool_calls": [
            {
                "id": f"call_{wire.TOOL_ID}",
                "function": {"index": 0, "name": "ls", "arguments": {"a": 1}},
            }
        ],
        "content": "Hi",
    }
    assert (told["done"], told["total_duration"]) == (True, 7_000_000_000)


PIECES = st.one_of(
    st.builds(wire.text, st.text(max_size=5)),
    st.builds(wire.reasoning, st.text(max_size=5)),
    st.just(b": keepalive 2048/4096\n\n"),
    st.just(wire.calls(wire.call("ls", {"a": 1}))),
)


@given(st.lists(PIECES, max_size=12), st.sampled_from(["stop", "length", "tool_calls"]))
def test_any_answer_is_one_that_zed_and_home_assistant_read(pieces: Any, reason: str) -> None:
    told = ollama_answer(wire.sent(answer(), *pieces, wire.end(reason)))
    texts = [json.loads(piece[6:]) for piece in pieces if piece.startswith(b"data: ")]
    said = [event["choices"][0]["delta"].get("content", "") for event in texts]
    assert told["message"]["content"] == "".join(said)


@given(st.lists(PIECES, max_size=6), st.data())
def test_the_same_lines_come_of_any_pieces(pieces: list[bytes], data: st.DataObject) -> None:
    stream = b"".join([*pieces, wire.end()])
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    assert wire.sent(answer(), *wire.in_pieces(stream, cuts)) == wire.sent(answer(), stream)


# -- models


def entry(**fields: Any) -> dict[str, Any]:
    """A model as `/v1/models` lists it."""
    return Model("nc/alpha", Path("/models/nc/alpha"), created=1764000000, **fields).to_dict()


def test_each_text_about_a_model_is_one_even_if_nothing_is_known() -> None:
    (tag,) = ollama_models.tags([entry()])["models"]
    assert tag["name"] == tag["model"] == "nc/alpha"
    assert all(
        isinstance(tag["details"][name], str) for name in tag["details"] if name != "families"
    )
    assert re.fullmatch("[0-9a-f]{64}", tag["digest"])
    assert tag["capabilities"] == ["completion"]


def test_a_models_size_and_context_are_where_clients_look() -> None:
    known = entry(
        architecture="qwen3",
        parameters=4_022_468_096,
        quantization={"name": "4-bit"},
        max_context_length=40960,
    )
    told = ollama_models.shown(known, "{{ messages }}")
    assert told["details"]["parameter_size"] == "4.0B"
    assert told["model_info"] == {
        "general.architecture": "qwen3",
        "general.basename": "alpha",
        "general.parameter_count": 4_022_468_096,
        "qwen3.context_length": 40960,
    }
    assert told["template"] == "{{ messages }}"
    assert told["capabilities"] == ["completion"]


def test_a_model_that_stays_for_ever_expires_on_a_date_that_python_reads() -> None:
    rows = [(entry(), math.inf, 5e9, 8192), (entry(), 300.0, 5e9, 8192)]
    told = ollama_models.running(rows, now=1764000000)["models"]
    dates = [datetime.fromisoformat(model["expires_at"].replace("Z", "+00:00")) for model in told]
    assert (dates[0] - dates[1]).days > 3000
    assert "modified_at" not in told[0]
    assert told[0]["context_length"] == 8192


def test_the_version_is_one_that_clients_accept() -> None:
    parts = [int(part) for part in ollama_models.VERSION.split(".")]
    assert parts >= [0, 6, 4]
