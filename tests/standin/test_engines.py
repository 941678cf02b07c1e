"""A second kind of backend beside `mlx_lm.server`: served, swapped to and from, seen to fail.

All that is known of it lies in tests/support/second_engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import Proxy, until
from tests.support import model_folders, scripted_server, tiny_models

SECOND = {"model_type": "second"}


class TwoEngines(Proxy):
    """A proxy with both."""

    program = "tests.support.second_engine"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of both engines, one that its engine cannot load, and one of none."""
    root = tmp_path_factory.mktemp("library")
    tiny_models.build(root / "tiny" / "alpha", says="alpha")
    for name in ("moon", "broken-moon"):
        model_folders.model(root / "other" / name, config=SECOND)
    model_folders.model(root / "other" / "stone", config={"model_type": "stone"})
    return root


@pytest.fixture
def proxy(library: Path, tmp_path: Path) -> Iterator[Proxy]:
    program = scripted_server.install(tmp_path / "standin")
    settings = {"MLX_SERVER_BIN": program, "MODEL_SELECTION": "requested"}
    made = TwoEngines(tmp_path / "instance", library, **settings)
    try:
        yield made.start()
    finally:
        made.clean_up()


def streamed(proxy: Proxy, text: str = "Hello!", **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream that ends properly."""
    with proxy.chat(text, stream=True, **fields) as answer:
        assert answer.status_code == 200, answer.text
        lines = [line for line in answer.iter_lines() if line.startswith(b"data: ")]
    if not lines[-1].startswith(b'data: {"error"'):
        assert lines.pop() == b"data: [DONE]"
    return [json.loads(line[6:]) for line in lines]


def said(events: list[dict[str, Any]]) -> str:
    choices = [choice for event in events for choice in event.get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def in_flight(proxy: Proxy) -> int:
    number: int = proxy.loaded().get("in_flight", 0)
    return number


def backend_of(proxy: Proxy) -> list[str]:
    return psutil.Process(proxy.loaded()["pid"]).cmdline()


# -- swaps


def test_models_of_both_engines_are_listed_with_the_reason_of_those_that_cannot_be_loaded(
    proxy: Proxy,
) -> None:
    listed = proxy.get("/v1/models?all=true").json()["data"]
    found = {model["id"]: (model["loadable"], model["reason"]) for model in listed}
    assert found["tiny/alpha"] == found["other/moon"] == (True, None)
    loadable, reason = found["other/stone"]
    assert not loadable
    assert "mlx-lm" in reason


def test_a_swap_to_another_engine_and_back_answers_streamed_and_whole(proxy: Proxy) -> None:
    for model, word in (("tiny/alpha", "alpha"), ("other/moon", "moon-"), ("tiny/alpha", "alpha")):
        assert proxy.load(model).json()["status"] == "loaded"
        text = "".join(f"{word}{number} " for number in range(8))
        events = streamed(proxy)
        assert said(events) == text
        assert {event["model"] for event in events} == {model}
        assert ("system_fingerprint" in events[0]) == (model == "tiny/alpha")
        whole = proxy.chat().json()
        assert whole["object"] == "chat.completion"
        assert whole["model"] == model
        assert whole["choices"][0]["message"]["content"] == text
        assert whole["usage"]["completion_tokens"] == 8
        assert all("usage" not in event or not event["usage"] for event in events)


def test_a_request_that_names_a_model_of_another_engine_swaps_to_it(proxy: Proxy) -> None:
    proxy.load("tiny/alpha")
    assert said(streamed(proxy, model="other/moon")).startswith("moon-0 ")
    assert proxy.chat(model="tiny/alpha").json()["model"] == "tiny/alpha"


def test_each_engine_has_its_own_command_and_the_address_it_is_given(proxy: Proxy) -> None:
    proxy.load("other/moon")
    path, bind = backend_of(proxy)[-2:]
    assert path.endswith("/other/moon")
    assert bind == f"127.0.0.1:{proxy.backend_port}"
    assert "HF_HUB_OFFLINE" not in psutil.Process(proxy.loaded()["pid"]).environ()
    proxy.load("tiny/alpha")
    assert "--chat-template-args" in backend_of(proxy)


def test_the_count_of_tokens_comes_only_to_those_who_ask_for_it(proxy: Proxy) -> None:
    proxy.load("other/moon")
    assert streamed(proxy)[-1]["choices"]
    asked = streamed(proxy, stream_options={"include_usage": True})
    assert asked[-1]["usage"]["completion_tokens"] == 8


# -- what requests may say


def test_the_engine_that_answers_says_what_a_request_may_say(proxy: Proxy) -> None:
    proxy.load("other/moon")
    refused = proxy.chat(temperature=0.7)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "temperature: this backend cannot be warmed."
    proxy.load("tiny/alpha")
    assert proxy.chat(temperature=0.7).status_code == 200


def test_a_request_is_checked_by_the_engine_of_the_model_that_it_names(proxy: Proxy) -> None:
    proxy.load("other/moon")
    answer = proxy.chat(model="tiny/alpha", temperature=0.7)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "tiny/alpha"
    assert proxy.chat(model="other/moon", temperature=0.7).status_code == 400


def test_the_engines_own_errors_come_in_the_contracts_shape(proxy: Proxy) -> None:
    proxy.load("other/moon")
    for stream in (False, True):
        refused = proxy.chat("raise", stream=stream)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["code"] == "invalid_request"
        assert error["message"] == "The backend says: the template of this model raises."


# -- its end


def test_a_crash_is_noticed_by_the_engines_own_signature(proxy: Proxy) -> None:
    proxy.load("other/moon")
    first = proxy.loaded()["pid"]
    events = streamed(proxy, "stop working", max_tokens=1000)
    assert said(events).startswith("moon-0 moon-1 ")
    assert events[-1]["error"]["code"] == "backend_failed"
    failed = until(lambda: proxy.loaded()["last_failure"], what="the failure")
    assert failed["reason"].endswith("crashed: its core stopped, out of luck.")
    assert said(streamed(proxy)).startswith("moon-0 ")  # loaded again
    assert proxy.loaded()["pid"] != first


def test_a_failed_load_is_explained_by_the_engine(proxy: Proxy) -> None:
    proxy.load("tiny/alpha")
    failed = proxy.load("other/broken-moon")
    assert failed.status_code == 500
    message = failed.json()["error"]["message"]
    assert message.startswith("other/broken-moon: the moon is wrong. Wait for a month.")
    assert "(second.server: it exited with status 3)" in message
    assert failed.json()["error"]["log"][-1].endswith("the moon is in the wrong quarter")
    proxy.load("tiny/alpha")
    assert said(streamed(proxy)).startswith("alpha0 ")


def test_an_answer_whose_client_leaves_is_ended(proxy: Proxy) -> None:
    proxy.load("other/moon")
    with proxy.chat(stream=True, max_tokens=100_000) as answer:
        next(answer.iter_lines())
    until(lambda: in_flight(proxy) == 0, what="the end of the answer")
