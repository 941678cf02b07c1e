"""Anthropic's Messages: what becomes of a request, and what its strict readers get as an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxproxy.dialects import anthropic_request
from mlxproxy.dialects.anthropic_answer import AnthropicAnswer
from mlxproxy.dialects.form import NOTHING, Translated, in_their_words
from mlxproxy.engines.mlx_lm.rules import RULES
from mlxproxy.errors import BackendFailed, InvalidRequest, NoModelLoaded
from mlxproxy.guard import check
from mlxproxy.guard.shapes import Limits
from tests.support import chat_wire as wire
from tests.support.strict_readers import anthropic_message

LIMITS = Limits(template_kwargs=frozenset({"enable_thinking"}), max_context=40_000)
USER = {"role": "user", "content": "Hello"}


def translated(*messages: Any, **fields: Any) -> Translated:
    body = {"model": "alpha", "max_tokens": 100, "messages": messages or [USER], **fields}
    return anthropic_request.translate(json.loads(json.dumps(body)), wire.numbered())


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    """The chat request, which the guard takes as it is."""
    request = translated(*messages, **fields).chat
    assert request is not None
    check.check(request, RULES["chat"], LIMITS)
    return request


def conversation(*messages: Any, **fields: Any) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = chat(*messages, **fields)["messages"]
    return made


def answer(estimate: int = 5) -> AnthropicAnswer:
    return AnthropicAnswer("alpha", wire.numbered(), estimate)


def result(identity: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": identity, "content": content, **fields}


def used(identity: str, name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": identity, "name": name, "input": arguments}


# -- requests


def test_the_plainest_request_is_a_chat() -> None:
    assert chat(stream=True, temperature=0.5, top_p=0.9, top_k=40, stop_sequences=["END", " "]) == {
        "model": "alpha",
        "max_tokens": 100,
        "stream": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "stop": ["END"],
        "stream_options": {"include_usage": True},
        "messages": [USER],
    }


def test_claude_codes_billing_line_does_not_cost_the_prompt_cache() -> None:
    def prompt(cch: str) -> list[dict[str, Any]]:
        line = f"x-anthropic-billing-header: cc_version=2.1.331; cch={cch};"
        system = [
            {"type": "text", "text": line},
            {
                "type": "text",
                "text": "You are Claude Code.",
                "cache_control": {"type": "ephemeral"},
            },
            {"type": "text", "text": "Be brief."},
        ]
        inside = {"role": "system", "content": [{"type": "text", "text": line}]}
        return conversation(USER, inside, system=system)

    assert prompt("1") == prompt("2")
    assert prompt("1") == [
        {"role": "system", "content": "You are Claude Code.\n\nBe brief."},
        USER,
    ]


def test_a_system_message_after_the_first_turn_is_folded_into_the_users_turn() -> None:
    early = {"role": "system", "content": "Agents: none."}
    said = {"role": "assistant", "content": "Hi"}
    late = {"role": "system", "content": "900 tokens left."}
    asked = {"role": "user", "content": "And now?"}
    assert conversation(USER, early, said, late, asked, system="Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": "Hello\n\n<system-reminder>\nAgents: none.\n</system-reminder>",
        },
        {"role": "assistant", "content": "Hi"},
        {
            "role": "user",
            "content": "<system-reminder>\n900 tokens left.\n</system-reminder>\n\nAnd now?",
        },
    ]


def test_a_changing_reminder_after_a_tool_result_leaves_what_is_before_it_as_it_was() -> None:
    call = {"role": "assistant", "content": [used("toolu_1", "ls", {})]}
    output = {"role": "user", "content": [result("toolu_1", "a.txt")]}

    def prompt(left: int) -> list[dict[str, Any]]:
        return conversation(USER, call, output, {"role": "system", "content": f"{left} left"})

    assert prompt(1)[:-1] == prompt(2)[:-1]
    assert [message["role"] for message in prompt(1)] == ["user", "assistant", "tool", "user"]


def test_a_turn_with_thoughts_text_and_two_calls_is_one_message() -> None:
    turn = {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Look first.", "signature": ""},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": ""},
            {"type": "text", "text": "I look."},
            used("toolu_1", "ls", {"path": "."}),
            used("toolu_2", "cat", {"path": "a"}),
            {"type": "server_tool_use", "id": "x", "name": "web_search", "input": {}},
        ],
    }
    results = {
        "role": "user",
        "content": [
            {"type": "text", "text": "Go on."},
            result("toolu_1", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
            result("toolu_2", "gone", is_error=True),
        ],
    }
    assert conversation(USER, turn, results)[1:] == [
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Look first.",
            "tool_calls": [
                {
                    "id": "toolu_1",
                    "type": "function",
                    "function": {"name": "ls", "arguments": {"path": "."}},
                },
                {
                    "id": "toolu_2",
                    "type": "function",
                    "function": {"name": "cat", "arguments": {"path": "a"}},
                },
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "a\n\nb"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: gone"},
        {"role": "user", "content": "Go on."},
    ]


def test_an_image_in_a_tools_result_comes_right_after_all_results() -> None:
    image = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": wire.PNG},
    }
    call = {"role": "assistant", "content": [used("1", "shot", {}), used("2", "ls", {})]}
    results = [result("1", [image]), result("2", None), {"type": "text", "text": "Well?"}]
    made = conversation(USER, call, {"role": "user", "content": results})
    assert made[2:] == [
        {"role": "tool", "tool_call_id": "1", "content": ""},
        {"role": "tool", "tool_call_id": "2", "content": ""},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{wire.PNG}"}},
                {"type": "text", "text": "Well?"},
            ],
        },
    ]


def test_turns_of_the_same_side_in_a_row_become_one() -> None:
    said = {"role": "assistant", "content": "One."}
    assert conversation(USER, said, {**said, "content": "Two."}, USER, USER) == [
        USER,
        {"role": "assistant", "content": "One.\n\nTwo."},
        {"role": "user", "content": "Hello\n\nHello"},
    ]


@pytest.mark.parametrize("nothing", ["", [], [{"type": "text", "text": ""}]])
def test_an_empty_last_turn_still_is_a_turn(nothing: Any) -> None:
    said = {"role": "assistant", "content": "Hi"}
    made = conversation(USER, said, {"role": "user", "content": nothing})
    assert made[-1] == {"role": "user", "content": " "}


def test_an_answer_that_has_begun_is_refused_with_what_to_do() -> None:
    with pytest.raises(InvalidRequest, match="must end with a user message") as refusal:
        translated(USER, {"role": "assistant", "content": "{"})
    assert refusal.value.param == "messages[1]"


def test_server_tools_are_left_out_and_the_others_keep_names_and_schemas() -> None:
    schema = {"$schema": "x", "anyOf": [{"type": "object"}], "$defs": {}}
    tools = [
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 3},
        {"name": "mcp__" + "x" * 120, "description": "Does it.", "input_schema": schema},
        {"type": "custom", "name": "bare", "input_schema": None, "strict": True},
    ]
    assert chat(tools=tools)["tools"] == [
        {
            "type": "function",
            "function": {
                "name": "mcp__" + "x" * 120,
                "description": "Does it.",
                "parameters": schema,
            },
        },
        {
            "type": "function",
            "function": {
                "name": "bare",
                "parameters": {"type": "object", "properties": {}},
                "strict": True,
            },
        },
    ]
    assert "tools" not in chat(tools=tools[:1], tool_choice={"type": "tool", "name": "web_search"})


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "ls"}, {"type": "function", "function": {"name": "ls"}}),
    ],
)
def test_the_choice_of_a_tool_is_kept(choice: Any, expected: Any) -> None:
    tools = [{"name": "ls", "input_schema": {"type": "object"}}]
    made = chat(tools=tools, tool_choice=choice)
    assert made["tool_choice"] == expected
    once = choice.get("disable_parallel_tool_use", False)
    assert made.get("parallel_tool_calls", True) is not once


def test_thinking_is_asked_for_and_given_up_for_a_model_that_cannot() -> None:
    request = chat(
        thinking={"type": "adaptive"},
        output_config={"effort": "high"},
    )
    assert request["enable_thinking"] is True
    assert request["reasoning_effort"] == "high"
    off = chat(thinking={"type": "disabled"}, output_config={"effort": "high"})
    assert off["enable_thinking"] is False
    assert "reasoning_effort" not in off
    assert "reasoning_effort" not in chat(output_config={"effort": "high"})
    assert translated().optional == {"enable_thinking", "reasoning_effort"}


def test_a_format_is_a_response_format() -> None:
    schema = {"type": "object"}
    wanted = {"type": "json_schema", "schema": schema}
    made = translated(output_config={"format": wanted})
    assert made.chat is not None
    assert made.chat["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema},
    }
    assert made.names["response_format"] == "output_config.format"


def test_what_claude_code_adds_with_every_release_is_not_refused() -> None:
    odd = {"type": "hologram", "data": 1}
    chat(
        {"role": "user", "content": [odd, {"type": "text", "text": "Hi", "novelty": 1}]},
        context_management={"edits": []},
        metadata={"user_id": "x"},
        thread=None,
        diagnostics={},
        safeguards={},
        max_tokens=0,
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": ["Hello"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": {}, "system": 5}, "system"),
        ({"stop_sequences": [5]}, "stop_sequences[0]"),
        ({"thinking": {"type": "perhaps"}}, "thinking.type"),
        ({"output_config": {"effort": "some"}}, "output_config.effort"),
        ({"stream": "yes"}, "stream"),
        ({"model": 5}, "model"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        translated(**fields)
    assert refusal.value.param == param
    assert param in refusal.value.message


def test_the_guards_refusal_has_the_clients_name_of_the_field() -> None:
    made = translated(stop_sequences=["x" * 5000])
    with pytest.raises(InvalidRequest) as refusal:
        check.check(made.chat, RULES["chat"], LIMITS)
    error = in_their_words(refusal.value, made.names)
    assert error.param == "stop_sequences"
    assert error.message.startswith("stop_sequences must be at most 64 strings")


@pytest.mark.parametrize("kind", ["url", "file"])
def test_an_image_from_elsewhere_is_refused_with_its_place(kind: str) -> None:
    image = {"type": "image", "source": {"type": kind, "url": "https://example.com/a.png"}}
    with pytest.raises(InvalidRequest, match="does not fetch") as refusal:
        translated({"role": "user", "content": [image]})
    assert refusal.value.param == "messages[0].content[0].source"


def test_a_pdf_is_refused_in_the_words_that_claude_code_recovers_from() -> None:
    pdf = {"type": "base64", "media_type": "application/pdf", "data": "x"}
    with pytest.raises(InvalidRequest, match="does not support PDF input"):
        translated({"role": "user", "content": [{"type": "document", "source": pdf}]})
    plain = {"type": "text", "media_type": "text/plain", "data": "A letter."}
    document = {"type": "document", "title": "Mail", "source": plain}
    assert (
        conversation({"role": "user", "content": [document]})[0]["content"] == "Mail\n\nA letter."
    )


def test_tokens_are_estimated_without_counting_an_images_bytes() -> None:
    image = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": wire.PNG},
    }
    few = anthropic_request.estimated_tokens(chat({"role": "user", "content": "x" * 400}))
    assert 100 <= few <= 110
    with_image = chat({"role": "user", "content": [image, {"type": "text", "text": "x" * 400}]})
    assert anthropic_request.estimated_tokens(with_image) < few + 30


# -- answers


def test_an_answer_is_a_message() -> None:
    data = wire.sent(answer(), wire.text("Hel"), wire.text("lo"), wire.end())
    assert anthropic_message(data) == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "alpha",
        "content": [{"type": "text", "text": "Hello"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 20,
            "output_tokens": 7,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 10,
        },
    }


def test_an_answer_on_the_wire() -> None:
    data = wire.sent(answer(), b": keepalive 2048/4096\n\n", wire.text("Hé\n"), wire.end())
    assert data.decode().splitlines() == [
        ":",
        "",
        "event: message_start",
        'data: {"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant",'
        '"model":"alpha","content":[],"stop_reason":null,"stop_sequence":null,"usage":'
        '{"input_tokens":4096,"output_tokens":0,"cache_creation_input_tokens":0,'
        '"cache_read_input_tokens":0}}}',
        "",
        ": prompt 2048/4096",
        "",
        "event: content_block_start",
        'data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}',
        "",
        "event: content_block_delta",
        'data: {"type":"content_block_delta","index":0,'
        r'"delta":{"type":"text_delta","text":"H\u00e9\n"}}',
        "",
        "event: content_block_stop",
        'data: {"type":"content_block_stop","index":0}',
        "",
        "event: message_delta",
        'data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},'
        '"usage":{"input_tokens":20,"output_tokens":7,"cache_creation_input_tokens":0,'
        '"cache_read_input_tokens":10}}',
        "",
        "event: message_stop",
        'data: {"type":"message_stop"}',
        "",
    ]


def test_thoughts_come_first_in_a_block_of_their_own() -> None:
    data = wire.sent(
        answer(), wire.reasoning("Let me"), wire.reasoning(" see."), wire.text("Yes."), wire.end()
    )
    assert anthropic_message(data)["content"] == [
        {"type": "thinking", "thinking": "Let me see.", "signature": ""},
        {"type": "text", "text": "Yes."},
    ]
    assert b'"type":"signature_delta"' in data


def test_two_calls_in_one_event_are_two_blocks_one_after_the_other() -> None:
    both = wire.calls(wire.call("ls", {"path": "."}), wire.call("pwd", {}, 1, "functions.pwd:1"))
    message = anthropic_message(wire.sent(answer(), both, wire.end("tool_calls")))
    assert message["content"] == [
        used(f"toolu_{wire.TOOL_ID}", "ls", {"path": "."}),
        used("toolu_2", "pwd", {}),
    ]
    assert message["stop_reason"] == "tool_use"


def test_reasoning_text_and_a_call_in_one_event_keep_their_order() -> None:
    all_three = wire.chunk(reasoning="Hm.", content="I look.", tool_calls=[wire.call("ls", {})])
    message = anthropic_message(wire.sent(answer(), all_three, wire.end("tool_calls")))
    assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use"]


def test_text_after_a_call_is_not_lost() -> None:
    data = wire.sent(
        answer(), wire.calls(wire.call("ls", {})), wire.text("Done."), wire.end("tool_calls")
    )
    assert [block["type"] for block in anthropic_message(data)["content"]] == ["tool_use", "text"]


def test_white_space_between_thoughts_and_a_call_is_no_block_of_text() -> None:
    data = wire.sent(
        answer(),
        wire.reasoning("Hm."),
        wire.text("\n\n"),
        wire.calls(wire.call("ls", {})),
        wire.end("tool_calls"),
    )
    kinds = [block["type"] for block in anthropic_message(data)["content"]]
    assert kinds == ["thinking", "tool_use"]


def test_white_space_before_a_call_does_not_come_after_it() -> None:
    data = wire.sent(
        answer(),
        wire.text("\n\n"),
        wire.calls(wire.call("ls", {})),
        wire.text("Done."),
        wire.end("tool_calls"),
    )
    assert anthropic_message(data)["content"][1] == {"type": "text", "text": "Done."}


def test_white_space_before_text_stays_with_the_text() -> None:
    data = wire.sent(answer(), wire.text("\n"), wire.text("\n"), wire.text("Hi"), wire.end())
    assert anthropic_message(data)["content"] == [{"type": "text", "text": "\n\nHi"}]


@pytest.mark.parametrize(
    ("reason", "expected"),
    [("stop", "end_turn"), ("length", "max_tokens"), ("tool_calls", "end_turn")],
)
def test_no_client_waits_for_a_call_that_was_lost(reason: str, expected: str) -> None:
    data = wire.sent(answer(), wire.text("I call."), wire.end(reason))
    assert anthropic_message(data)["stop_reason"] == expected


def test_the_model_that_answers_gives_its_name() -> None:
    encoder = answer()
    stream = wire.TranslatedStream(wire.relayed(wire.text("Hi"), wire.end()), encoder)
    encoder.model = "nc/beta"
    assert anthropic_message(b"".join(stream))["model"] == "nc/beta"


def test_while_nothing_comes_there_are_comments_alone() -> None:
    data = wire.sent(
        answer(), b": loading alpha 3s\n\n", b": waiting for the backend\n\n", wire.end()
    )
    before, _, _ = data.partition(b"event: ")
    assert before == b":\n\n: loading alpha\n\n: waiting for the backend\n\n"


def test_an_error_in_the_stream_ends_it_without_an_end_of_the_message() -> None:
    encoder = answer()
    encoder.request_id = "req_7"
    error = wire.sse.event(NoModelLoaded("Load one.").body())
    data = wire.sent(encoder, wire.text("Hel"), error)
    assert wire.events(data)[-1] == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "Load one."},
        "request_id": "req_7",
    }
    assert b"message_stop" not in data


def test_an_event_that_is_none_ends_the_stream_with_an_error() -> None:
    data = wire.sent(answer(), wire.text("Hel"), b"data: {no JSON\n\n", wire.text("lo"))
    assert wire.events(data)[-1]["error"]["type"] == "api_error"
    assert b'"lo"' not in data


def test_a_whole_answer_has_the_same_parts() -> None:
    completion = wire.whole(
        "tool_calls",
        reasoning="Hm.",
        content="\n\nI look.",
        tool_calls=[wire.call("ls", {"path": "."})],
    )
    message = json.loads(answer().whole(completion))
    assert message["content"] == [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "\n\nI look.", "citations": None},
        used(f"toolu_{wire.TOOL_ID}", "ls", {"path": "."}) | {"caller": {"type": "direct"}},
    ]
    assert message["stop_reason"] == "tool_use"
    assert message["usage"]["input_tokens"] == 20
    assert message["usage"]["output_tokens_details"] == {"thinking_tokens": 1}
    assert json.loads(answer().whole(NOTHING))["content"] == []


def test_a_whole_answer_has_every_field_that_anthropics_schema_requires() -> None:
    message = json.loads(answer().whole(wire.whole(content="Hello")))
    assert {"container", "stop_details", "stop_sequence"} <= message.keys()
    assert message["usage"].keys() >= {
        *("cache_creation", "cache_creation_input_tokens", "cache_read_input_tokens"),
        *("inference_geo", "output_tokens_details", "server_tool_use", "service_tier"),
    }


def test_a_whole_answer_is_taken_back_as_history() -> None:
    said = wire.whole("tool_calls", content="I look.", tool_calls=[wire.call("ls", {})])
    message = json.loads(answer().whole(said))
    again = {"role": "assistant", "content": message["content"]}
    spoken, *_ = chat(again, {"role": "user", "content": "Go on."})["messages"]
    assert spoken["content"] == "I look."
    assert [call["function"]["name"] for call in spoken["tool_calls"]] == ["ls"]


def test_a_whole_answer_of_another_shape_is_an_error() -> None:
    with pytest.raises(BackendFailed):
        answer().whole({"choices": [5]})


PIECES = st.one_of(
    st.builds(wire.text, st.text(max_size=5)),
    st.builds(wire.reasoning, st.text(max_size=5)),
    st.just(b": keepalive 2048/4096\n\n"),
    st.just(b": waiting\n\n"),
    st.lists(st.just(wire.call("ls", {"a": 1})), min_size=1, max_size=3).map(
        lambda made: wire.calls(*made)
    ),
    st.builds(
        lambda one, two: wire.chunk(reasoning=one, content=two, tool_calls=[wire.call("x", {})]),
        st.text(max_size=3),
        st.text(max_size=3),
    ),
)


@given(st.lists(PIECES, max_size=12), st.sampled_from(["stop", "length", "tool_calls"]))
def test_any_answer_is_one_that_claude_code_reads(pieces: list[bytes], reason: str) -> None:
    message = anthropic_message(wire.sent(answer(), *pieces, wire.end(reason)))
    called = any(block["type"] == "tool_use" for block in message["content"])
    assert (message["stop_reason"] == "tool_use") == (called and reason != "length")
    identities = [block["id"] for block in message["content"] if block["type"] == "tool_use"]
    assert len(identities) == len(set(identities))


@given(st.lists(PIECES, max_size=6), st.data())
def test_the_same_stream_comes_of_any_pieces(pieces: list[bytes], data: st.DataObject) -> None:
    stream = b"".join([*pieces, wire.end()])
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    assert wire.sent(answer(), *wire.in_pieces(stream, cuts)) == wire.sent(answer(), stream)
