"""What a request may say: the table of accepted, translated and refused values, field by field."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import struct
import zlib
from typing import Any

import pytest

from mlxproxy.catalog.model import Capabilities
from mlxproxy.engines.mlx_lm.rules import RULES, is_exclusive
from mlxproxy.engines.mlx_lm.unmet import refusal, unmet
from mlxproxy.errors import InvalidRequest
from mlxproxy.guard.check import Kind, check
from mlxproxy.guard.shapes import Limits

LIMITS = Limits(
    template_kwargs=frozenset({"enable_thinking", "reasoning_effort", "thinking_budget"}),
    adapters=frozenset({"/adapters/french"}),
    draft_models=frozenset({"/models/small"}),
    max_tokens=100_000,
    max_image_bytes=1000,
    vocab_size=300,
    max_context=4096,
    images=True,
)
UNKNOWN = dataclasses.replace(LIMITS, vocab_size=None, max_context=None, images=None)

HELLO = [{"role": "user", "content": "Hello"}]
NAN, INFINITY = float("nan"), float("inf")
HUGE = 10**400  # an integer that no float holds
SURROGATE = "\ud800"


def png(width: int, height: int) -> bytes:
    """A picture in one colour, which takes few bytes whatever its size."""
    pieces = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(height * (1 + (width + 7) // 8)), 9)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in pieces
    )


PNG = png(1, 1)
PADDING = bytes(1000 - len(PNG))
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}

TIME = {"type": "function", "function": {"name": "get_time", "parameters": {}}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
STRICT_SCHEMA = {"schema": SCHEMA, "strict": True}
NAMED_SCHEMA = {**STRICT_SCHEMA, "name": "city", "description": "A city."}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def allowed(mode: Any, *tools: Any) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


def data_url(image: bytes = PNG, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


REQUIRED: dict[Kind, dict[str, Any]] = {
    "chat": {"messages": HELLO},
    "text": {"prompt": "Hello"},
    "score": {"prompt": "Hello", "continuations": ["Yes"]},
}


def checked(kind: Kind, fields: dict[str, Any], limits: Limits = LIMITS) -> dict[str, Any]:
    """The checked request with these fields and the required one."""
    return check({**REQUIRED[kind], **fields}, RULES[kind], limits)


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **more}]}


def image(part: dict[str, Any]) -> dict[str, Any]:
    return said([{"type": "text", "text": "What is this?"}, part])


def called(arguments: Any) -> dict[str, Any]:
    """A conversation in which the assistant has called a tool."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    assistant = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {"messages": [*HELLO, assistant, {"role": "tool", "tool_call_id": "1", "content": "5"}]}


def offered(function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": function}]}


SAME: list[tuple[Kind, dict[str, Any]]] = [
    ("chat", {}),
    ("text", {}),
    ("chat", {"model": "anything at all", "user": "me", "metadata": {"a": [1, 2.5, None, True]}}),
    ("chat", {"stream": True, "stream_options": {"include_usage": True}}),
    ("chat", {"temperature": 0.7, "top_p": 0.95, "top_k": 40, "min_p": 0.05, "seed": 42}),
    ("chat", {"xtc_probability": 0.5, "xtc_threshold": 0.1}),
    ("chat", {"repetition_penalty": 1.1, "repetition_context_size": 64}),
    ("chat", {"presence_penalty": -2.0, "presence_context_size": 0}),
    ("chat", {"frequency_penalty": 2.0, "frequency_context_size": 1}),
    ("chat", {"max_tokens": 1}),
    ("chat", {"num_draft_tokens": 4, "draft_model": "/models/small"}),
    ("chat", {"adapters": "/adapters/french"}),
    ("chat", {"logit_bias": {"0": -100.0, "299": 100.0}}),
    ("chat", {"logprobs": True, "top_logprobs": 11}),
    ("text", {"logprobs": True}),
    ("chat", {"n": 1}),
    ("text", {"best_of": 1, "echo": False, "suffix": ""}),
    ("chat", {"tools": [WEATHER], "tool_choice": "auto", "parallel_tool_calls": False}),
    ("chat", {"tools": [WEATHER], "tool_choice": "required"}),
    ("chat", {"response_format": {"type": "json_object"}}),
    ("text", {"response_format": {"type": "json_schema", "json_schema": STRICT_SCHEMA}}),
    ("chat", {"tools": [WEATHER], "tool_choice": NAMED}),
    ("chat", {"tool_choice": "auto"}),
    ("chat", {"role_mapping": {"user": "Q: ", "assistant": "A: ", "stop": "\n"}}),
    ("chat", {"chat_template_kwargs": {"enable_thinking": True, "thinking_budget": 100}}),
    ("chat", {"unknown": nested(64)}),
    ("chat", said("Ünïcödé 🙂", name="Ada", extra={"of": ["a", "client"]})),
    ("chat", image({"type": "image_url", "image_url": {"url": data_url()}})),
    (
        "chat",
        image({"type": "image_url", "image_url": {"url": data_url(PNG + PADDING)}}),
    ),
]

TRANSLATED: list[tuple[Kind, dict[str, Any], dict[str, Any]]] = [
    # null asks for the default
    ("chat", dict.fromkeys(sorted(RULES["chat"].fields.keys() - {"messages"})), {}),
    ("text", dict.fromkeys(sorted(RULES["text"].fields.keys() - {"prompt"})), {}),
    ("chat", {"stream_options": {}}, {}),
    ("chat", {"stream_options": {"include_usage": None}}, {}),
    ("chat", {"stream_options": {"include_usage": False}}, {}),
    (
        "chat",
        {"stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"stream_options": {"include_usage": True}},
    ),
    ("chat", {"max_completion_tokens": 5}, {"max_tokens": 5}),
    ("chat", {"max_completion_tokens": 5, "max_tokens": 9}, {"max_tokens": 5}),
    ("chat", {"max_tokens": 9, "max_completion_tokens": None}, {"max_tokens": 9}),
    ("chat", {"max_tokens": 2**31}, {"max_tokens": 4096}),
    ("chat", {"max_tokens": -1}, {"max_tokens": 4096}),
    ("chat", {"max_tokens": 64.0}, {"max_tokens": 64}),
    # Numbers that the backend compiles into its kernels are rounded, floats where it wants floats.
    ("chat", {"temperature": 1}, {"temperature": 1.0}),
    ("chat", {"temperature": 0.123456}, {"temperature": 0.12}),
    ("chat", {"temperature": 1e-320}, {"temperature": 0.0}),
    ("chat", {"top_p": 0.98765}, {"top_p": 0.988}),
    ("chat", {"top_p": 0}, {"top_p": 0.001}),
    ("chat", {"top_p": 1e-320}, {"top_p": 0.001}),
    ("chat", {"min_p": 0.01234}, {"min_p": 0.012}),
    (
        "chat",
        {"xtc_probability": 1, "xtc_threshold": 0},
        {"xtc_probability": 1.0, "xtc_threshold": 0.0},
    ),
    ("chat", {"repetition_penalty": 1e-320}, {"repetition_penalty": 0.0}),
    ("chat", {"top_k": -1}, {"top_k": 0}),
    ("chat", {"top_k": 300}, {"top_k": 0}),
    ("chat", {"top_k": 2**62}, {"top_k": 0}),
    ("chat", {"seed": -1}, {}),
    ("chat", {"seed": -2}, {"seed": 2**64 - 2}),
    ("chat", {"seed": 42, "temperature": 0}, {"temperature": 0.0}),
    ("chat", {"logit_bias": {"7": 5}}, {"logit_bias": {"7": 5.0}}),
    ("chat", {"stop": "END"}, {"stop": ["END"]}),
    ("chat", {"stop": ["", "END", ""]}, {"stop": ["END"]}),
    ("chat", {"stop": ""}, {}),
    ("chat", {"stop": []}, {}),
    ("chat", {"logprobs": True, "top_logprobs": 20}, {"logprobs": True, "top_logprobs": 11}),
    ("text", {"logprobs": 5}, {"logprobs": True, "top_logprobs": 5}),
    ("text", {"logprobs": 0}, {"logprobs": True, "top_logprobs": 0}),
    ("chat", {"response_format": {"type": "text"}}, {}),
    # what llama.cpp's clients send, and what OpenAI's do
    (
        "chat",
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    ),
    (
        "text",
        {"response_format": {"type": "json_schema", "json_schema": NAMED_SCHEMA}},
        {"response_format": {"type": "json_schema", "json_schema": STRICT_SCHEMA}},
    ),
    ("chat", {"tools": []}, {}),
    ("chat", {"tools": [WEATHER], "tool_choice": "none"}, {"tool_choice": "none"}),
    # the model is offered what it may call, and nothing else
    (
        "chat",
        {"tools": [TIME, WEATHER], "tool_choice": NAMED},
        {"tools": [WEATHER], "tool_choice": NAMED},
    ),
    (
        "chat",
        {"tools": [TIME, WEATHER], "tool_choice": allowed("auto", NAMED)},
        {"tools": [WEATHER], "tool_choice": allowed("auto", NAMED)},
    ),
    ("chat", {"modalities": ["text"]}, {}),
    ("text", {"tools": [5], "tool_choice": {"type": 5}}, {}),
    ("text", {"prompt": ["Hello"]}, {"prompt": "Hello"}),
    ("text", {"messages": [{"content": [5]}]}, {}),
    # thinking, said in three ways
    ("chat", {"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}),
    (
        "chat",
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "none"}},
    ),
    (
        "chat",
        {"reasoning_effort": "low"},
        {"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "low"}},
    ),
    (
        "chat",
        {"reasoning_effort": "low", "enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "low"}},
    ),
    (
        "chat",
        {"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": True}},
        {"chat_template_kwargs": {"enable_thinking": True}},
    ),
    ("chat", {"chat_template_kwargs": {"enable_thinking": None}}, {}),
    # messages
    ("chat", said([{"type": "text", "text": it} for it in ("Hel", "lo")]), said("Hello")),
    ("chat", said([]), said("")),
    ("chat", said("Hello", name=None), said("Hello")),
    (
        "chat",
        {"messages": [{"role": "developer", "content": "Be brief."}, *HELLO]},
        {"messages": [{"role": "system", "content": "Be brief."}, *HELLO]},
    ),
    (
        "chat",
        {"messages": [*HELLO, {"role": "assistant", "content": None, "tool_calls": []}]},
        {"messages": [*HELLO, {"role": "assistant", "content": ""}]},
    ),
    (
        "chat",
        {
            "messages": [
                *HELLO,
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            ]
        },
        {"messages": [*HELLO, {"role": "assistant", "content": "No."}]},
    ),
    ("chat", called('{"city": "Paris"}'), called({"city": "Paris"})),
    ("chat", called(""), called({})),
    ("chat", called("null"), called({})),
    ("chat", called(None), called({})),
    (
        "chat",
        image({"type": "image_url", "image_url": data_url()}),
        image({"type": "image_url", "image_url": {"url": data_url()}}),
    ),
    (
        "chat",
        image({"type": "image", "image": data_url(), "detail": "low"}),
        image({"type": "image_url", "image_url": {"url": data_url()}}),
    ),
    (
        "chat",
        image({"type": "input_image", "image_url": {"url": data_url(), "detail": "low"}}),
        image({"type": "image_url", "image_url": {"url": data_url()}}),
    ),
]

# (kind, what the request says, the field that the error names)
REFUSED: list[tuple[Kind, dict[str, Any], str]] = [
    ("chat", {"model": 5}, "model"),
    # reaching out
    ("chat", {"adapters": "/etc"}, "adapters"),
    ("chat", {"adapters": ["/adapters/french"]}, "adapters"),
    ("chat", {"draft_model": "org/repo"}, "draft_model"),
    ("chat", {"draft_model": {}}, "draft_model"),
    ("chat", {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
    ("chat", {"chat_template_kwargs": {"truncation": True}}, "chat_template_kwargs"),
    ("chat", {"chat_template_kwargs": 5}, "chat_template_kwargs"),
    *[
        ("chat", {"chat_template_kwargs": {name: value}}, f"chat_template_kwargs.{name}")
        for name, value in [
            ("enable_thinking", "false"),
            ("enable_thinking", 0),
            ("thinking_budget", [1]),
            ("thinking_budget", {}),
            ("reasoning_effort", "x" * 257),
        ]
    ],
    ("chat", {"chat_template_kwargs": {"thinking_budget": NAN}}, "chat_template_kwargs"),
    ("chat", {"enable_thinking": "false"}, "enable_thinking"),
    ("chat", {"reasoning_effort": "enormous"}, "reasoning_effort"),
    ("chat", {"reasoning_effort": ["low"]}, "reasoning_effort"),
    *[
        (
            "chat",
            image({"type": "image_url", "image_url": {"url": url}}),
            "messages[0].content[1].image_url.url",
        )
        for url in [
            "http://192.168.1.1/a.png",
            "https://example.com/a.png",
            "file:///etc/passwd",
            "/etc/passwd",
            "",
            5,
            None,
            "data:image/png,abc",
            "data:image/png;base64,?",
            "data:image/png;base64,ü",
            data_url(PNG + PADDING + b"x"),
            data_url(PNG + bytes(10_000)),
            data_url(b"%!PS-Adobe-3.0 EPSF-3.0"),
        ]
    ],
    (
        "chat",
        image({"type": "image_url", "image_url": "http://a/b"}),
        "messages[0].content[1].image_url",
    ),
    ("chat", image({"type": "image", "image": "http://a/b"}), "messages[0].content[1].image"),
    (
        "chat",
        image({"type": "input_image", "image_url": "http://a/b"}),
        "messages[0].content[1].image_url",
    ),
    ("chat", image({"type": "image"}), "messages[0].content[1].image"),
    ("chat", image({"type": "input_audio", "input_audio": {}}), "messages[0].content[1].type"),
    # streaming and length
    ("chat", {"stream": 1}, "stream"),
    ("chat", {"stream_options": "include_usage"}, "stream_options"),
    ("chat", {"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    *[
        ("chat", {name: value}, name)
        for name in ("max_tokens", "max_completion_tokens")
        for value in (0, -2, 1.5, "5", True, [], HUGE, INFINITY)
    ],
    ("chat", {"num_draft_tokens": -1}, "num_draft_tokens"),
    ("chat", {"num_draft_tokens": 10**30}, "num_draft_tokens"),
    # sampling
    *[
        ("chat", {name: value}, name)
        for name, bad in {
            "temperature": [-0.1, 2.1, 100, HUGE],
            "top_p": [-0.1, 1.1, HUGE],
            "min_p": [-0.1, 1.1, HUGE],
            "xtc_probability": [-0.1, 1.1, HUGE],
            "xtc_threshold": [-0.1, 0.51, 0.9, HUGE],
            "repetition_penalty": [-0.1, 10.1, 1e300, HUGE],
            "presence_penalty": [-2.1, 2.1, 1e39, HUGE],
            "frequency_penalty": [-2.1, 2.1, -1e39, -HUGE],
        }.items()
        for value in (*bad, NAN, INFINITY, -INFINITY, "1", True, [1])
    ],
    *[
        ("chat", {name: value}, name)
        for name in ("repetition_context_size", "presence_context_size", "frequency_context_size")
        for value in (-1, 2**31, 2**63, 1.5, "20", True)
    ],
    *[("chat", {"top_k": value}, "top_k") for value in (-2, 2**70, 1.5, "40", True)],
    *[("chat", {"seed": value}, "seed") for value in (2**64, -(2**63) - 1, 1.5, "1", True)],
    ("chat", {"logit_bias": [1]}, "logit_bias"),
    *[
        ("chat", {"logit_bias": {key: 1}}, "logit_bias")
        for key in ("300", "-1", "999999999", str(2**31), str(2**63), "1_0", " 1", "٣", "x", "")
    ],
    *[
        ("chat", {"logit_bias": {"1": value}}, "logit_bias.1")
        for value in (None, "1", "nan", NAN, 101, -101, 1e39, HUGE, True, [1])
    ],
    *[
        ("chat", {"stop": value}, "stop")
        for value in (5, True, {"a": 1}, [5], [None], [["x"]], ["x" * 1025], ["x"] * 65, SURROGATE)
    ],
    *[("chat", {"top_logprobs": value}, "top_logprobs") for value in (True, -1, 21, 1.5, "5")],
    *[("chat", {"logprobs": value}, "logprobs") for value in (5, "true")],
    *[("text", {"logprobs": value}, "logprobs") for value in (-1, 21, "5", 1.5)],
    # what the backend leaves out without a word
    *[("chat", {"n": value}, "n") for value in (2, 0, True, "1")],
    *[("text", {"best_of": value}, "best_of") for value in (2, True)],
    *[("text", {"echo": value}, "echo") for value in (True, 0)],
    *[("text", {"suffix": value}, "suffix") for value in ("}", 5)],
    *[("score", {"prompt": value}, "prompt") for value in (["a"], 5)],
    ("score", {"messages": HELLO}, "prompt"),  # and a prompt
    ("score", {"stream": True}, "stream"),
    *[("score", {"continuations": value}, "continuations") for value in ([], ["a"] * 129)],
    *[("score", {"continuations": ["a", value]}, "continuations[1]") for value in ("", 5, None)],
    ("chat", {"response_format": "json"}, "response_format"),
    ("chat", {"response_format": {"type": 5}}, "response_format"),
    ("chat", {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ("text", {"response_format": {"type": "json_schema", "schema": {}}}, "response_format"),
    (
        "chat",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}},
        "response_format.strict",
    ),
    (
        "chat",
        {"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]},
        "tools[0].function.strict",
    ),
    ("chat", {"functions": [{"name": "f"}]}, "functions"),
    ("chat", {"function_call": "auto"}, "function_call"),
    ("chat", {"audio": {"voice": "alloy"}}, "audio"),
    ("chat", {"modalities": ["text", "audio"]}, "modalities"),
    ("chat", {"web_search_options": {}}, "web_search_options"),
    # tools
    ("chat", {"tools": {"a": 1}}, "tools"),
    ("chat", {"tools": [5]}, "tools[0].function"),
    ("chat", {"tools": [{"type": "function"}]}, "tools[0].function"),
    ("chat", {"tools": [WEATHER, {"name": "flat"}]}, "tools[1].function"),
    ("chat", offered({"description": "nameless"}), "tools[0].function.name"),
    ("chat", offered({"name": "f", "parameters": "none"}), "tools[0].function.parameters"),
    *[
        (
            "chat",
            offered({"name": "f", "parameters": {"properties": value}}),
            "tools[0].function.parameters.properties",
        )
        for value in (["city"], {"city": True})
    ],
    ("chat", offered({"name": "f", "parameters": {"x": nested(64)}}), "tools"),
    ("chat", offered({"name": "f", "description": SURROGATE}), "tools"),
    ("chat", offered({"name": "f", "parameters": {"properties": {SURROGATE: {}}}}), "tools"),
    ("chat", {"tool_choice": "sometimes"}, "tool_choice"),
    ("chat", {"tool_choice": {"type": 1}}, "tool_choice"),
    *[
        ("chat", {"tools": [WEATHER], "tool_choice": value}, "tool_choice")
        for value in (
            {"type": "function"},
            {"type": "function", "function": {}},
            {"type": "function", "function": {"name": 5}},
            {"type": "function", "function": {"name": "get_time"}},
            {"type": "custom", "custom": {"name": "get_weather"}},
            allowed("required", NAMED, TIME),
        )
    ],
    *[("chat", {"tool_choice": value}, "tool_choice") for value in ("required", NAMED)],
    *[
        ("chat", {"tools": [WEATHER], "tool_choice": value}, f"tool_choice.allowed_tools{place}")
        for value, place in (
            ({"type": "allowed_tools"}, ""),
            (allowed("sometimes", NAMED), ".mode"),
            (allowed("auto", {"name": "get_weather"}), ".tools"),
        )
    ],
    ("chat", {"role_mapping": "user"}, "role_mapping"),
    ("chat", {"role_mapping": {"user": 5}}, "role_mapping"),
    ("chat", {"role_mapping": {"stop": "x" * 257}}, "role_mapping"),
    # the prompt
    *[
        ("text", {"prompt": value}, "prompt")
        for value in ("", [], [""], ["a", "b"], [1, 2], [[1]], 5, {})
    ],
    ("text", {"prompt": None}, "prompt"),
    ("text", {"prompt": SURROGATE}, "prompt"),
    ("text", {"prompt": "x" * (16 * 4096 + 1)}, "prompt"),
    ("chat", said("x" * (16 * 4096 + 1)), "messages"),
    ("chat", said("", reasoning_content="x" * (16 * 4096 + 1)), "messages"),
    ("chat", offered({"name": "f", "description": "x" * (16 * 4096 + 1)}), "messages"),
    ("chat", {"messages": None}, "messages"),
    ("chat", {"messages": []}, "messages"),
    ("chat", {"messages": "Hello"}, "messages"),
    ("chat", {"messages": {}}, "messages"),
    ("chat", {"messages": HELLO * 2049}, "messages"),
    ("chat", {"messages": [*HELLO, "Hello"]}, "messages[1]"),
    ("chat", {"messages": [HELLO]}, "messages[0]"),
    *[
        ("chat", {"messages": [{"role": role, "content": "x"}]}, "messages[0].role")
        for role in (None, 5, "", "User", "ghost", ["user"])
    ],
    *[("chat", said(content), "messages[0].content") for content in (None, 5, {}, True)],
    ("chat", {"messages": [{"role": "assistant", "content": 5}]}, "messages[0].content"),
    *[("chat", said([part]), "messages[0].content[0]") for part in ("x", None, {}, {"type": 5})],
    ("chat", said([{"type": "text"}]), "messages[0].content[0].text"),
    ("chat", said([{"type": "text", "text": 5}]), "messages[0].content[0].text"),
    ("chat", said(SURROGATE), "messages"),
    ("chat", said("x", name=SURROGATE), "messages"),
    ("chat", said("x", extra=nested(64)), "messages"),
    ("chat", said("x", extra=NAN), "messages"),
    ("chat", said("x", tool_calls="f"), "messages[0].tool_calls"),
    ("chat", said("x", tool_calls=[5]), "messages[0].tool_calls[0].function"),
    ("chat", said("x", tool_calls=[{"function": {}}]), "messages[0].tool_calls[0].function.name"),
    *[
        ("chat", called(arguments), "messages[1].tool_calls[0].function.arguments")
        for arguments in ('{"city": ', "[1]", "5", "true", 5, "[" * 100_000, '{"a": ' + "9" * 5000)
    ],
    *[
        ("chat", called(arguments), "messages")  # what only the parsed text shows
        for arguments in (
            r'{"a": "\ud800"}',
            '{"a": NaN}',
            '{"a": 1e999}',
            '{"a":' * 70 + "1" + "}" * 70,
        )
    ],
    # anywhere
    *[
        ("chat", {"unknown": it}, "unknown")
        for it in (
            NAN,
            INFINITY,
            [[-INFINITY]],
            {"a": 2**64},
            -(2**63) - 1,
            [SURROGATE],
            {SURROGATE: 1},
            nested(65),
        )
    ],
]


def name_of(case: object) -> str | None:
    """The start of a case, as its name in the report."""
    return ascii(case)[:60] if isinstance(case, dict) else None


@pytest.mark.parametrize(("kind", "fields"), SAME, ids=name_of)
def test_what_the_backend_takes_passes_unchanged(kind: Kind, fields: dict[str, Any]) -> None:
    assert checked(kind, fields) == {**REQUIRED[kind], **fields}


@pytest.mark.parametrize(("kind", "fields", "expected"), TRANSLATED, ids=name_of)
def test_what_means_the_same_is_translated(
    kind: Kind, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    translated = checked(kind, fields)
    assert translated == {**REQUIRED[kind], **expected}
    assert json.dumps(translated, sort_keys=True) == json.dumps(
        {**REQUIRED[kind], **expected}, sort_keys=True
    ), "1 and 1.0 are not the same to the backend"


@pytest.mark.parametrize(("kind", "fields", "param"), REFUSED, ids=name_of)
def test_what_would_hurt_is_refused_with_the_name_of_the_field(
    kind: Kind, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        checked(kind, fields)
    assert refusal.value.param == param
    assert refusal.value.status == 400
    assert refusal.value.message.endswith((".", ")"))
    json.dumps(refusal.value.body()).encode()


@pytest.mark.parametrize("body", [None, [], "chat", 5, True], ids=ascii)
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    with pytest.raises(InvalidRequest):
        check(body, RULES["chat"], LIMITS)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, rules in RULES.items() for name in rules.fields]
)
def test_every_rule_is_needed(kind: Kind, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each rule there is a case above that ends otherwise without it."""
    rule = RULES[kind].fields[name]
    cases = [
        fields
        for other, fields, *_ in (*TRANSLATED, *REFUSED)
        if name in fields and RULES[other].fields.get(name) is rule
    ]
    before = [outcome(kind, fields) for fields in cases]
    monkeypatch.delitem(RULES[kind].fields, name)
    after = [outcome(kind, fields) for fields in cases]
    assert before != after, f"no case shows what {name} is for"


def outcome(kind: Kind, fields: dict[str, Any]) -> object:
    """The checked request, the name of the field that is refused, or how the check broke."""
    try:
        return checked(kind, fields)
    except InvalidRequest as error:
        return error.param
    except (KeyError, TypeError) as error:
        return type(error)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [*SAME, *((kind, fields) for kind, fields, _ in TRANSLATED)],
    ids=name_of,
)
def test_a_second_check_changes_only_what_was_unknown_at_the_first(
    kind: Kind, fields: dict[str, Any]
) -> None:
    before = copy.deepcopy(fields)
    known = checked(kind, fields)
    assert check(known, RULES[kind], LIMITS) == known
    assert check(checked(kind, fields, UNKNOWN), RULES[kind], LIMITS) == known
    assert fields == before, "the caller's body was changed"


def test_what_depends_on_the_model_waits_until_it_is_known() -> None:
    fields = {
        "top_k": 5000,
        "logit_bias": {"5000": 1.0},
        "max_tokens": 90_000,
        **image({"type": "image_url", "image_url": {"url": data_url()}}),
    }
    assert checked("chat", fields, UNKNOWN) == fields
    long = said("x" * (16 * 4096 + 1))
    assert checked("chat", long, UNKNOWN) == long


def test_a_model_whose_vocabulary_cannot_be_found_out_is_safe_too() -> None:
    obscure = dataclasses.replace(LIMITS, vocab_size=0)
    assert checked("chat", {"top_k": 40}, obscure)["top_k"] == 0
    assert checked("chat", {"logit_bias": {}}, obscure)["logit_bias"] == {}
    with pytest.raises(InvalidRequest, match="are unknown"):
        checked("chat", {"logit_bias": {"5": 1}}, obscure)


def test_the_settings_bound_an_answer_whatever_the_model_allows() -> None:
    assert checked("chat", {"max_tokens": -1}, UNKNOWN)["max_tokens"] == 100_000
    roomy = dataclasses.replace(LIMITS, max_context=1_000_000)
    assert checked("chat", {"max_tokens": 500_000}, roomy)["max_tokens"] == 100_000


def test_an_image_for_a_model_that_reads_none_is_refused() -> None:
    blind = dataclasses.replace(LIMITS, images=False)
    fields = image({"type": "image_url", "image_url": {"url": data_url()}})
    with pytest.raises(InvalidRequest, match="cannot read images"):
        checked("chat", fields, blind)


def test_images_do_not_count_as_text() -> None:
    roomy = dataclasses.replace(LIMITS, max_image_bytes=100_000, max_context=512)
    fields = image({"type": "image_url", "image_url": {"url": data_url(PNG + bytes(50_000))}})
    assert checked("chat", fields, roomy) == fields


def test_small_files_with_huge_pictures_in_them_are_refused() -> None:
    """The backend would unpack each: 200 kB of files to 30 GB of memory."""
    roomy = dataclasses.replace(LIMITS, max_image_bytes=100_000, max_context=None)

    def pictures(*sizes: tuple[int, int]) -> dict[str, Any]:
        urls = [data_url(png(*size)) for size in sizes]
        return said([{"type": "image_url", "image_url": {"url": url}} for url in urls])

    assert checked("chat", pictures((8000, 8000)), roomy)
    for too_large in ([(8001, 8000)], [(8000, 7999), (100, 81)], [(20_000, 20_000)]):
        with pytest.raises(InvalidRequest, match="pixels in total"):
            checked("chat", pictures(*too_large), roomy)


def test_an_image_that_cannot_be_read_is_refused() -> None:
    broken = data_url(PNG[:12] + bytes(50))
    with pytest.raises(InvalidRequest, match="damaged images"):
        checked("chat", image({"type": "image_url", "image_url": {"url": broken}}))


def test_the_effort_reaches_only_templates_that_may_be_told() -> None:
    told = dataclasses.replace(LIMITS, template_kwargs=frozenset({"enable_thinking"}))
    request = checked("chat", {"reasoning_effort": "high"}, told)
    assert request["chat_template_kwargs"] == {"enable_thinking": True}
    assert "reasoning_effort" not in request


@pytest.mark.parametrize(
    ("fields", "alone"),
    [
        ({}, False),
        ({"temperature": 1.0, "logprobs": True}, False),
        ({"seed": 1}, True),
        ({"seed": 1, "temperature": 0}, False),
        ({"seed": -1}, False),
        ({"adapters": "/adapters/french"}, True),
        ({"draft_model": "/models/small"}, True),
        (image({"type": "image_url", "image_url": {"url": data_url()}}), True),
        (said([{"type": "text", "text": "Hello"}]), False),
    ],
    ids=name_of,
)
def test_what_the_backend_answers_alone_is_known_beforehand(
    fields: dict[str, Any], alone: bool
) -> None:
    assert is_exclusive(checked("chat", fields), has=lambda feature: False) is alone
    assert is_exclusive(checked("text", {}), has=lambda feature: False) is False


def test_a_seed_of_its_own_lets_a_request_join_the_others() -> None:
    seeded = checked("chat", {"seed": 1})
    assert is_exclusive(seeded, has={"sampling"}.__contains__) is False


def test_no_refusal_repeats_what_was_said() -> None:
    cases = [(kind, body) for kind, body, _ in REFUSED if "x" * 20 in json.dumps(body)]
    assert cases
    for kind, body in cases:
        with pytest.raises(InvalidRequest) as refusal:
            checked(kind, body)
        assert "xxx" not in refusal.value.message


# -- what is answered, but not as it was asked for

ABLE = Capabilities(tools=True, thinking=True, thinking_default=True, thinking_switch=True)
UNABLE = Capabilities()
ALWAYS_THINKING = Capabilities(thinking=True, thinking_default=True)


@pytest.mark.parametrize(
    ("fields", "can", "fields_unmet"),
    [
        ({}, UNABLE, []),
        ({"tools": [WEATHER], "enable_thinking": True, "stop": "x"}, ABLE, []),
        ({"tools": [WEATHER], "tool_choice": "auto"}, ABLE, []),
        ({"tools": [WEATHER], "tool_choice": allowed("auto", NAMED)}, ABLE, []),
        ({"tools": [WEATHER], "tool_choice": "required"}, ABLE, []),
        ({"tools": [WEATHER], "tool_choice": NAMED}, ABLE, []),
        ({"tools": [WEATHER], "tool_choice": allowed("required", NAMED)}, ABLE, []),
        (
            {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False},
            ABLE,
            [],
        ),
        ({"tools": [WEATHER], "parallel_tool_calls": False}, ABLE, ["parallel_tool_calls"]),
        ({"parallel_tool_calls": False}, ABLE, []),
        ({"tools": [WEATHER], "tool_choice": NAMED}, UNABLE, ["tools"]),
        ({"tools": [WEATHER], "tool_choice": "none"}, UNABLE, []),
        ({"enable_thinking": True}, UNABLE, ["enable_thinking"]),
        ({"reasoning_effort": "low"}, UNABLE, ["enable_thinking"]),
        ({"enable_thinking": False}, UNABLE, []),
        ({"enable_thinking": False}, ALWAYS_THINKING, ["enable_thinking"]),
        ({"enable_thinking": True}, ALWAYS_THINKING, []),
        ({"chat_template_kwargs": {"thinking_budget": 5}}, UNABLE, []),
    ],
    ids=name_of,
)
def test_what_the_answer_does_without_is_told(
    fields: dict[str, Any], can: Capabilities, fields_unmet: list[str]
) -> None:
    found = list(unmet(checked("chat", fields), can, lambda feature: True))
    assert [one.field for one in found] == fields_unmet
    for one in found:
        assert one.sentence.isascii()
        assert one.sentence.endswith(".")


def test_what_only_the_backends_additions_do_right_is_told_where_they_are_off() -> None:
    asked = checked("chat", {"stop": "x", "logprobs": True, "stream": True})
    assert [one.field for one in unmet(asked, ABLE, lambda feature: False)] == ["stop", "logprobs"]
    whole = checked("chat", {"logprobs": True})
    assert list(unmet(whole, ABLE, lambda feature: False)) == []


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": allowed("auto", NAMED)}, None),
        ({"tools": [WEATHER], "tool_choice": "none"}, None),
        ({"tools": [WEATHER]}, None),
        ({"response_format": {"type": "text"}}, None),
    ],
    ids=name_of,
)
def test_what_this_backend_cannot_enforce_is_refused_and_never_ignored(
    fields: dict[str, Any], field: str | None
) -> None:
    asked = checked("chat", fields)
    error = refusal(asked, lambda feature: feature != "grammar")
    assert (error.param if error else None) == field
    assert error is None or error.message.startswith(f"{field} cannot be enforced")
    assert refusal(asked, lambda feature: True) is None


def test_a_prompt_that_cannot_fit_has_the_code_that_clients_look_for() -> None:
    with pytest.raises(InvalidRequest) as refused:
        checked("chat", said("word " * 20_000))
    error = refused.value.body()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "maximum context length is 4096 tokens" in error["message"]
