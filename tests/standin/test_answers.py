"""The answers under way, for whoever watches: they are listed, and each can be ended by itself."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support import model_folders, scripted_server
from tests.support.following import Following
from tests.support.proxy import Proxy
from tests.support.raw_http import shape
from tests.support.waiting import until

Pool = concurrent.futures.ThreadPoolExecutor


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory, program: Path) -> Iterator[Proxy]:
    """A proxy that answers one request at a time."""
    folder = tmp_path_factory.mktemp("answers")
    for name in ("alpha", "beta"):
        model_folders.model(folder / "models" / "tiny" / name)
    proxy = Proxy(folder / "instance", folder / "models", MLX_SERVER_BIN=program, MAX_CONCURRENT=1)
    yield proxy.start()
    proxy.clean_up()


@pytest.fixture(autouse=True)
def slow(proxy: Proxy, program: Path) -> None:
    """Each answer takes a minute, unless somebody ends it."""
    scripted_server.change(program, events=600, interval=0.1)
    assert proxy.load("tiny/alpha").ok


def answers(proxy: Proxy) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = proxy.get("/v1/events?follow=false").json()["answers"]
    return found


def the_one(proxy: Proxy, phase: str) -> dict[str, Any]:
    """Wait for an answer in that phase, and return it."""
    until(lambda: any(it["phase"] == phase for it in answers(proxy)), what=f"one that is {phase}")
    return next(it for it in answers(proxy) if it["phase"] == phase)


def end(proxy: Proxy, name: str) -> Any:
    return requests.delete(f"{proxy.url}/v1/answers/{name}", timeout=10)


def how_they_ended(program: Path) -> list[str]:
    return [entry["how"] for entry in scripted_server.record(program, "finished")]


def test_a_stream_that_somebody_ends_says_so_and_stops_the_backend(
    proxy: Proxy, program: Path
) -> None:
    before = len(how_they_ended(program))
    stream = proxy.chat(stream=True, max_tokens=600)
    lines = stream.iter_lines()
    until(lambda: b"alpha1" in next(lines), what="the second token")
    answer = the_one(proxy, "answering")
    assert (answer["path"], answer["model"]) == ("/v1/chat/completions", "tiny/alpha")
    assert answer["client"] == "127.0.0.1"
    assert end(proxy, answer["name"]).json() == {"status": "ended"}
    rest = [line for line in lines if line.startswith(b"data: ")]
    error = shape(json.loads(rest[-1][6:]))
    assert error["code"] == "answer_ended"
    until(lambda: "client_gone" in how_they_ended(program)[before:], what="the backend's end")
    until(lambda: answers(proxy) == [], what="the end of the answer")


def test_a_whole_answer_that_somebody_ends_is_an_error_that_no_client_repeats(
    proxy: Proxy, pool: Pool
) -> None:
    asked = pool.submit(proxy.chat, max_tokens=600)
    end(proxy, the_one(proxy, "answering")["name"])
    answer = asked.result(20)
    assert answer.status_code == 410
    assert shape(answer.json())["code"] == "answer_ended"


def test_a_request_that_waits_can_be_ended_and_the_others_go_on(proxy: Proxy, pool: Pool) -> None:
    first = proxy.chat(stream=True, max_tokens=600)
    lines = first.iter_lines()
    until(lambda: b"alpha1" in next(lines), what="the second token")
    waiting = pool.submit(proxy.chat, max_tokens=1)
    end(proxy, the_one(proxy, "waiting")["name"])
    assert waiting.result(20).status_code == 410
    until(lambda: b"alpha" in next(lines), what="another token of the other answer")
    first.close()
    until(lambda: answers(proxy) == [], what="the end of the other answer")


@pytest.mark.parametrize("name", ["0123456789abcdef", "%2e%2e", "x" * 3000])
def test_the_end_of_an_answer_that_is_not_there_is_an_error(proxy: Proxy, name: str) -> None:
    refused = end(proxy, name)
    assert refused.status_code == 404
    assert shape(refused.json())["code"] == "not_found"


def test_who_asks_for_figures_gets_them_every_second_of_an_answer_and_once_after_it(
    proxy: Proxy, follow: Callable[..., Following]
) -> None:
    watched = follow(proxy, "/v1/events?figures=true")
    stream = proxy.chat(stream=True, max_tokens=600)
    lines = stream.iter_lines()  # which ends the answer when nothing refers to it
    next(lines)
    until(lambda: figures(watched)["in_flight"] == 1, what="figures of an answer")
    told = figures(watched)
    (model,) = told["models"]
    assert (model["in_flight"], model["slot"]) == (1, 0)
    assert [answer["model"] for answer in told["answers"]] == ["tiny/alpha"]
    stream.close()
    until(lambda: figures(watched)["answers"] == [], what="figures without the answer")


def figures(watched: Following) -> dict[str, Any]:
    return watched.until("figures")


def test_who_does_not_ask_for_figures_gets_none(
    proxy: Proxy, follow: Callable[..., Following]
) -> None:
    plain, watched = follow(proxy, "/v1/events"), follow(proxy, "/v1/events?figures=true")
    stream = proxy.chat(stream=True, max_tokens=600)
    lines = stream.iter_lines()  # which ends the answer when nothing refers to it
    next(lines)
    figures(watched)
    figures(watched)
    stream.close()
    kinds = set()
    while "request" not in kinds:
        kinds.add(plain.next()[0])
    assert "figures" not in kinds


def test_the_progress_of_a_load_is_told_although_other_things_happen(
    proxy: Proxy, program: Path, pool: Pool, follow: Callable[..., Following]
) -> None:
    scripted_server.change(program, load_seconds=3.0)
    watched = follow(proxy, "/v1/events")
    loading = pool.submit(proxy.load, "tiny/beta")
    seen = []
    while not loading.done():
        proxy.get("/v1/models")  # an event, long before a second has passed
        kind, data = watched.next()
        if kind == "load":
            seen.append(json.loads(data)["seconds"])
    scripted_server.change(program, load_seconds=0.0)
    assert loading.result(20).ok
    assert len([seconds for seconds in seen if seconds >= 1]) >= 1
