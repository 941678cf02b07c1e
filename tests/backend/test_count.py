"""The length of a prompt, counted by the backend with the model's own tokenizer and template."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny_models
from tests.support.proxy import Proxy

TOOL = {
    "name": "ls",
    "description": "List a folder.",
    "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}},
}
USER = {"role": "user", "content": "What is in the folder? Ünïcödé, 漢字."}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "ls", "input": {"path": "."}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "a.txt"}


def count(proxy: Proxy, body: dict[str, Any]) -> int:
    answer = proxy.post("/v1/messages/count_tokens", body)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["input_tokens"])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"system": "Be brief."},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"tools": [TOOL]},
        {
            "tools": [TOOL],
            "messages": [
                USER,
                {"role": "assistant", "content": [{"type": "text", "text": "Hm."}, CALL]},
                {"role": "user", "content": [RESULT, {"type": "text", "text": "Well?"}]},
            ],
        },
    ],
    ids=["plain", "system", "thinking", "tools", "history"],
)
def test_the_count_is_the_one_of_the_answer(proxy: Proxy, fields: dict[str, Any]) -> None:
    proxy.load("tiny/alpha")
    body = {"model": "tiny/alpha", "messages": [USER], **fields}
    counted = count(proxy, body)
    usage = proxy.post("/v1/messages", {**body, "max_tokens": 3}).json()["usage"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_a_model_that_is_not_loaded_is_not_loaded_for_a_count(proxy: Proxy) -> None:
    proxy.load("tiny/alpha")
    body = {"model": "tiny/beta", "messages": [{"role": "user", "content": "x" * 400}]}
    assert 90 < count(proxy, body) < 120, "an estimate: a token of this model is a byte"
    assert proxy.loaded()["id"] == "tiny/alpha"


def test_counts_and_answers_at_the_same_time_do_not_disturb_each_other(proxy: Proxy) -> None:
    proxy.load("tiny/alpha")
    body = {"model": "tiny/alpha", "messages": [{"role": "user", "content": "Hello! " * 500}]}
    expected = count(proxy, body)
    counted: list[int] = []
    threads = [
        threading.Thread(target=lambda: counted.extend(count(proxy, body) for _ in range(5)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    texts = {
        proxy.chat("Hello! " * 500, model="tiny/alpha").json()["choices"][0]["message"]["content"]
        for _ in range(5)
    }
    for thread in threads:
        thread.join(60)
    assert counted == [expected] * 20
    assert texts == {tiny_models.answer("alpha", 8)}


def test_a_prompt_that_is_too_long_names_its_length(
    start: Callable[..., Proxy], tmp_path: Path
) -> None:
    tiny_models.build(tmp_path / "models" / "tiny" / "small", max_context=256)
    proxy = start(tmp_path / "models")
    body = {"model": "tiny/small", "messages": [{"role": "user", "content": "x" * 300}]}
    proxy.load("tiny/small")
    told = proxy.post("/v1/messages", {**body, "max_tokens": 3}).json()["error"]["message"]
    assert told == f"prompt is too long: {count(proxy, body)} tokens > 256 maximum"
    body["messages"] = [{"role": "user", "content": "x" * 3000}]
    answer = proxy.post("/v1/messages", {**body, "max_tokens": 3})
    assert answer.status_code == 400
    words = answer.json()["error"]["message"].split()
    assert int(words[4]) == pytest.approx(count(proxy, body), rel=0.05)
