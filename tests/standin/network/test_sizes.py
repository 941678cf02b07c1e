"""Bodies and heads that are too large are refused, and take little memory."""

from __future__ import annotations

import concurrent.futures
import json

import openai
import pytest

from tests.support.network import ALICE, MAX_BODY, ask, exchange, head, others_are_served
from tests.support.proxy import Proxy
from tests.support.raw_http import connect, received, shape


def test_a_body_announced_as_too_large_is_rejected_before_it_is_sent(proxy: Proxy) -> None:
    for length in (MAX_BODY + 1, 10**15):
        (answer,) = exchange(proxy, head("POST", "/v1/models/load", content_length=str(length)))
        assert answer.status == 413
        assert answer.error()["code"] == "request_too_large"


def test_a_body_that_is_too_large_gets_413_instead_of_100_continue(proxy: Proxy) -> None:
    sent = head("POST", "/v1/models/load", content_length=str(10**9), expect="100-continue")
    with connect(proxy.port) as connection:
        connection.sendall(sent)
        found = received(connection)
    assert found.startswith(b"HTTP/1.1 413 ")


def test_a_body_of_exactly_the_allowed_size_is_read(proxy: Proxy) -> None:
    body = b"{}".ljust(MAX_BODY)
    answer = ask(proxy, "POST", "/v1/models/load", data=body)
    assert answer.json()["error"]["param"] == "model_id"
    assert ask(proxy, "POST", "/v1/models/load", data=body + b" ").status_code == 413


def test_a_chunked_body_that_grows_too_large_is_rejected(proxy: Proxy) -> None:
    before = proxy.resident_mib()
    block = b"10000\r\n" + b" " * 65536 + b"\r\n"
    sent = head("POST", "/v1/models/load", transfer_encoding="chunked") + block * 1000  # 64 MB
    (answer,) = exchange(proxy, sent)
    assert answer.status == 413
    assert answer.error()["code"] == "request_too_large"
    assert proxy.resident_mib() - before < 32


@pytest.mark.parametrize("size", [MAX_BODY + 1, 10 * MAX_BODY])
def test_requests_and_openai_read_why_their_body_was_rejected(proxy: Proxy, size: int) -> None:
    answer = ask(proxy, "POST", "/v1/models/load", data=b"x" * size)
    assert (answer.status_code, shape(answer.json())["code"]) == (413, "request_too_large")
    client = openai.OpenAI(base_url=proxy.url + "/v1", api_key=ALICE, max_retries=0)
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="any", prompt="x" * size)
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")


def test_a_head_that_never_ends_is_rejected(proxy: Proxy) -> None:
    sent = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X-Long: " + b"x" * (1 << 20)
    (answer,) = exchange(proxy, sent)
    assert answer.status == 431
    assert answer.error()["code"] == "invalid_request"


@pytest.mark.parametrize(
    "body",
    [
        b"f" * (256 << 10),
        b"0\r\n" + b"f" * (256 << 10),
        b"2\r\n{}\r\n0\r\n" + b"f: f\r\n" * (64 << 10),
        b"1\r\n \r\n" * (64 << 10),
        b"1;f=f\r\n \r\n" * (64 << 10),
        b"6\r\n      \r\n" * (64 << 10),
        b"80000\r\n" + b" " * (512 << 10) + b"\r\n0\r\n" + b"f" * (512 << 10),
    ],
    ids=[
        "a head without end",
        "a trailer without end",
        "trailers",
        "bytes",
        "extensions",
        "six bytes each",
        "a trailer as long as the body",
    ],
)
def test_a_chunked_body_with_more_framing_than_content_is_rejected(
    proxy: Proxy, body: bytes
) -> None:
    """Taking it apart costs the one thread that reads for everybody far more than its length."""
    sent = head("POST", "/v1/models/load", transfer_encoding="chunked") + body
    (answer,) = exchange(proxy, sent)
    assert answer.status == 400
    assert answer.error()["code"] == "invalid_request"


def called(arguments: str) -> bytes:
    """A conversation with a call of a tool, whose arguments are a text of their own."""
    call = {"function": {"name": "f", "arguments": arguments}}
    return json.dumps({"messages": [{"role": "assistant", "tool_calls": [call]}]}).encode()


BOMBS = {
    "lists": b'{"messages": [' + b"[]," * ((MAX_BODY - 64) // 3) + b"0]}",
    "texts": b'{"messages": [' + b'"",' * ((MAX_BODY - 64) // 3) + b"0]}",
    "messages": b'{"messages": [' + b'{"role":"user"},' * ((MAX_BODY - 64) // 16) + b"0]}",
    "arguments": called(f'{{"a": [{"[]," * 1_300_000}0]}}'),
    "escaped arguments": called(f'{{"a": [{"[]," * 500_000}0]}}').replace(b"[],", rb"[]\u002c"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_body_of_a_million_values_is_rejected_and_delays_nobody(
    proxy: Proxy, pool: concurrent.futures.ThreadPoolExecutor, kind: str
) -> None:
    """Parsed, it is thirty times as large, and nothing else runs while it is parsed."""
    before = proxy.resident_mib()
    sent = head("POST", "/v1/chat/completions", content_length=str(len(BOMBS[kind])))
    sent = sent.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + BOMBS[kind]
    with others_are_served(proxy):
        posts = [pool.submit(exchange, proxy, sent) for _ in range(6)]
        found = [post.result()[0] for post in posts]
    told = {(answer.status, answer.error()["code"]) for answer in found}
    # Six of the largest size are more than one client may have in memory.
    assert (400, "invalid_request") in told
    assert told <= {(400, "invalid_request"), (429, "too_many_requests")}
    assert proxy.resident_mib() - before < 200


def test_a_long_text_full_of_brackets_is_not_taken_for_a_million_values(proxy: Proxy) -> None:
    text = ('say "a, b, c" and [x, {y: z}], \\"\\\n' * 10**6)[: MAX_BODY // 3]
    body = {"model": "any", "prompt": text}
    answer = ask(proxy, "POST", "/v1/completions", json=body)
    # Whatever the model's context says of its length: it has been read.
    assert answer.ok or answer.json()["error"]["param"] == "prompt", answer.text
