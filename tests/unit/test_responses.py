"""OpenAI's Responses: what becomes of a request, what Codex and the SDK get, and what is kept."""

from __future__ import annotations

import contextlib
import json
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxproxy.dialects import responses_request
from mlxproxy.dialects.form import NOTHING, Translated, in_their_words
from mlxproxy.dialects.responses_answer import ResponsesAnswer
from mlxproxy.dialects.responses_store import (
    PreviousResponseNotFound,
    ResponseNotFound,
    ResponsesStore,
)
from mlxproxy.engines.mlx_lm.rules import RULES
from mlxproxy.errors import BackendFailed, InvalidRequest, ShuttingDown, TooManyRequests
from mlxproxy.guard import check
from mlxproxy.guard.shapes import Limits
from mlxproxy.sse import event
from tests.support import chat_wire as wire
from tests.support.strict_readers import response

LIMITS = Limits(template_kwargs=frozenset({"enable_thinking", "reasoning_effort"}))
LS = {"type": "function", "name": "ls", "description": "Lists.", "parameters": None, "strict": True}
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: hunk+"},
}
NODE = {
    "type": "namespace",
    "name": "mcp__node_repl",
    "description": "A REPL.",
    "tools": [{"type": "function", "name": "js", "parameters": {"type": "object"}}],
}


def translated(
    given: Any = "Hello", kept: ResponsesStore | None = None, **fields: Any
) -> Translated:
    body = json.loads(json.dumps({"model": "alpha", "input": given, **fields}))
    return responses_request.translate(
        body, kept or ResponsesStore(), wire.numbered(), lambda: 1764000000.5
    )


def chat(given: Any = "Hello", kept: ResponsesStore | None = None, **fields: Any) -> Any:
    """The chat request, which the guard takes as it is."""
    request = translated(given, kept, **fields).chat
    check.check(request, RULES["chat"], LIMITS)
    return request


def said(role: str, text: str) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


def called(identity: str, name: str, arguments: str = "{}", **fields: Any) -> dict[str, Any]:
    given = {"call_id": identity, "name": name, "arguments": arguments}
    return {"type": "function_call", "id": f"fc_{identity}", **given, **fields}


def output(identity: str, value: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": identity, "output": value}


def call_in_chat(identity: str, name: str, arguments: Any = None) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments or {}}
    return {"id": identity, "type": "function", "function": function}


def names(request: Any) -> list[str]:
    return [tool["function"]["name"] for tool in request["tools"]]


# -- requests


def test_a_string_is_what_the_user_says() -> None:
    assert chat(instructions="Be brief.", stream=True, temperature=0.2, max_output_tokens=9) == {
        "model": "alpha",
        "stream": True,
        "temperature": 0.2,
        "max_tokens": 9,
        "stream_options": {"include_usage": True},
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
        ],
    }


def test_without_a_limit_an_answer_is_as_long_as_it_can_be() -> None:
    assert chat()["max_tokens"] == -1


def test_instructions_and_developer_messages_are_one_system_message() -> None:
    items = [said("developer", "Sandbox on."), said("user", "Env."), said("user", "Fix it.")]
    assert chat(items, instructions="You are Codex.")["messages"] == [
        {"role": "system", "content": "You are Codex.\n\nSandbox on."},
        {"role": "user", "content": "Env.\n\nFix it."},
    ]


def test_a_developer_message_late_in_the_list_does_not_fail_the_template() -> None:
    items = [said("user", "Hi"), said("assistant", "Hello"), said("developer", "Sandbox off.")]
    assert chat([*items, said("user", "Go")])["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {
            "role": "user",
            "content": "<system-reminder>\nSandbox off.\n</system-reminder>\n\nGo",
        },
    ]


def test_what_an_assistant_does_in_a_row_is_one_message() -> None:
    items = [
        {"role": "user", "content": "Look."},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]},
        called("call_1", "ls", '{"path": "."}'),
        said("assistant", "I look."),
        called("call_2", "ls", "{broken"),
        output("call_1", "a"),
        output("call_2", [{"type": "input_text", "text": "b"}]),
        {
            "type": "reasoning",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "So."}],
        },
        said("assistant", "a and b."),
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "dropped"}]},
        said("user", "Thanks."),
        said("assistant", "Bye."),
    ]
    assert chat(items, tools=[LS])["messages"] == [
        {"role": "user", "content": "Look."},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                call_in_chat("call_1", "ls", {"path": "."}),
                call_in_chat("call_2", "ls"),
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "a"},
        {"role": "tool", "tool_call_id": "call_2", "content": "b"},
        {"role": "assistant", "content": "a and b.", "reasoning_content": "So."},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "Bye."},
    ]


def test_images_of_a_tools_output_come_after_all_outputs() -> None:
    image = {"type": "input_image", "image_url": f"data:image/png;base64,{wire.PNG}"}
    items = [
        said("user", "Shoot."),
        called("1", "shot"),
        called("2", "shot"),
        output("1", [{"type": "input_text", "text": "done"}, image]),
        output("2", [image]),
    ]
    made = chat(items)["messages"]
    assert [message["role"] for message in made] == ["user", "assistant", "tool", "tool", "user"]
    assert [part["type"] for part in made[-1]["content"]] == ["image_url", "image_url"]


def test_items_that_only_openais_servers_know_are_left_out() -> None:
    odd = [
        {"type": kind, "id": "x"}
        for kind in ("web_search_call", "compaction", "mcp_call", "local_shell_call", "novelty")
    ]
    assert chat([*odd, said("user", "Hi")])["messages"] == [{"role": "user", "content": "Hi"}]


def test_tools_that_are_no_functions_are_left_out() -> None:
    hosted = [{"type": kind} for kind in ("web_search", "image_generation", "tool_search")]
    assert names(chat(tools=[*hosted, LS])) == ["ls"]
    assert "tools" not in chat(tools=hosted, tool_choice={"type": "web_search"})


def test_tools_of_a_namespace_come_back_under_both_of_their_names() -> None:
    made = translated(tools=[LS, NODE, PATCH], stream=True)
    assert made.chat is not None
    assert names(made.chat) == ["ls", "mcp__node_repl__js", "apply_patch"]
    both = wire.calls(
        wire.call("mcp__node_repl__js", {"code": "1"}),
        wire.call("apply_patch", {"input": "*** Begin Patch"}, 1, "x"),
    )
    whole = response(wire.sent(made.answer, both, wire.end("tool_calls")))
    assert whole["output"] == [
        {
            "type": "function_call",
            "id": "fc_2",
            "call_id": f"call_{wire.TOOL_ID}",
            "name": "js",
            "arguments": '{"code": "1"}',
            "status": "completed",
            "namespace": "mcp__node_repl",
        },
        {
            "type": "custom_tool_call",
            "id": "ctc_3",
            "call_id": "x",
            "name": "apply_patch",
            "input": "*** Begin Patch",
            "status": "completed",
        },
    ]


def test_old_calls_of_a_namespace_and_of_free_text_are_the_models_again() -> None:
    items = [
        said("user", "Go."),
        called("1", "js", '{"code": "1"}', namespace="mcp__node_repl"),
        {"type": "custom_tool_call", "call_id": "2", "name": "apply_patch", "input": "*** Begin"},
        output("1", "1"),
        {"type": "custom_tool_call_output", "call_id": "2", "output": "done"},
    ]
    for tools in ([NODE, PATCH], []):  # offered still or not
        assert chat(items, tools=tools)["messages"][1]["tool_calls"] == [
            call_in_chat("1", "mcp__node_repl__js", {"code": "1"}),
            call_in_chat("2", "apply_patch", {"input": "*** Begin"}),
        ]


def test_no_two_tools_have_one_name_and_none_is_too_long_for_a_model() -> None:
    long = {"type": "function", "name": "f" * 80}
    tools = [
        {"type": "function", "name": "a__b"},
        {"type": "namespace", "name": "a", "tools": [{"type": "function", "name": "b"}]},
        {"type": "namespace", "name": "dotted.name", "tools": [long]},
    ]
    made = names(chat(tools=tools))
    assert made[0] == "a__b"
    assert len(set(made)) == 3
    assert all(len(name) <= 64 and "." not in name for name in made)
    assert made == names(chat(tools=tools))


def test_a_grammar_is_told_to_the_model() -> None:
    function = chat(tools=[PATCH])["tools"][0]["function"]
    assert function["description"] == "Edits.\nGrammar:\nstart: hunk+"
    assert function["parameters"]["required"] == ["input"]


def test_more_tools_may_come_as_an_item() -> None:
    more = {"type": "additional_tools", "role": "developer", "tools": [LS]}
    assert names(chat([said("user", "Hi"), more])) == ["ls"]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("required", "required"),
        ({"type": "function", "name": "ls"}, {"type": "function", "function": {"name": "ls"}}),
        (
            {"type": "custom", "name": "apply_patch"},
            {"type": "function", "function": {"name": "apply_patch"}},
        ),
        ({"type": "function", "name": "gone"}, None),
        ({"type": "web_search"}, None),
    ],
)
def test_the_choice_of_a_tool_is_kept(choice: Any, expected: Any) -> None:
    assert chat(tools=[LS, PATCH], tool_choice=choice).get("tool_choice") == expected


def test_a_strict_tool_stays_strict() -> None:
    for strict, expected in ((True, True), (False, None), (None, None)):
        made = chat(tools=[{**LS, "strict": strict}])["tools"][0]["function"]
        assert made.get("strict") is expected


def test_a_choice_among_some_tools_offers_no_others() -> None:
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"name": "apply_patch"}]}
    request = chat(tools=[LS, PATCH], tool_choice=allowed)
    assert names(request) == ["apply_patch"]
    assert request["tool_choice"] == "required"


def test_a_schema_is_one_level_deeper_in_chat() -> None:
    form = {"type": "json_schema", "name": "city", "schema": {"type": "object"}, "strict": True}
    made = translated(text={"format": form, "verbosity": "low"})
    assert made.chat is not None
    assert made.chat["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "city", "strict": True, "schema": {"type": "object"}},
    }
    assert made.names["response_format"] == "text.format"


def test_effort_is_given_up_for_a_model_that_cannot_think() -> None:
    made = translated(reasoning={"effort": "high", "summary": "auto"})
    assert made.chat is not None
    assert made.chat["reasoning_effort"] == "high"
    assert made.optional == {"reasoning_effort"}


@pytest.mark.parametrize("nothing", ["", [], None])
def test_codexs_empty_request_loads_a_model_and_says_nothing(nothing: Any) -> None:
    made = translated(nothing, max_output_tokens=1)
    assert made.chat is None
    whole = json.loads(made.answer.whole(NOTHING))
    assert whole["status"] == "completed"
    assert whole["output"] == []


@pytest.mark.parametrize(
    ("given", "fields", "param"),
    [
        (5, {}, "input"),
        (["Hello"], {}, "input[0]"),
        ([{"role": "robot", "content": "x"}], {}, "input[0].role"),
        ([{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}], {}, None),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], {}, None),
        ([{"type": "item_reference", "id": "x"}], {}, "input[0].id"),
        ([called("1", "ls") | {"call_id": None}], {}, "input[0].call_id"),
        ("Hi", {"background": True}, "background"),
        ("Hi", {"conversation": "c"}, "conversation"),
        ("Hi", {"tools": [{"type": "function"}]}, "tools[0].name"),
        ("Hi", {"reasoning": {"effort": "some"}}, "reasoning.effort"),
        ("Hi", {"tool_choice": 5}, "tool_choice"),
        ("Hi", {"store": 1}, "store"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(given: Any, fields: Any, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        translated(given, **fields)
    assert (refusal.value.param or "").startswith(param or "input[0].content[0]")


def test_an_image_from_elsewhere_is_refused_with_its_place() -> None:
    image = {"type": "input_image", "image_url": "https://example.com/a.png"}
    with pytest.raises(InvalidRequest, match="does not fetch") as refusal:
        translated([{"role": "user", "content": [image]}])
    assert refusal.value.param == "input[0].content[0].image_url"


def test_a_text_file_is_read() -> None:
    file = {
        "type": "input_file",
        "filename": "a.txt",
        "file_data": "data:text/plain;base64,SGVsbG8=",
    }
    assert chat([{"role": "user", "content": [file]}])["messages"][0]["content"] == "a.txt\nHello"


def test_the_guards_refusal_has_the_clients_name_of_the_field() -> None:
    made = translated(max_output_tokens="many")
    with pytest.raises(InvalidRequest) as refusal:
        check.check(made.chat, RULES["chat"], LIMITS)
    error = in_their_words(refusal.value, made.names)
    assert error.param == "max_output_tokens"
    assert error.message.startswith("max_output_tokens must be")


# -- answers


def answer(**fields: Any) -> ResponsesAnswer:
    made = translated(stream=True, **fields).answer
    assert isinstance(made, ResponsesAnswer)
    return made


def test_an_answer_is_a_response() -> None:
    data = wire.sent(answer(), wire.reasoning("Hm."), wire.text("Hel"), wire.text("lo"), wire.end())
    whole = response(data)
    assert whole["output"] == [
        {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {
            "type": "message",
            "id": "msg_3",
            "status": "completed",
            "role": "assistant",
            "content": [
                {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
            ],
        },
    ]
    assert whole["usage"] == {
        "input_tokens": 30,
        "input_tokens_details": {"cached_tokens": 10, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 37,
    }
    assert (whole["created_at"], whole["completed_at"]) == (1764000000, 1764000000)


def test_the_order_of_events_is_the_one_that_codex_needs() -> None:
    data = wire.sent(
        answer(tools=[LS]), wire.text("Hi"), wire.calls(wire.call("ls", {})), wire.end("tool_calls")
    )
    assert [found["type"].removeprefix("response.") for found in wire.events(data)] == [
        "created",
        "in_progress",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]


def test_a_token_on_the_wire() -> None:
    data = wire.sent(answer(), wire.text("H\n"), wire.end())
    (delta,) = (block for block in data.split(b"\n\n") if b"output_text.delta" in block)
    assert delta == (
        b"event: response.output_text.delta\n"
        b'data: {"type":"response.output_text.delta","sequence_number":5,"item_id":"msg_2",'
        b'"output_index":0,"content_index":0,"logprobs":[],"delta":"H\\n"}'
    )


def test_codex_gets_events_and_no_comments_while_nothing_comes() -> None:
    waiting = b": loading alpha 3s\n\n", b": keepalive 2048/4096\n\n", b": waiting\n\n"
    data = wire.sent(answer(tools=[LS] * 50, instructions="Be brief."), *waiting, wire.end())
    assert b"\n:" not in b"\n" + data
    kinds = [found["type"] for found in wire.events(data)]
    assert kinds == ["response.created", *["response.in_progress"] * 5, "response.completed"]
    response(data)
    assert max(len(block) for block in data.split(b"\n\n") if b"in_progress" in block[:40]) < 1000


def test_two_calls_in_one_event_are_two_items() -> None:
    both = wire.calls(wire.call("ls", {}), wire.call("ls", {"a": 1}, 1))
    whole = response(wire.sent(answer(tools=[LS]), both, wire.end("tool_calls")))
    assert [item["arguments"] for item in whole["output"]] == ["{}", '{"a": 1}']
    assert len({item["call_id"] for item in whole["output"]}) == 2


def test_no_more_tokens_are_thoughts_than_there_are_tokens() -> None:
    data = wire.sent(answer(), *[wire.reasoning("Hm.")] * 3, wire.end(completion=2))
    assert response(data)["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}


def test_an_answer_cut_short_is_incomplete_with_the_reason() -> None:
    whole = response(wire.sent(answer(), wire.text("Hel"), wire.end("length")))
    assert whole["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole["output"][0]["status"] == "incomplete"


def test_thoughts_can_be_sent_back_by_clients_that_keep_them_themselves() -> None:
    data = wire.sent(
        answer(include=["reasoning.encrypted_content"], store=False),
        wire.reasoning("Hm."),
        wire.text("Hi"),
        wire.end(),
    )
    items = response(data)["output"]
    assert items[0]["encrypted_content"] == "Hm."
    assert chat([*items, said("user", "And?")])["messages"][0] == {
        "role": "assistant",
        "content": "Hi",
        "reasoning_content": "Hm.",
    }


def test_free_text_that_a_model_wrote_under_another_name_is_not_lost() -> None:
    odd = wire.calls(
        wire.call("apply_patch", {"patch": "*** Begin"}),
        wire.call("apply_patch", {"patch": "a", "b": "c"}, 1, "x"),
    )
    whole = response(wire.sent(answer(tools=[PATCH]), odd, wire.end("tool_calls")))
    assert [item["input"] for item in whole["output"]] == [
        "*** Begin",
        '{"patch": "a", "b": "c"}',
    ]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ShuttingDown("Bye."), "server_is_overloaded"),
        (TooManyRequests("Wait."), "rate_limit_exceeded"),
        (BackendFailed("Oh."), "server_error"),
        (InvalidRequest("The template rejected it."), "invalid_prompt"),
        (
            InvalidRequest("The prompt has 9 tokens, and the model's context is 8. Send less."),
            "context_length_exceeded",
        ),
    ],
)
def test_a_failure_has_the_code_that_codex_acts_on(error: Any, code: str) -> None:
    whole = response(wire.sent(answer(), wire.text("Hel"), event(error.body())))
    assert whole["status"] == "failed"
    assert whole["error"] == {"code": code, "message": error.message}


def test_a_whole_answer_is_the_same_response() -> None:
    parts: dict[str, Any] = {"reasoning": "Hm.", "content": "Hi."}
    whole = json.loads(answer().whole(wire.whole(**parts)))
    streamed = response(wire.sent(answer(), wire.chunk(**parts), wire.end()))
    assert whole.pop("usage")["output_tokens_details"] == {"reasoning_tokens": 4}  # half of 7
    streamed.pop("usage")
    assert whole == streamed


PIECES = st.one_of(
    st.builds(wire.text, st.text(max_size=5)),
    st.builds(wire.reasoning, st.text(max_size=5)),
    st.just(b": keepalive 2048/4096\n\n"),
    st.just(b": waiting\n\n"),
    st.lists(st.just(wire.call("ls", {"a": 1})), min_size=1, max_size=3).map(
        lambda made: wire.calls(*made)
    ),
    st.just(wire.calls(wire.call("apply_patch", {"input": "x"}))),
)


@given(st.lists(PIECES, max_size=12), st.sampled_from(["stop", "length", "tool_calls"]))
def test_any_answer_is_one_that_codex_and_the_sdk_read(pieces: list[bytes], reason: str) -> None:
    whole = response(wire.sent(answer(tools=[LS, PATCH]), *pieces, wire.end(reason)))
    assert whole["status"] == ("incomplete" if reason == "length" else "completed")


@given(st.lists(PIECES, max_size=6), st.data())
def test_the_same_response_comes_of_any_pieces(pieces: list[bytes], data: st.DataObject) -> None:
    stream = b"".join([*pieces, wire.end()])
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    assert wire.sent(answer(), *wire.in_pieces(stream, cuts)) == wire.sent(answer(), stream)


# -- what is kept


def answered(kept: ResponsesStore, given: Any, text: str, **fields: Any) -> str:
    """Has a request answered, and returns the response's id."""
    made = responses_request.translate({"model": "alpha", "input": given, **fields}, kept)
    identity: str = response(wire.sent(made.answer, wire.text(text), wire.end()))["id"]
    return identity


def test_a_response_has_every_field_that_openais_schema_requires() -> None:
    made = translated(tools=[{"type": "function", "name": "ls"}], prompt_cache_key="k").answer
    whole = json.loads(made.whole(NOTHING))
    assert whole.keys() >= {
        *("background", "frequency_penalty", "presence_penalty", "top_logprobs"),
        *("max_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier"),
    }
    assert whole["prompt_cache_key"] == "k"
    (tool,) = whole["tools"]
    assert tool.keys() >= {"type", "name", "description", "parameters", "strict"}


def test_a_conversation_goes_on_from_any_of_its_answers() -> None:
    store = ResponsesStore()
    first = answered(store, "One?", "One.", instructions="Count.", tools=[LS])
    second = answered(store, "Two?", "Two.", previous_response_id=first)
    request = chat("Three?", store, previous_response_id=second, instructions="Be brief.")
    assert [message["content"] for message in request["messages"]] == [
        "Be brief.",  # instructions are not inherited
        "One?",
        "One.",
        "Two?",
        "Two.",
        "Three?",
    ]
    assert "tools" not in request
    branch = chat("Or?", store, previous_response_id=first)
    assert [message["content"] for message in branch["messages"]] == ["One?", "One.", "Or?"]


def test_an_item_may_be_named_instead_of_sent() -> None:
    store = ResponsesStore()
    identity = answered(store, "One?", "One.")
    item = json.loads(store.response(identity))["output"][0]
    reference = {"type": "item_reference", "id": item["id"]}
    request = chat([said("user", "One?"), reference, said("user", "Two?")], store)
    assert [message["content"] for message in request["messages"]] == ["One?", "One.", "Two?"]


def test_an_answer_is_kept_before_its_end_is_told() -> None:
    store = ResponsesStore()
    made = responses_request.translate({"model": "alpha", "input": "Hi", "stream": True}, store)
    for sent in wire.TranslatedStream(wire.relayed(wire.text("Hi"), wire.end()), made.answer):
        if b"response.completed" in sent:
            identity = wire.events(sent)[-1]["response"]["id"]
            assert json.loads(store.response(identity))["status"] == "completed"
            return
    pytest.fail("no end")


def test_what_is_not_to_be_stored_is_not() -> None:
    store = ResponsesStore()
    identity = answered(store, "Hi", "Hello", store=False)
    with pytest.raises(ResponseNotFound) as refusal:
        store.response(identity)
    assert refusal.value.status == 404


def test_a_wrong_item_is_named_as_the_client_counts_it() -> None:
    store = ResponsesStore()
    first = answered(store, "One?", "One.")
    with pytest.raises(InvalidRequest) as refusal:
        translated([said("robot", "x")], store, previous_response_id=first)
    assert refusal.value.param == "input[0].role"


def test_an_unknown_previous_response_has_openais_code() -> None:
    with pytest.raises(PreviousResponseNotFound) as refusal:
        translated(previous_response_id="resp_gone")
    assert refusal.value.body()["error"]["code"] == "previous_response_not_found"
    assert refusal.value.param == "previous_response_id"
    assert refusal.value.status == 400


def test_a_kept_answer_can_be_read_and_deleted() -> None:
    store = ResponsesStore()
    first = answered(store, "One?", "One.")
    second = answered(store, [said("user", "Two?")], "Two.", previous_response_id=first)
    listed = store.input_items(second)
    assert listed["object"] == "list"
    assert listed["has_more"] is False
    texts = [item["content"][0]["text"] for item in listed["data"]]
    assert texts == ["Two?", "One.", "One?"]
    assert listed["first_id"] == listed["data"][0]["id"]
    assert all(item["id"] for item in listed["data"])
    assert store.delete(first) == {"id": first, "object": "response", "deleted": True}
    for gone in (store.response, store.input_items, store.delete):
        with pytest.raises(ResponseNotFound):
            gone(first)
    assert chat("Three?", store, previous_response_id=second)["messages"][0]["content"] == "One?"


def test_the_answers_unused_for_longest_make_room() -> None:
    store = ResponsesStore(max_responses=2)
    first = answered(store, "1", "1")
    second = answered(store, "2", "2")
    store.response(first)
    answered(store, "3", "3")
    store.response(first)
    with pytest.raises(ResponseNotFound):
        store.response(second)


def test_what_is_kept_has_a_size() -> None:
    store = ResponsesStore(max_bytes=4_000)
    small = answered(store, "1", "1")
    answered(store, "2", "x" * 10_000)  # larger than all that may be kept: nothing goes for it
    store.response(small)
    for number in range(10):
        answered(store, str(number), "x" * 500)
    with pytest.raises(ResponseNotFound):
        store.response(small)
    assert store.size <= 4_000


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["put", "delete"])), max_size=30))
def test_the_stores_size_is_that_of_what_is_in_it(steps: list[tuple[int, str]]) -> None:
    store = ResponsesStore(max_responses=3, max_bytes=500)
    for number, step in steps:
        identity = f"resp_{number}"
        if step == "put":
            item = {"id": f"msg_{number}", "type": "message", "text": "x" * number * 10}
            store.put({"id": identity, "output": [item]}, [])
        else:
            try:
                store.delete(identity)
            except ResponseNotFound:
                continue
    kept = [f"resp_{number}" for number in range(6) if store.item(f"msg_{number}")]
    assert len(kept) <= 3
    assert (store.size == 0) == (not kept)
    for identity in kept:
        store.delete(identity)
    assert store.size == 0
    assert store.item("msg_1") is None


def test_many_threads_share_the_store() -> None:
    store = ResponsesStore(max_responses=5)
    failures: list[BaseException] = []

    def use(number: int) -> None:
        try:
            for _ in range(50):
                first = answered(store, "a", str(number))
                with contextlib.suppress(PreviousResponseNotFound):
                    answered(store, "b", "c", previous_response_id=first)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
