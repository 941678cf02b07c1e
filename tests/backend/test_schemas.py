"""Answers that keep to a schema, through the proxy, from a model that says anything.

`make fuzz` sets FUZZ_SCHEMAS to 500 and FUZZ_DEMO to 1, for the same with the demo model.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tokenizers import pre_tokenizers

from mlxproxy.demo import provide
from tests.conftest import Proxy
from tests.standin.test_dialects import DIALECTS, post
from tests.support import schemas, tiny_models

pytestmark = [
    pytest.mark.backend,
    pytest.mark.skipif(
        importlib.metadata.version("mlx-lm").startswith("0.31."),
        reason="mlx-lm 0.31 has other states of an answer: such requests are rejected",
    ),
]

CASES = int(os.environ.get("FUZZ_SCHEMAS", "32"))
AT_ONCE = 64
ANSWER_SECONDS = 3600  # with the demo model on a CPU
MOST_CUT = 0.1  # of the answers; more would prove little
ROOT = Path(__file__).parents[2]
# Ids of characters that end something: a model that says anything would rarely come to an end.
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
ENDS = {str(BYTES.index(character)): 6.0 for character in '"}]'}
YES = {"enum": ["yes", "no"]}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": CITY}} for name in ("go", "see")
]
NO_TOOLS = "{{ messages[-1].content }}"


def form(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    root = tmp_path_factory.mktemp("models") / "tiny"
    tiny_models.build(root / "random", words=60, certainty=0.0)
    tiny_models.build(root / "thinker", says="ada")
    tiny_models.build(root / "plain", thinking=False, chat_template=NO_TOOLS, certainty=0.0)
    proxy = Proxy(
        tmp_path_factory.mktemp("schemas") / "instance", root.parent, MODEL_SELECTION="requested"
    )
    yield proxy.start()
    proxy.clean_up()


def ask(proxy: Proxy, model: str = "tiny/random", **fields: Any) -> Any:
    """Return the answer; the model does not think unless it is asked to."""
    asked = {"temperature": 1.0, "max_tokens": 400, "enable_thinking": False, "model": model}
    body = {"messages": [{"role": "user", "content": "Hello!"}], **asked, "logit_bias": ENDS}
    return proxy.post("/v1/chat/completions", {**body, **fields}, timeout=ANSWER_SECONDS)


def said(proxy: Proxy, kind: int, schema: Any, **fields: Any) -> tuple[str, str]:
    """Return the text and the finish reason of an answer, asked for in one of several ways."""
    fields["response_format"] = form(schema)
    if kind % 4 == 1:  # alone, outside the batch, where the backend has no seeds of its own
        fields["seed"] = kind
    if kind % 4 == 2:
        asked = {"prompt": "x", "temperature": 1.0, "max_tokens": 400, "logit_bias": ENDS}
        asked |= {"model": "tiny/random", **fields}
        answer = proxy.post("/v1/completions", asked, timeout=ANSWER_SECONDS)
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        return choice["text"], choice["finish_reason"]
    if kind % 4 == 3:
        answer = ask(proxy, stream=True, **fields)
        assert answer.status_code == 200, answer.text
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        choices = [json.loads(line)["choices"][0] for line in lines]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        return text, choices[-1]["finish_reason"]
    answer = ask(proxy, **fields)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return choice["message"]["content"] or "", choice["finish_reason"]


def outcomes(proxy: Proxy, cases: int, **fields: Any) -> Counter[str]:
    """Ask for as many schemas, 64 at once, with free answers in between; count what came."""

    def one(number: int) -> str:
        if number % 5 == 4:
            free = ask(proxy, **{**fields, "max_tokens": 20, "logit_bias": {}})
            assert free.status_code == 200
            return "free"
        schema = schemas.generate(number)
        text, reason = said(proxy, number, schema, **fields)
        if reason == "length":
            return "cut"
        assert schemas.is_valid(text, schema), (number, text, schema)
        return "valid"

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = Counter(pool.map(one, range(cases * 5 // 4)))
    print(dict(found))
    return found


def test_every_whole_answer_of_a_model_that_says_anything_is_valid(proxy: Proxy) -> None:
    found = outcomes(proxy, CASES)
    assert found["valid"] + found["cut"] + found["free"] == CASES * 5 // 4
    assert found["cut"] <= MOST_CUT * CASES


@pytest.mark.demo
@pytest.mark.skipif("FUZZ_DEMO" not in os.environ, reason="an hour on a CPU: make fuzz")
@pytest.mark.timeout(3 * ANSWER_SECONDS)
def test_every_whole_answer_of_the_demo_model_is_valid(tmp_path: Path) -> None:
    provide.ensure(ROOT / "instance" / "models")
    proxy = Proxy(tmp_path / "instance", ROOT / "instance" / "models")
    try:
        proxy.start()
        # Where nothing is loaded yet, a seed is answered alone.
        assert ask(proxy, model=None, max_tokens=1).status_code == 200
        found = outcomes(proxy, CASES, model=None, logit_bias={})
        assert found["valid"] > found["cut"]  # it likes to ramble
    finally:
        proxy.clean_up()


def test_any_object_is_an_answer_to_json_object(proxy: Proxy) -> None:
    answer = ask(proxy, response_format={"type": "json_object"}).json()
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length" or isinstance(
        json.loads(choice["message"]["content"]), dict
    )


def test_the_schema_holds_after_the_thought(proxy: Proxy) -> None:
    fields = {"enable_thinking": True, "response_format": form(CITY)}
    answer = ask(proxy, "tiny/thinker", logit_bias={}, **fields)
    (choice,) = answer.json()["choices"]
    jsonschema.validate(json.loads(choice["message"]["content"]), CITY)
    assert choice["message"]["reasoning"] == tiny_models.thoughts()
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "see"}}])
def test_a_forced_call_is_made(proxy: Proxy, choice: Any, stream: bool) -> None:
    answer = ask(proxy, tools=TOOLS, tool_choice=choice, stream=stream)
    assert answer.status_code == 200, answer.text
    assert "X-Mlxproxy-Warning" not in answer.headers
    lines = answer.text.splitlines() if stream else [f"data: {answer.text}"]
    found = [json.loads(line[6:])["choices"] for line in lines if line.startswith("data: {")]
    choices = [choice for (choice,) in filter(None, found)]
    assert choices[-1]["finish_reason"] == "tool_calls"
    messages = [choice["delta" if stream else "message"] for choice in choices]
    calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    assert calls
    for call in calls:
        jsonschema.validate(json.loads(call["arguments"]), CITY)
        assert call["name"] == "see" or choice == "required"


def test_an_impossible_schema_is_refused_by_name(proxy: Proxy) -> None:
    answer = ask(proxy, response_format=form({"type": "array", "uniqueItems": True}))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "response_format")
    assert "uniqueItems" in error["message"]


def test_a_forced_call_in_no_syntax_is_refused(proxy: Proxy) -> None:
    answer = ask(proxy, "tiny/plain", tools=TOOLS, tool_choice="required")
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "tool_choice")
    assert error["message"].startswith("tool_choice is not supported for this model")


ASKED = {
    "responses": ("text.format", {"text": {"format": {"type": "json_schema", "schema": {}}}}),
    "ollama": ("format", {"format": {}}),
    "anthropic": (
        "output_config.format",
        {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
    ),
}


def with_schema(value: Any, schema: Any) -> Any:
    """Return the fields with the schema in the place of an empty object."""
    if value == {}:
        return schema
    if isinstance(value, dict):
        return {key: with_schema(item, schema) for key, item in value.items()}
    return value


@pytest.mark.parametrize("name", ASKED)
def test_each_dialect_has_its_own_words_for_it(proxy: Proxy, name: str) -> None:
    dialect = DIALECTS[next(key for key in DIALECTS if key.startswith(name))]
    field, fields = ASKED[name]
    thinking = {"reasoning": {"effort": "none"}} if name == "responses" else {}
    for stream in (False, True):
        asked = with_schema(fields, YES)
        answer = post(proxy, dialect, model="tiny/thinker", stream=stream, **asked, **thinking)
        assert answer.status_code == 200, answer.text
        read = dialect.read(answer.content) if stream else answer.json()
        assert '"yes"' in dialect.said(read) or '"no"' in dialect.said(read)
    refused = post(proxy, dialect, model="tiny/thinker", **with_schema(fields, {"not": {}}))
    assert refused.status_code == 400
    assert f"{field} cannot be enforced" in refused.text


HOSTILE = {
    "ambiguous": {"type": "string", "pattern": "(a?){50}a{50}"},
    "nested": {"type": "string", "pattern": "(((a+)+)+)+"},
    "long": {"type": "string", "pattern": ".{1,1000000}"},
    "huge": {"type": "string", "maxLength": 1_000_000_000},
    "many": {"type": "array", "items": {"type": "integer"}, "minItems": 100_000},
    "wide": {"anyOf": [{"enum": [f"{n}-{m}" for m in range(200)]} for n in range(200)]},
    "large": {"properties": {f"key{n}": {"type": "string"} for n in range(20_000)}},
    "endless": {"$ref": "#"},
    "ring": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
    "away": {"$ref": "http://127.0.0.1:1/schema.json"},
    "file": {"$ref": "file:///etc/passwd"},
    "options": {"x-guidance": {"whitespace_pattern": "( )*"}, "const": 1},
    "not a schema": {"type": "object", "properties": 5},
}


def test_hostile_schemas_harm_nobody(proxy: Proxy) -> None:
    def one(name: str) -> int:
        return int(ask(proxy, response_format=form(HOSTILE[name]), max_tokens=8).status_code)

    ask(proxy, max_tokens=1)
    pid = {process.pid for process in proxy.children()}
    with ThreadPoolExecutor(len(HOSTILE)) as pool:
        beside = pool.submit(ask, proxy, max_tokens=60, logit_bias={})
        found = dict(zip(HOSTILE, pool.map(one, HOSTILE), strict=True))
        assert beside.result().status_code == 200
    assert set(found.values()) <= {200, 400}, found
    assert {found[name] for name in ("endless", "ring", "away", "file", "not a schema")} == {400}
    assert {process.pid for process in proxy.children()} == pid
    assert ask(proxy, response_format=form(YES)).status_code == 200
