"""Pages of other origins, and names that were pointed at this machine, are refused."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path

import httpx
import pytest
import requests

from tests.support import scripted_server
from tests.support.network import (
    ALICE,
    CALLS,
    HELLO,
    MAX_BODY,
    PAGE,
    STRANGER,
    ask,
    chat,
    describe,
    exchange,
    head,
    is_refusal,
)
from tests.support.proxy import Proxy
from tests.support.raw_http import connect, received


@pytest.mark.parametrize("origin", [STRANGER, "null", "http://localhost.evil.example"])
def test_pages_of_other_origins_are_rejected_on_every_path(proxy: Proxy, origin: str) -> None:
    preflight = {"Access-Control-Request-Method": "POST"}
    for method, path in [*CALLS, ("GET", "/health"), ("OPTIONS", "/health")]:
        for more in ({}, preflight) if method == "OPTIONS" else ({},):
            answer = ask(proxy, method, path, data="{}", headers={"Origin": origin, **more})
            assert answer.status_code == 403, (method, path)
            assert not any(name.startswith("Access-Control") for name in answer.headers)
            if method != "HEAD":
                assert is_refusal(path, answer.json(), "origin_not_allowed")
    assert describe(proxy)["id"] == "tiny/alpha"


EMBEDDED = [("no-cors", "image"), ("no-cors", "script"), ("navigate", "iframe"), ("cors", "empty")]


@pytest.mark.parametrize("site", ["cross-site", "same-site", "none, cross-site", "?"])
@pytest.mark.parametrize(("mode", "kind"), EMBEDDED)
def test_requests_embedded_in_pages_of_other_sites_are_rejected_on_every_path(
    proxy: Proxy, site: str, mode: str, kind: str
) -> None:
    """Such a request tells no Origin: an image, a script, a frame."""
    fetch = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": kind}
    headers = {"Host": "llm.example", **fetch}  # where same-site may be another machine
    for method, path in [*CALLS, ("GET", "/health")]:
        answer = ask(proxy, method, path, headers=headers, data="{}")
        assert answer.status_code == 403, (method, path)
        if method != "HEAD":
            assert is_refusal(path, answer.json(), "origin_not_allowed")
    assert describe(proxy)["id"] == "tiny/alpha"


def test_pages_of_this_machine_and_of_allowed_origins_are_served(
    proxy: Proxy,
) -> None:
    for headers in (
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"},  # an address that was typed
        {"Sec-Fetch-Site": "same-site"},  # of http://localhost:5173 to http://localhost:8080
        {"Sec-Fetch-Site": "cross-site", "Origin": PAGE},
        {"Sec-Fetch-Site": "cross-site", "Origin": "http://127.0.0.1:5173"},
    ):
        host = {"Host": "localhost:8080"}
        assert ask(proxy, "GET", "/v1/models", headers={**headers, **host}).ok, headers
        assert chat(proxy, headers={**headers, **host}).ok, headers


def test_a_link_on_another_site_reaches_only_finite_answers_that_change_nothing(
    proxy: Proxy,
) -> None:
    link = {
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "navigate",
        "Sec-Fetch-Dest": "document",
    }
    for path in ("/health", "/v1/models", "/v1/models/loaded", "/metrics"):
        assert ask(proxy, "GET", path, headers=link).ok, path
    for path in ("/v1/events", "/v1/logs", "/v1/logs?follow=true", "/v1/events?follow=false"):
        assert ask(proxy, "GET", path, headers=link).status_code == 403, path
    for path in ("/v1/models/unload", "/v1/models/load", "/v1/models"):
        assert ask(proxy, "POST", path, headers=link, data="").status_code == 403, path


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_post_without_preflight_from_another_site_has_no_effect(
    proxy: Proxy, program: Path, kind: str | None
) -> None:
    """What a page may send without asking first."""
    headers = {"Origin": STRANGER, **({"Content-Type": kind} if kind else {})}
    before = describe(proxy)
    seen = len(scripted_server.record(program, "request"))
    for path, body in [
        ("/v1/models/unload", ""),
        ("/v1/models/load", '{"model_id": "tiny/beta"}'),
        ("/v1/chat/completions", json.dumps(HELLO)),
    ]:
        assert ask(proxy, "POST", path, data=body, headers=headers).status_code == 403
    after = describe(proxy)
    assert (after["pid"], after["loaded_at"]) == (before["pid"], before["loaded_at"])
    assert len(scripted_server.record(program, "request")) == seen


def test_a_preflight_of_an_allowed_page_is_answered_without_a_key(proxy: Proxy) -> None:
    for method, path in CALLS:
        headers = {
            "Origin": PAGE,
            "Access-Control-Request-Method": method,
            "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
        }
        answer = ask(proxy, "OPTIONS", path, None, headers=headers)
        assert answer.status_code == 204, path
        assert answer.headers["Access-Control-Allow-Origin"] == PAGE
        assert "POST" in answer.headers["Access-Control-Allow-Methods"]
        assert "x-stainless-os" in answer.headers["Access-Control-Allow-Headers"]
        assert int(answer.headers["Access-Control-Max-Age"]) > 0
        assert "Origin" in answer.headers["Vary"]
        assert "Access-Control-Allow-Credentials" not in answer.headers
        assert answer.content == b""


@pytest.mark.parametrize("origin", [PAGE, "http://localhost:5173", "http://127.0.0.1:3000"])
def test_an_allowed_page_may_read_every_answer(proxy: Proxy, origin: str) -> None:
    page = {"Origin": origin}
    for answer in (
        ask(proxy, "GET", "/v1/models", headers=page),
        ask(proxy, "GET", "/v1/models", None, headers=page),
        ask(proxy, "GET", "/nothing", headers=page),
        ask(proxy, "POST", "/v1/models/load", data="no JSON", headers=page),
        chat(proxy, headers=page),
        chat(proxy, headers=page, stream=True),
    ):
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert "Origin" in answer.headers["Vary"]
        assert answer.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
        assert "X-Request-Id" in answer.headers["Access-Control-Expose-Headers"]
        assert answer.content


def test_dns_rebinding_is_rejected_on_every_path(proxy: Proxy) -> None:
    """DNS rebinding: the page's own name leads here, so its requests have no strange origin."""
    for method, path in [*CALLS, ("GET", "/health")]:
        headers = {"Host": f"evil.example:{proxy.port}", "Origin": "http://evil.example"}
        for sent in (headers, {"Host": "evil.example"}):
            answer = ask(proxy, method, path, headers=sent, data="{}")
            assert answer.status_code == 403, (method, path)
            if method != "HEAD":
                assert is_refusal(path, answer.json(), "host_not_allowed")


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8080",
        "localhost.:8080",
        "127.0.0.1",
        "192.168.1.5:8080",
        "[::1]:8080",
        "[fe80::1%25en0]:8080",
        "Mac.local:8080",
        "host.docker.internal:8080",
        "llm.example",
        socket.gethostname(),
        socket.gethostname().upper() + ":8080",
    ],
)
def test_the_machines_own_names_are_answered(proxy: Proxy, host: str) -> None:
    assert ask(proxy, "GET", "/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [".local", "..local", "a..local", "-" * 64 + ".local", "a" * 300 + ".local", "\xe9.local"]
    + ["localhost:999999", "localhost:x", "[::1", "::1", "a b.local", "a\\b.local", "a,b.local"],
)
def test_malformed_host_headers_are_rejected(proxy: Proxy, host: str) -> None:
    (answer,) = exchange(proxy, head("GET", "/health", host=host, connection="close"))
    assert (answer.status, answer.error()["code"]) == (403, "host_not_allowed")


SLASHES = ["//", "/v1/models/", "/health/", "/?/v1/models", "/" * 60_000]  # which mean nothing


@pytest.mark.parametrize(
    "path",
    ["/v1//models", "/v1/models//", "/v1///models/loaded", "*", *SLASHES]
    + ["/v1/models/%2F", "/%00", "/v1/models/%ff", "/../v1/models", "x", "http://a/v1//models"]
    + ["/v1/models/a//b", "/V1/MODELS", "/v1/models;x"],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE", "BREW"])
def test_an_odd_path_or_method_is_answered_in_the_contracts_shape(
    proxy: Proxy, method: str, path: str
) -> None:
    (answer,) = exchange(proxy, head(method, path, connection="close"))
    if method == "GET" and path in SLASHES:
        assert answer.status == 200
        return
    assert answer.status in (400, 404, 405), answer
    assert answer.error()["code"] in ("not_found", "model_not_found", "method_not_allowed")
    assert len(answer.body) < 2000


def test_head_gets_no_body_and_takes_no_place(proxy: Proxy) -> None:
    for path in ("/v1/events", "/v1/logs?follow=true", "/v1/models", "/nothing", "/health"):
        with connect(proxy.port) as connection:
            connection.sendall(head("HEAD", path, connection="close"))
            data = received(connection)
        assert data.endswith(b"\r\n\r\n"), path
        assert data.count(b"\r\n\r\n") == 1, path
    with contextlib.ExitStack() as held:
        for _ in range(8):  # all places of one client
            held.enter_context(ask(proxy, "GET", "/v1/events", stream=True))
        assert ask(proxy, "GET", "/v1/events", stream=True).status_code == 429
        assert ask(proxy, "HEAD", "/v1/events").status_code == 200
    sent = head("HEAD", "/x", content_length=str(MAX_BODY + 1))
    with connect(proxy.port) as connection:
        connection.sendall(sent)
        assert received(connection).endswith(b"\r\n\r\n")


def test_clients_that_are_not_browsers_get_no_cors_headers(proxy: Proxy) -> None:
    (answer,) = exchange(proxy, head("GET", "/v1/models", "1.0", host=""))
    assert answer.status == 200
    url, headers = proxy.url + "/v1/models", {"Authorization": f"Bearer {ALICE}"}
    for found in (
        ask(proxy, "GET", "/v1/models"),
        httpx.get(url, headers=headers),
        requests.post(proxy.url + "/v1/chat/completions", data=json.dumps(HELLO), headers=headers),
    ):
        assert found.status_code == 200
        assert not any(name.lower().startswith("access-control") for name in found.headers)
        assert "Vary" not in found.headers


def test_every_answer_has_security_headers(proxy: Proxy) -> None:
    preflight = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    found = [
        ask(proxy, "GET", "/health"),
        ask(proxy, "GET", "/v1/models", None),
        ask(proxy, "GET", "/v1/models", headers={"Origin": STRANGER}),
        ask(proxy, "GET", "/nothing"),
        ask(proxy, "PUT", "/health"),
        ask(proxy, "GET", "/v1/logs"),
        ask(proxy, "OPTIONS", "/v1/models", headers=preflight),
        chat(proxy),
        chat(proxy, stream=True),
        *exchange(proxy, b"garbage\r\n\r\n"),
        *exchange(proxy, head("POST", "/v1/models/load", content_length=str(MAX_BODY + 1))),
        *exchange(proxy, head("GET", "/", x="y" * 70_000)),
    ]
    for answer in found:
        assert answer.headers["X-Content-Type-Options"] == "nosniff", answer
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert "Cross-Origin-Resource-Policy" in answer.headers
        assert "Server" not in answer.headers
