"""The other dialects over a scripted stand-in: answers, errors, loads, and clients that leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests

from tests.support import scripted_server, strict_readers
from tests.support.proxy import Proxy
from tests.support.waiting import until

Json = dict[str, Any]
USER = [{"role": "user", "content": "Hello!"}]


class Dialect(NamedTuple):
    """How one dialect asks, and how its answers are read."""

    path: str
    body: Json
    read: Callable[[bytes], Json]  # a stream to its end, as its strictest client does
    said: Callable[[Json], str]  # the text of a whole answer
    problem: Callable[[Json], str]  # the message of an error
    failed: Callable[[bytes], str]  # the message that a stream ends with
    waits: bytes  # what a stream has in it while a model is being loaded


def last_line(data: bytes) -> Json:
    line: Json = json.loads(data.strip().rpartition(b"\n")[2].removeprefix(b"data: "))
    return line


DIALECTS = {
    "anthropic": Dialect(
        "/v1/messages",
        {"messages": USER, "max_tokens": 1000},
        strict_readers.anthropic_message,
        lambda whole: "".join(block.get("text", "") for block in whole["content"]),
        lambda body: str(body["error"]["message"]) if body["type"] == "error" else "",
        lambda data: str(last_line(data)["error"]["message"]),
        b": loading ",
    ),
}


@pytest.fixture(params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    return DIALECTS[request.param]


@pytest.fixture
def scripted(
    start: Callable[..., Proxy], models: Path, tmp_path: Path
) -> Callable[..., tuple[Proxy, Path]]:
    """Starts a proxy that loads what requests name, over a stand-in with that script."""

    def starter(**script: Any) -> tuple[Proxy, Path]:
        program = scripted_server.install(tmp_path / "standin", **script)
        settings = {"MLX_SERVER_BIN": program, "MODEL_SELECTION": "requested"}
        return start(models, **settings), program

    return starter


def post(proxy: Proxy, dialect: Dialect, **fields: Any) -> requests.Response:
    body = {"model": "tiny/alpha", "stream": False, **dialect.body, **fields}
    streams = body["stream"]
    return requests.post(proxy.url + dialect.path, json=body, stream=streams, timeout=30)


def test_a_whole_answer(dialect: Dialect, scripted: Any) -> None:
    proxy, _ = scripted(events=3)
    answer = post(proxy, dialect)
    assert answer.status_code == 200, answer.text
    assert dialect.said(answer.json()) == "alpha0 alpha1 alpha2 "
    assert "tiny/alpha" in answer.text


def test_a_stream_and_a_load_while_it_waits(dialect: Dialect, scripted: Any) -> None:
    proxy, _ = scripted(events=3, thoughts=1, load_seconds=3.0)
    data = post(proxy, dialect, stream=True).content
    assert dialect.waits in data
    assert dialect.said(dialect.read(data)) == "alpha1 alpha2 "


def test_an_error_before_a_stream_has_the_dialects_shape(dialect: Dialect, scripted: Any) -> None:
    proxy, _ = scripted(load_failure="the weights are broken")
    answer = post(proxy, dialect, stream=True)
    assert answer.status_code == 500, answer.text
    assert "the weights are broken" in dialect.problem(answer.json())
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_errors_of_the_hooks_have_the_dialects_shape(
    dialect: Dialect, scripted: Any, method: str
) -> None:
    proxy, _ = scripted()
    for path, status in (
        (dialect.path, 405 if method == "PUT" else 400),
        (dialect.path + "/x", 404),
    ):
        answer = requests.request(method, proxy.url + path, data=b"{", timeout=30)
        assert answer.status_code in (status, 405)
        assert dialect.problem(answer.json())


def test_an_error_inside_a_stream_is_its_last_word(dialect: Dialect, scripted: Any) -> None:
    proxy, _ = scripted(events=8, drop_after=2, interval=0.1)
    data = post(proxy, dialect, stream=True).content
    assert b"alpha1" in data
    assert "closed the connection" in dialect.failed(data)


def test_a_client_that_leaves_ends_the_generation(dialect: Dialect, scripted: Any) -> None:
    proxy, program = scripted(events=10_000, interval=0.05)
    with post(proxy, dialect, stream=True) as answer:
        next(answer.iter_content(1))

    def ended() -> list[Json]:
        finished = scripted_server.record(program, "finished")
        return [event for event in finished if event["how"] != "done"]

    assert until(ended, what="the generation's end")[0]["events"] < 1000


def test_a_field_that_cannot_be_is_refused_by_the_clients_name_of_it(scripted: Any) -> None:
    proxy, _ = scripted()
    schema = {"type": "json_schema", "schema": {"type": "object"}}
    answer = post(proxy, DIALECTS["anthropic"], output_config={"format": schema})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("output_config.format ")
    assert answer.headers["request-id"] == answer.headers["X-Request-Id"]


def test_effort_is_given_up_where_a_model_cannot_think(scripted: Any) -> None:
    proxy, _ = scripted(events=1)
    answer = post(proxy, DIALECTS["anthropic"], thinking={"type": "enabled", "budget_tokens": 1024})
    assert answer.status_code == 200
    assert "X-Mlxproxy-Warning" not in answer.headers


def test_tokens_are_counted(scripted: Any) -> None:
    proxy, _ = scripted()
    counted = {"model": "x", "messages": [{"role": "user", "content": "x" * 400}]}
    answer = requests.post(f"{proxy.url}/v1/messages/count_tokens", json=counted, timeout=30)
    assert 90 < answer.json()["input_tokens"] < 120
