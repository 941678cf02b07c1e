"""Each request has an id and a line in the log, which no client can forge."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import requests

from tests.support.network import (
    ALICE,
    CALLS,
    FORGED,
    HELLO,
    MAX_BODY,
    STRANGER,
    ask,
    chat,
    describe,
    exchange,
    figures,
    head,
    lines_of,
    log,
)
from tests.support.proxy import Proxy
from tests.support.raw_http import connect
from tests.support.waiting import until


def test_every_answer_has_a_request_id_and_keeps_a_valid_one_of_the_client(proxy: Proxy) -> None:
    own = {"X-Request-Id": "mine-1"}
    for method, path in [*CALLS, ("GET", "/health")]:
        for key in (ALICE, None):
            answer = ask(proxy, method, path, key, headers=own, data="{}", stream=True)
            assert answer.headers["X-Request-Id"] == "mine-1"
            answer.close()
    assert chat(proxy, headers=own).headers["X-Request-Id"] == "mine-1"
    (answer,) = exchange(
        proxy,
        head("POST", "/v1/models/load", content_length=str(MAX_BODY + 1), x_request_id="mine-2"),
    )
    assert answer.headers["X-Request-Id"] == "mine-2"
    for odd in ("a b", "<script>", "x" * 129, "a\tb", "\xe9"):
        answer = ask(proxy, "GET", "/health", headers={"X-Request-Id": odd.encode("latin-1")})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-Id"])


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"garbage\r\n\r\n", 400),
        (head("POST", "/v1/models/load", content_length=str(MAX_BODY + 1)), 413),
        (head("GET", "/", x="y" * 70_000), 431),
        (head("POST", "/", transfer_encoding="gzip"), 501),
    ],
)
def test_requests_that_the_server_itself_rejects_have_an_id_and_a_log_line(
    proxy: Proxy, sent: bytes, status: int
) -> None:
    (answer,) = exchange(proxy, sent)
    assert answer.status == status
    assert answer.error()["code"] != "internal_error"
    number = answer.headers["X-Request-Id"]
    assert re.fullmatch("[0-9a-f]{32}", number)
    (line,) = until(lambda: lines_of(proxy, number), what="its log line")
    assert figures(line)["client"] == "127.0.0.1"
    assert figures(line)["status"] == str(status)


def test_each_request_has_one_log_line_with_its_figures(
    proxy: Proxy, script: Callable[..., None]
) -> None:
    script(events=5, interval=0.01)
    calls: dict[str, tuple[int, Callable[[dict[str, str]], requests.Response]]] = {
        "whole": (200, lambda own: chat(proxy, headers=own)),
        "stream": (200, lambda own: chat(proxy, headers=own, stream=True)),
        "listing": (200, lambda own: ask(proxy, "GET", "/v1/models", headers=own)),
        "loading": (200, lambda own: load(proxy, own)),
        "loading-stream": (200, lambda own: load(proxy, own, stream=True)),
        "refused-key": (401, lambda own: ask(proxy, "GET", "/v1/models", None, headers=own)),
        "refused-page": (403, lambda own: chat(proxy, headers={**own, "Origin": STRANGER})),
        "refused-host": (403, lambda own: chat(proxy, headers={**own, "Host": "evil.example"})),
        "refused-body": (400, lambda own: chat(proxy, headers=own, messages=5)),
        "nothing": (404, lambda own: ask(proxy, "GET", "/nothing", headers=own)),
        "method": (405, lambda own: ask(proxy, "PUT", "/v1/models", headers=own)),
    }
    for name, (status, call) in calls.items():
        answer = call({"X-Request-Id": name})
        assert answer.status_code == status, name
        assert answer.content
        until(lambda name=name: lines_of(proxy, name), what=f"the line of {name}")  # type: ignore[misc]
    for name, (status, _) in calls.items():
        (line,) = lines_of(proxy, name)
        found = figures(line)
        assert found["client"] == "127.0.0.1"
        assert found["status"] == str(status)
        assert found["path"].startswith("/")
        assert float(found["seconds"]) >= 0
        if name in ("whole", "stream"):
            assert (found["model"], found["outcome"]) == ("tiny/alpha", "done")
            assert int(found["tokens_out"]) == 5
            assert int(found["tokens_in"]) > 0
            assert 0 < float(found["first_token"]) <= float(found["seconds"])
            assert float(found["tokens_per_second"]) > 0


def load(proxy: Proxy, headers: dict[str, str], **fields: Any) -> requests.Response:
    body = {"model_id": "tiny/alpha", **fields}
    return ask(proxy, "POST", "/v1/models/load", json=body, headers=headers)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_client_disconnects_has_a_log_line(
    proxy: Proxy, script: Callable[..., None], stream: bool
) -> None:
    script(events=1000, interval=0.02)
    name = f"leaves-{stream}"
    body = json.dumps({**HELLO, "stream": stream, "max_tokens": 1000}).encode()
    with connect(proxy.port) as connection:
        connection.sendall(
            head(
                "POST",
                "/v1/chat/completions",
                content_length=str(len(body)),
                x_request_id=name,
            )
            + body
        )
        until(lambda: describe(proxy)["in_flight"] == 1, what="the answer in flight")
        if stream:
            assert connection.recv(1)
    (line,) = until(lambda: lines_of(proxy, name), what="its log line")
    assert figures(line)["outcome"] == "client_gone"
    assert describe(proxy)["in_flight"] == 0


def test_nothing_a_client_sends_can_forge_a_log_line_or_control_the_terminal(proxy: Proxy) -> None:
    for path in (
        f"/x%0a{FORGED.replace(' ', '%20')}",
        f"/x%0d%0a{FORGED.replace(' ', '%20')}",
        "/x%1b[2J%1b]0;title%07",
        "/x%c2%85y%e2%80%a8z%c2%9b2J",
        "/x%20status=200%20client=9.9.9.9",
    ):
        name = f"forger-{abs(hash(path))}"
        ask(proxy, "GET", path, headers={"X-Request-Id": name})
        (line,) = until(lambda name=name: lines_of(proxy, name), what="its line")  # type: ignore[misc]
        assert figures(line)["status"] == "404"
        assert figures(line)["client"] == "127.0.0.1"
        assert line.isprintable()
        assert line.isascii()
    exchange(
        proxy,
        head("GET", "/nothing", x_request_id="a status=200", user_agent=FORGED, connection="close"),
    )
    assert not any(line.startswith(FORGED[:8]) for line in log(proxy).splitlines())


def test_nothing_a_client_sends_makes_a_log_line_long(proxy: Proxy) -> None:
    before = len(log(proxy))
    long = "x" * 30_000
    for sent in (
        head("GET", "/" + long),
        head("PUT", "/v1/models/" + long),
        head(long.upper(), "/v1/models"),
        head("GET", "/nothing", host=long),
        head("GET", "/nothing", origin=long),
        head("GET", "/nothing", x_request_id=long),
        head("GET", f"/v1/logs?source={long}"),
        head("POST", "/v1/models/load", transfer_encoding=long),
        long.encode() + b"\r\n\r\n",
    ):
        (answer,) = exchange(proxy, sent.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert answer.status >= 400
        assert len(answer.body) < 2000
    lines = log(proxy)[before:].splitlines()
    assert len(lines) >= 9
    assert max(map(len, lines)) < 1000
