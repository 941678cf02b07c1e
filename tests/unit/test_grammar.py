"""Grammars inside the backend: what they allow is what the request demands, and nothing else."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import random
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest

from mlxproxy.engines.mlx_lm.inside import grammar
from mlxproxy.engines.mlx_lm.inside.grammar import (
    Compiler,
    Guide,
    Speech,
    Thought,
    Unsupported,
    Wanted,
    wanted,
)
from mlxproxy.engines.mlx_lm.inside.syntaxes import SYNTAXES, Refused, Spelling
from tests.support import tiny_models

llguidance = pytest.importorskip("llguidance")
mx = pytest.importorskip("mlx.core")

pytestmark = pytest.mark.skipif(
    importlib.metadata.version("mlx-lm").startswith("0.31."),
    reason="mlx-lm 0.31 has other states of an answer: the feature is off",
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                    "near": {"type": "array", "items": {"type": "number"}, "maxItems": 2},
                    "exact": {"type": "boolean"},
                },
                "required": ["city", "days", "unit"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]
TEMPLATES = {"mistral": "[TOOL_CALLS] [ARGS]"}
FORM = {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes", "no"]}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer of a tiny model: bytes, a few words and the markers."""
    utils = importlib.import_module("mlx_lm.utils")
    folder = tiny_models.build(tmp_path_factory.mktemp("grammar") / "model", words=50)
    return utils.load_tokenizer(folder)


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> Compiler:
    importlib.import_module("llguidance.numpy")
    made = Compiler(llguidance)
    made.prepare(tokenizer)
    return made


def speech(compiler: Compiler, syntax: str | None) -> Speech:
    return Speech(compiler.speech().spelling, syntax, TEMPLATES.get(syntax or "", ""))


def guide(compiler: Compiler, tokenizer: Any, asked: Wanted) -> Guide:
    return Guide(compiler.matcher(asked), sorted(tokenizer.eos_token_ids), asked.is_text, mx, np)


ENDS = ('"', "}", "]", "\n</parameter>\n", "</parameter>\n", "</arg_value>\n", "<tool_call>")


def write(guide: Guide, tokenizer: Any, seed: int, most: int = 800) -> str | None:
    """Return what a model says that chooses at random, but likes to come to an end; or None."""
    chance, said, plan = random.Random(seed), [0], list[int]()
    for _ in range(most):
        logits = guide(mx.array(said), mx.zeros((1, len(tokenizer.vocab))))
        allowed = [int(token) for token in np.nonzero(np.array(logits)[0] == 0)[0]]
        if not plan and chance.random() < 0.6:
            plan = tokenizer.encode(chance.choice(ENDS), add_special_tokens=False)
        ends = tokenizer.eos_token_ids.intersection(allowed)
        if plan and plan[0] in allowed:
            said.append(plan.pop(0))
        elif ends and chance.random() < 0.2:
            assert not guide.failed
            return str(tokenizer.decode(said[1:]))
        else:
            plan = []
            said.append(chance.choice([it for it in allowed if it not in ends] or list(ends)))
        if said[-1] in ends:
            return str(tokenizer.decode(said[1:-1]))
    return None


def calls_in(text: str, syntax: str) -> list[dict[str, Any]]:
    """Return the calls in a text, as mlx-lm reads them."""
    parser = importlib.import_module(f"mlx_lm.tool_parsers.{syntax}")
    found: list[dict[str, Any]] = []
    start, end = parser.tool_call_start, parser.tool_call_end
    for part in text.split(start)[1:] if end else [text[len(start) :]]:
        inner = part.partition(end)[0] if end else part
        parsed = parser.parse_tool_call(inner, TOOLS)
        found += parsed if isinstance(parsed, list) else [parsed]
    return found


def require_valid(call: Mapping[str, Any]) -> None:
    (tool,) = [it["function"] for it in TOOLS if it["function"]["name"] == call["name"]]  # type: ignore[index]
    schema: Any = tool.get("parameters", {"type": "object"})
    jsonschema.validate(call.get("arguments", {}), schema)


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("choice", ["required", "named"])
def test_a_forced_call_is_one_that_mlx_lm_reads_and_its_schema_allows(
    compiler: Compiler, tokenizer: Any, syntax: str, choice: str
) -> None:
    body = {"tools": TOOLS, "tool_choice": "required"}
    if choice == "named":
        body = {"tools": TOOLS[:1], "tool_choice": {"type": "function"}}
    asked = wanted(body, speech(compiler, syntax))
    assert asked is not None
    ended = 0
    for seed in range(12):
        text = write(guide(compiler, tokenizer, asked), tokenizer, seed)
        if text is None:
            continue
        ended += 1
        calls = calls_in(text, syntax)
        assert calls, text
        assert choice == "required" or len(calls) == 1
        for call in calls:
            require_valid(call)
    assert ended >= 3


def test_one_call_at_a_time_is_one_call(compiler: Compiler, tokenizer: Any) -> None:
    body = {"tools": TOOLS[1:], "tool_choice": "required", "parallel_tool_calls": False}
    asked = wanted(body, speech(compiler, "json_tools"))
    assert asked is not None
    for seed in range(8):
        text = write(guide(compiler, tokenizer, asked), tokenizer, seed)
        assert text is None or len(calls_in(text, "json_tools")) == 1


def test_with_tools_a_schema_leaves_the_model_the_choice(
    compiler: Compiler, tokenizer: Any
) -> None:
    body = {"tools": TOOLS[1:], "tool_choice": "auto", "response_format": FORM}
    asked = wanted(body, speech(compiler, "json_tools"))
    assert asked is not None
    texts = {write(guide(compiler, tokenizer, asked), tokenizer, seed) for seed in range(20)}
    assert {'"yes"', '"no"'} & texts
    assert any(text and text.startswith("<tool_call>") for text in texts)


def test_a_strict_tool_is_called_rightly_if_it_is_called(
    compiler: Compiler, tokenizer: Any
) -> None:
    strict = {"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}  # type: ignore[dict-item]
    asked = wanted({"tools": [strict]}, speech(compiler, "json_tools"))
    assert asked is not None
    called = 0
    for seed in range(12):
        made = guide(compiler, tokenizer, asked)
        text = write(made, tokenizer, seed)
        for call in calls_in(text or "", "json_tools"):
            require_valid(call)
            called += 1
    assert called


@pytest.mark.parametrize(
    "body", [{}, {"tools": TOOLS}, {"response_format": {"type": "text"}}, {"tool_choice": "auto"}]
)
def test_a_request_that_demands_nothing_is_left_alone(compiler: Compiler, body: Any) -> None:
    assert wanted(body, speech(compiler, "json_tools")) is None


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"properties": {"tags": {"uniqueItems": True}}}, "uniqueItems"),
        ({"not": {}}, "not"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "https://example.com/a.json"}, "does not fetch"),
        ({"$ref": "#"}, "."),
        ({"type": "string", "format": "poem"}, "poem"),
        ({"enum": []}, "empty"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_with_the_part(
    compiler: Compiler, schema: Any, words: str
) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    asked = wanted({"response_format": form}, speech(compiler, None))
    assert asked is not None
    with pytest.raises(Refused, match=words) as refused:
        compiler.matcher(asked)
    assert refused.value.param == "response_format"
    assert str(refused.value).startswith("response_format cannot be enforced: ")
    assert "x-guidance" not in str(refused.value)


def test_a_schema_that_is_not_strict_holds_as_far_as_it_can(compiler: Compiler) -> None:
    schema = {"type": "array", "uniqueItems": True, "maxItems": 1}
    form = {"type": "json_schema", "json_schema": {"schema": schema, "strict": False}}
    asked = wanted({"response_format": form}, speech(compiler, None))
    assert asked is not None
    compiler.matcher(asked)


def test_the_tool_whose_parameters_cannot_be_enforced_is_named(compiler: Compiler) -> None:
    bad = {"name": "dig", "parameters": {"not": {}}, "strict": True}
    tools = [*TOOLS, {"type": "function", "function": bad}]
    asked = wanted({"tools": tools, "tool_choice": "required"}, speech(compiler, "json_tools"))
    assert asked is not None
    with pytest.raises(Refused, match=r"in dig, .*not") as refused:
        compiler.matcher(asked)
    assert refused.value.param == "tools"


def test_a_forced_call_in_an_unknown_syntax_is_refused(compiler: Compiler) -> None:
    for syntax in (None, "gemma4"):
        with pytest.raises(Refused, match="tool_choice is not supported for this model"):
            wanted({"tools": TOOLS, "tool_choice": "required"}, speech(compiler, syntax))
        with pytest.raises(Refused, match="response_format cannot be combined with tools"):
            wanted({"tools": TOOLS, "response_format": FORM}, speech(compiler, syntax))


@pytest.mark.parametrize("syntax", ["qwen3_coder", "minimax_m2"])
@pytest.mark.parametrize(
    "value", [{"anyOf": [{"type": "integer"}]}, {"type": "string", "minLength": 1}]
)
def test_a_strict_tool_that_a_syntax_cannot_carry_is_refused(
    compiler: Compiler, syntax: str, value: Any
) -> None:
    parameters = {"type": "object", "properties": {"size": value}}
    function = {"name": "dig", "parameters": parameters, "strict": True}
    body = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    with pytest.raises(Refused, match=r"cannot be enforced: in dig, .* of size"):
        wanted(body, speech(compiler, syntax))


@pytest.mark.parametrize("text", ["<|im_end|>", "</tool_call>", "</think>", "<think>"])
def test_the_text_of_a_special_token_can_be_part_of_an_answer(
    compiler: Compiler, tokenizer: Any, text: str
) -> None:
    schema = {"type": "object", "properties": {text: {"const": text}}, "required": [text]}
    form = {
        "type": "json_schema",
        "json_schema": {"schema": {**schema, "additionalProperties": False}},
    }
    asked = wanted({"response_format": form}, speech(compiler, None))
    assert asked is not None
    said = write(guide(compiler, tokenizer, asked), tokenizer, 0)
    assert said == json.dumps({text: text})


def test_equal_grammars_are_compiled_once(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    compile_ = compiler._compile
    monkeypatch.setattr(
        compiler, "_compile", lambda it, text: compiled.append(text) or compile_(it, text)
    )
    form = {"type": "json_schema", "json_schema": {"schema": {"const": "once"}}}
    asked = wanted({"response_format": form}, speech(compiler, None))
    assert asked is not None
    first, second = compiler.matcher(asked), compiler.matcher(asked)
    assert len(compiled) == 1
    assert first is not second


# -- one answer


def asks_yes_or_no(compiler: Compiler) -> Wanted:
    asked = wanted({"response_format": FORM}, speech(compiler, None))
    assert asked is not None
    return asked


def allowed(guide: Guide, *said: int) -> list[int]:
    logits = np.array(guide(mx.array([0, *said]), mx.zeros((1, 400))))
    assert np.isfinite(logits).all()  # or the log probabilities are no JSON
    return [int(token) for token in np.nonzero(logits[0] == 0)[0]]


def test_the_thought_of_a_model_is_free_but_cannot_be_the_whole_answer(
    compiler: Compiler, tokenizer: Any
) -> None:
    made = guide(compiler, tokenizer, asks_yes_or_no(compiler))
    (end,) = tokenizer.think_end_tokens
    made.begin(Thought(tokenizer.think_start_tokens, tokenizer.think_end_tokens, is_open=True))
    free = allowed(made)
    assert len(free) == 400 - len(tokenizer.eos_token_ids)
    assert allowed(made, 65) == free
    assert tokenizer.decode(allowed(made, 65, end)) == '"'


def test_a_model_may_open_a_thought_before_its_answer_but_not_in_it(
    compiler: Compiler, tokenizer: Any
) -> None:
    made = guide(compiler, tokenizer, asks_yes_or_no(compiler))
    (start,), (end,) = tokenizer.think_start_tokens, tokenizer.think_end_tokens
    quote = tokenizer.convert_tokens_to_ids('"')
    made.begin(Thought((start,), (end,), is_open=False))
    assert allowed(made) == sorted([quote, start])
    assert len(allowed(made, start)) > 300
    assert allowed(made, start, end) == [quote]
    assert start not in allowed(made, start, end, quote)


def test_nothing_follows_a_whole_answer(compiler: Compiler, tokenizer: Any) -> None:
    made = guide(compiler, tokenizer, asks_yes_or_no(compiler))
    said: list[int] = []
    for character in '"yes"':
        assert (token := tokenizer.convert_tokens_to_ids(character)) in allowed(made, *said)
        said.append(token)
    (end,) = tokenizer.eos_token_ids
    assert allowed(made, *said) == [end]
    made(mx.array([0, *said, end]), mx.zeros((1, 400)))  # a batch computes one token more
    assert not made.failed


class _Broken:
    """A matcher that fails in every way."""

    def __init__(self, how: str) -> None:
        self._how = how

    def consume_token(self, token: int) -> bool:
        if self._how == "panics":
            raise BaseException("panic")
        return False

    def is_error(self) -> bool:
        return self._how == "errs"

    def compute_bitmask(self) -> bytes:
        return bytes(50) if self._how == "allows nothing" else b"\xff" * 50


@pytest.mark.parametrize("how", ["panics", "refuses", "errs", "allows nothing"])
def test_a_matcher_that_fails_ends_its_answer_alone(how: str) -> None:
    made = Guide(_Broken(how), [7], True, mx, np)
    for said in ([1], [1, 2]):
        logits = made(mx.array(said), mx.zeros((1, 400)))
    assert made.failed
    if how != "panics":
        assert list(np.nonzero(np.array(logits)[0] == 0)[0]) == [7]
    with pytest.raises(ConnectionError):
        next(grammar._checked(made, iter([SimpleNamespace()])))


def test_a_tokenizer_that_is_not_supported_is_refused_with_the_reason() -> None:
    made = Compiler(llguidance)
    slow: Any = SimpleNamespace(_tokenizer=SimpleNamespace())
    made.prepare(slow)
    with pytest.raises(Unsupported, match="only fast tokenizers are supported"):
        made.speech()


def test_a_literal_names_its_special_tokens_by_their_ids() -> None:
    spelling = Spelling({"<a>": 5, "<a><b>": 6})
    assert spelling.text('x<a><b>"<a>') == '"x" <[6]> "\\"" <[5]>'
    assert spelling.text("") == ""


def test_the_feature_is_off_without_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from mlxproxy.engines.mlx_lm.inside.gate import Unexpected

    server = importlib.import_module("mlx_lm.server")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(Unexpected, match=r"llguidance is not installed: run .* -m pip install"):
        grammar.arm(server, mx)
