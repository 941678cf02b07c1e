"""That an answer is right: it ends where it was asked to, and says of its tokens what is so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from tokenizers import pre_tokenizers

from tests.conftest import Proxy, until
from tests.support import tiny_models

pytestmark = pytest.mark.backend

TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
# The id of the byte 0xF0, with which every emoji begins: a tiny model's first tokens are the bytes.
HALF_CHARACTER = sorted(pre_tokenizers.ByteLevel.alphabet()).index(chr(0xF0))


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    root = tmp_path_factory.mktemp("models") / "tiny"
    # A model that says whole words, where a stop word is read byte by byte: they share no token.
    tiny_models.build(root / "alpha", says="alpha")
    tiny_models.build(root / "short", says="short", length=6)
    tiny_models.build(root / "plain", says="plain", thinking=False)
    proxy = Proxy(tmp_path_factory.mktemp("answers") / "instance", root.parent)
    yield proxy.start()
    proxy.clean_up()


@pytest.fixture(autouse=True, scope="module")
def loaded(proxy: Proxy) -> None:
    assert proxy.load("tiny/alpha").ok


def said(proxy: Proxy, stream: bool, **fields: Any) -> dict[str, Any]:
    """What the model has said, whole or put together of a stream: text, thought, calls, reason."""
    body = {"max_tokens": 40, "stream": stream, **fields}
    if "prompt" not in body:
        body.setdefault("messages", [{"role": "user", "content": "Hi"}])
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    answer = proxy.post(path, body)
    assert answer.ok, answer.text
    if stream:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith(b"data: ")]
        assert lines[-1] == b"[DONE]"
        choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    else:
        choices = answer.json()["choices"]
    parts = [choice.get("delta") or choice.get("message") or choice for choice in choices]
    return {
        "text": "".join(part.get("content") or part.get("text") or "" for part in parts),
        "thought": "".join(part.get("reasoning") or "" for part in parts),
        "calls": [call for part in parts for call in part.get("tool_calls") or ()],
        "reason": choices[-1]["finish_reason"],
        "logprobs": [choice["logprobs"] for choice in choices if choice.get("logprobs")],
    }


def ends(text: str) -> dict[str, Any]:
    return {"text": text, "thought": "", "calls": [], "reason": "stop", "logprobs": []}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("alpha3", "alpha0 alpha1 alpha2 "),
        ("pha3 al", "alpha0 alpha1 alpha2 al"),  # over two tokens
        ("2 alpha3 a", "alpha0 alpha1 alpha"),  # and over three
        ("a0", "alph"),
        (["never", "alpha5", "alpha3 "], "alpha0 alpha1 alpha2 "),
        (["lpha2", "alpha2"], "alpha0 alpha1 "),  # both end at once
        (["alpha2 alpha3 ", "ha2"], "alpha0 alpha1 alp"),  # the first that is complete
        ("alpha0", ""),
        ("a", ""),
        (" ", "alpha0"),
    ],
)
def test_the_text_ends_before_the_stop_word(
    proxy: Proxy, stream: bool, stop: Any, text: str
) -> None:
    assert said(proxy, stream, stop=stop) == ends(text)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_text_is_continued_up_to_the_stop_word(proxy: Proxy, stream: bool) -> None:
    assert said(proxy, stream, prompt="alpha4 ", stop="pha3") == ends("alpha0 alpha1 alpha2 al")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("fields", "reason"), [({"max_tokens": 4}, "length"), ({"model": "tiny/short"}, "stop")]
)
def test_what_only_began_as_a_stop_word_is_part_of_the_text(
    proxy: Proxy, stream: bool, fields: dict[str, Any], reason: str
) -> None:
    word = fields.get("model", "tiny/alpha").partition("/")[2]
    if "model" in fields:
        assert proxy.load("tiny/short").ok
    try:
        count = fields.get("max_tokens", 6)
        answer = said(proxy, stream, stop=[f"{word}{count - 1} and no more", "1 x"], **fields)
        assert (answer["text"], answer["reason"]) == (tiny_models.answer(word, count), reason)
    finally:
        proxy.load("tiny/alpha")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_stop_word_in_the_last_token_that_was_allowed_is_a_stop(
    proxy: Proxy, stream: bool
) -> None:
    assert said(proxy, stream, stop="ha3", max_tokens=4) == ends("alpha0 alpha1 alpha2 alp")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_stop_word_ends_the_answer_and_not_the_thought(proxy: Proxy, stream: bool) -> None:
    answer = said(proxy, stream, stop=["thought2", "pha2"], enable_thinking=True)
    assert answer == {**ends("alpha0 alpha1 al"), "thought": tiny_models.thoughts()}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_stop_word_in_a_tool_call_leaves_the_call_whole(proxy: Proxy, stream: bool) -> None:
    answer = said(proxy, stream, stop=["Paris", "alpha1"], tools=TOOLS)
    (call,) = answer["calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert answer["reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("marker", ["</think>", "<tool_call>"])
def test_a_marker_of_the_models_own_stops_as_well(proxy: Proxy, stream: bool, marker: str) -> None:
    fields = {"enable_thinking": True} if marker == "</think>" else {"tools": TOOLS}
    answer = said(proxy, stream, stop=[marker, "alpha9"], **fields)
    assert (answer["text"], answer["calls"], answer["reason"]) == ("", [], "stop")


def test_nothing_is_generated_for_what_stands_behind_the_stop_word(proxy: Proxy) -> None:
    answer = proxy.chat(stop="pha2", max_tokens=20_000).json()
    assert answer["usage"]["completion_tokens"] == 3
    again = proxy.chat(max_tokens=1).json()  # the backend rests, and answers at once
    assert again["choices"][0]["message"]["content"] == "alpha0 "


def test_all_but_the_beginning_of_a_stop_word_arrives_as_it_is_said(proxy: Proxy) -> None:
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "stop": ["1 alpha2 alpha9"],
        "max_tokens": 5,
        "stream": True,
    }
    lines = proxy.post("/v1/chat/completions", body).iter_lines()
    events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    texts = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert texts == ["alpha0 ", "alpha", "1 alpha2 alpha3 ", "alpha4 ", ""]


def test_an_answer_that_is_made_alone_stops_too(proxy: Proxy) -> None:
    draft = str(Path(proxy.loaded()["model_id"]).parent / "short")
    assert proxy.load("tiny/alpha", draft_models=[draft]).ok
    try:
        assert said(proxy, True, stop="pha2", draft_model=draft) == ends("alpha0 alpha1 al")
    finally:
        proxy.load("tiny/alpha")


# -- log probabilities


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_each_token_has_its_text_its_bytes_and_its_likeliest_alternatives(
    proxy: Proxy, stream: bool
) -> None:
    answer = said(proxy, stream, logprobs=True, top_logprobs=4, max_tokens=3)
    tokens = [token for part in answer["logprobs"] for token in part["content"]]
    assert [token["token"] for token in tokens] == ["alpha0 ", "alpha1 ", "alpha2 "]
    for token in tokens:
        assert bytes(token["bytes"]).decode() == token["token"]
        tops = token["top_logprobs"]
        assert len(tops) == 4
        assert {key: tops[0][key] for key in ("token", "logprob", "bytes")} == {
            key: token[key] for key in ("token", "logprob", "bytes")
        }
        assert sorted((top["logprob"] for top in tops), reverse=True) == [
            top["logprob"] for top in tops
        ]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_the_tokens_amount_to_the_text(proxy: Proxy, stream: bool) -> None:
    """Neither the token that ends the answer is among them, nor those of a stop word."""
    proxy.load("tiny/short")
    try:
        for fields in ({}, {"stop": "hort2 short"}, {"stop": " short"}, {"stop": "short0"}):
            answer = said(proxy, stream, logprobs=True, **fields)
            tokens = [token["token"] for part in answer["logprobs"] for token in part["content"]]
            whole = "".join(tokens)
            assert whole.startswith(answer["text"])
            assert not "".join(tokens[:-1]).startswith(answer["text"] or "none"), fields
            assert "<|im_end|>" not in whole
    finally:
        proxy.load("tiny/alpha")


def test_without_alternatives_there_are_none(proxy: Proxy) -> None:
    (part,) = said(proxy, False, logprobs=True, max_tokens=1)["logprobs"]
    assert part["content"][0]["top_logprobs"] == []


def test_no_log_probabilities_come_unasked(proxy: Proxy) -> None:
    said(proxy, False, logprobs=True, max_tokens=1)
    for stream in (False, True):
        assert said(proxy, stream, max_tokens=1)["logprobs"] == []


def test_a_part_of_a_character_has_its_own_bytes(proxy: Proxy) -> None:
    bias = {str(HALF_CHARACTER): 100}
    answer = said(proxy, False, logprobs=True, max_tokens=2, logit_bias=bias)
    tokens = answer["logprobs"][0]["content"]
    assert [(token["token"], token["bytes"]) for token in tokens] == [("\ufffd", [0xF0])] * 2


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_text_completions_have_the_shape_of_text_completions(proxy: Proxy, stream: bool) -> None:
    answer = said(proxy, stream, prompt="alpha4 ", logprobs=2, max_tokens=3)
    parts = answer["logprobs"]
    tokens = [token for part in parts for token in part["tokens"]]
    assert tokens == ["alpha0 ", "alpha1 ", "alpha2 "]
    assert [offset for part in parts for offset in part["text_offset"]] == [0, 7, 14]
    chosen = [number for part in parts for number in part["token_logprobs"]]
    tops = [top for part in parts for top in part["top_logprobs"]]
    assert [top[token] for top, token in zip(tops, tokens, strict=True)] == chosen
    assert all(len(top) == 2 for top in tops)


# -- nothing is swallowed


def warning(answer: requests.Response) -> str | None:
    assert answer.ok, answer.text
    return answer.headers.get("X-Mlxproxy-Warning")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_the_model_cannot_is_said_in_a_header_and_in_the_log(
    proxy: Proxy, stream: bool
) -> None:
    asked: dict[str, Any] = {"tools": TOOLS, "enable_thinking": True, "stop": "x", "stream": stream}
    assert warning(proxy.chat(**asked)) is None
    assert proxy.load("tiny/plain").ok
    try:
        told = warning(proxy.chat(**asked)) or ""
        assert told.startswith("tools: ")
        assert "enable_thinking: " in told
        log = proxy.instance / "logs" / "proxy.log"
        until(lambda: "unmet=tools,enable_thinking" in log.read_text(), 5, "the log line")
    finally:
        proxy.load("tiny/alpha")


def test_a_model_that_is_only_being_loaded_is_known_already(start: Any, proxy: Proxy) -> None:
    other = start(Path(proxy.loaded()["model_id"]).parents[1])
    told = warning(other.chat(model="tiny/plain", enable_thinking=True, stream=True))
    assert (told or "").startswith("enable_thinking: ")


def test_a_load_that_asks_for_thoughts_of_a_model_without_them_says_so(proxy: Proxy) -> None:
    try:
        told = warning(proxy.load("tiny/plain", enable_thinking=True)) or ""
        assert told.startswith("enable_thinking: ")
        assert warning(proxy.load("tiny/plain", enable_thinking=False)) is None
        assert warning(proxy.load("tiny/alpha", enable_thinking=True)) is None
    finally:
        proxy.load("tiny/alpha")


def test_only_the_tool_that_is_named_is_offered(proxy: Proxy) -> None:
    tools = [*TOOLS, {"type": "function", "function": {"name": "get_time", "parameters": {}}}]
    named = {"type": "function", "function": {"name": "get_weather"}}
    answers = [
        proxy.chat(tools=offered, tool_choice=choice).json()["usage"]["prompt_tokens"]
        for offered, choice in ((TOOLS, "auto"), (tools, named), (tools, "auto"))
    ]
    assert answers[0] == answers[1] < answers[2]
