"""HTTP, as clients and as others write it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import scripted_server
from tests.support.network import ALICE, HELLO, ask, describe, exchange, head, log
from tests.support.proxy import Proxy
from tests.support.raw_http import answers, connect, received


def test_a_chunked_request_body_is_read(proxy: Proxy, program: Path) -> None:
    parts = [json.dumps(HELLO)[:20].encode(), json.dumps(HELLO)[20:].encode()]
    answer = ask(proxy, "POST", "/v1/chat/completions", data=iter(parts))
    assert answer.status_code == 200
    seen = scripted_server.record(program, "request")[-1]
    assert seen["body"]["messages"] == HELLO["messages"]
    assert "Transfer-Encoding" not in seen["headers"], "the backend takes none"


def test_expect_100_continue_is_answered_before_the_body_comes(proxy: Proxy) -> None:
    body = json.dumps(HELLO).encode()
    for framing in ({"content_length": str(len(body))}, {"transfer_encoding": "chunked"}):
        sent = body
        if "transfer_encoding" in framing:
            sent = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        with connect(proxy.port) as connection:
            start = head(
                "POST", "/v1/chat/completions", expect="100-continue", connection="close", **framing
            )
            connection.sendall(start)
            assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(sent)
            (answer,) = answers(received(connection))
        assert answer.status == 200
        assert json.loads(answer.body)["choices"]


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not on this machine")
@pytest.mark.parametrize("header", ["Expect: 100-continue", "Transfer-Encoding: chunked"])
def test_curl_sends_a_body_with_expect_and_chunked(proxy: Proxy, header: str) -> None:
    url = proxy.url + "/v1/chat/completions"
    key = f"Authorization: Bearer {ALICE}"
    done = subprocess.run(
        ["curl", "-sSf", "-H", key, "-H", header, "--data-binary", "@-", url],
        input=json.dumps({**HELLO, "user": "x" * 100_000}).encode(),
        capture_output=True,
        timeout=20,
        check=True,
    )
    assert json.loads(done.stdout)["choices"]


def test_expect_100_continue_without_a_body_is_answered_at_once(proxy: Proxy) -> None:
    (answer,) = exchange(
        proxy, head("GET", "/v1/models", expect="100-continue", connection="close")
    )
    assert answer.status == 200


def test_pipelined_requests_are_answered_in_their_order(proxy: Proxy) -> None:
    body = json.dumps(HELLO).encode()
    post = head(
        "POST", "/v1/chat/completions", content_length=str(len(body)), x_request_id="second"
    )
    found = exchange(
        proxy,
        head("GET", "/v1/models", x_request_id="first")
        + (post + body)
        + head("GET", "/nothing", x_request_id="third")
        + head("GET", "/health", x_request_id="fourth", connection="close"),
    )
    told = [(answer.status, answer.headers["X-Request-Id"]) for answer in found]
    assert told == [(200, "first"), (200, "second"), (404, "third"), (200, "fourth")]


def test_http_1_0_may_keep_its_connection(proxy: Proxy) -> None:
    keep = head("GET", "/v1/models", "1.0", connection="keep-alive")
    found = exchange(proxy, keep + keep + head("GET", "/health", "1.0"))
    assert [answer.status for answer in found] == [200, 200, 200]
    body = json.dumps({**HELLO, "stream": True}).encode()
    stream = head(
        "POST",
        "/v1/chat/completions",
        "1.0",
        connection="keep-alive",
        content_length=str(len(body)),
    )
    (answer,) = exchange(proxy, stream + body)
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert "Transfer-Encoding" not in answer.headers


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + b"\r\n\r\n",  # TLS
        b"\x00" * 5000 + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9 extra\r\n\r\n",
        b"get /health HTTP/1.1\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX: a\x00b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX : a\r\n\r\n",
        b"GET /health HTTP/1.1\r\n folded: first\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX: a\nY: b\r\n\r\n",
        b"POST /v1/models/load HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/models/load HTTP/1.1\r\nContent-Length: +2\r\n\r\n{}",
        b"POST /v1/models/load HTTP/1.1\r\nContent-Length: 0x2\r\n\r\n{}",
        b"POST /v1/models/load HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST /v1/models/load HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"POST /v1/models/load HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}XX0\r\n\r\n",
    ],
)
def test_bytes_that_are_not_http_are_rejected_with_the_contracts_error(
    proxy: Proxy, sent: bytes
) -> None:
    said = len(log(proxy))
    (answer,) = exchange(proxy, sent)
    assert answer.status in (400, 413)
    assert answer.error()["code"] in ("invalid_request", "request_too_large")
    new = log(proxy)[said:]
    assert "Traceback" not in new
    assert "uncaptured" not in new


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        b"Content-Length: 0\r\nContent-Length: 5\r\n\r\n",
        b"Content-Length: 0, 5\r\n\r\n",
        b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    ],
)
@pytest.mark.parametrize("version", [b" HTTP/1.1", b" HTTP/1.0", b" HTTP/1.2", b""])
def test_a_request_of_ambiguous_length_is_rejected_with_all_that_follows(
    proxy: Proxy, version: bytes, framing: bytes
) -> None:
    """Request smuggling: a proxy in front of this one might see the next request elsewhere."""
    start = b"POST /v1/models/unload%s\r\nHost: localhost\r\nConnection: keep-alive\r\n"
    start += b"Authorization: Bearer %s\r\n" % ALICE.encode()
    found = exchange(proxy, start % version + framing + head("GET", "/v1/models"))
    assert [answer.status for answer in found] in ([400], [501])
    assert found[0].error()["code"] == "invalid_request"
    assert describe(proxy)["loaded"] is True
