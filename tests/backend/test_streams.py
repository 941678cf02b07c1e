"""Streams through the proxy, with the clients people use."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import requests

from tests.support import tiny_models
from tests.support.proxy import Proxy
from tests.support.waiting import until

TOKENS = 40
TEXT = tiny_models.answer("alpha", TOKENS)
BODY: dict[str, Any] = {
    "model": "any",
    "messages": [{"role": "user", "content": "Hello!"}],
    "max_tokens": TOKENS,
    "stream": True,
}


@pytest.fixture(scope="module", params=["mlxproxy", "tests.support.buffered_proxy"])
def proxy(
    models: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Proxy]:
    """A proxy with a model loaded, once for each way of a token to its client."""
    instance = tmp_path_factory.mktemp("streams") / "instance"
    proxy = Proxy(instance, models)
    proxy.program = request.param
    proxy.start()
    proxy.load("tiny/alpha")
    yield proxy
    proxy.clean_up()


def text_of(lines: list[str]) -> str:
    """What the events say; the last must be [DONE]."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    deltas = [json.loads(item)["choices"][0]["delta"] for item in data[:-1]]
    return "".join(delta.get("content", "") for delta in deltas)


def test_requests_reads_every_line_and_a_clean_end(proxy: Proxy) -> None:
    with proxy.post("/v1/chat/completions", BODY, stream=True) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.headers["Cache-Control"] == "no-cache"
        assert answer.headers["X-Accel-Buffering"] == "no"
        assert answer.headers["Transfer-Encoding"] == "chunked"
        lines = [line.decode() for line in answer.iter_lines() if line]
    assert text_of(lines) == TEXT


def test_httpx_reads_every_line_and_a_clean_end(proxy: Proxy) -> None:
    url = proxy.url + "/v1/chat/completions"
    with httpx.stream("POST", url, json=BODY, timeout=30) as answer:
        assert text_of(list(answer.iter_lines())) == TEXT


def test_the_openai_package_reads_answers_streamed_and_in_one_piece(proxy: Proxy) -> None:
    client = openai.OpenAI(base_url=proxy.url + "/v1", api_key="dummy")
    messages: Any = [{"role": "user", "content": "Hello!"}]
    stream = client.chat.completions.create(
        model="any",
        messages=messages,
        max_tokens=TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == TEXT
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == TOKENS
    whole = client.chat.completions.create(model="any", messages=messages, max_tokens=TOKENS)
    assert whole.choices[0].message.content == TEXT
    assert [model.id for model in client.models.list()] == ["tiny/alpha", "tiny/beta"]


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not on this machine")
@pytest.mark.parametrize("version", ["--http1.0", "--http1.1"])
def test_curl_reads_a_stream_over_http_1_0_and_1_1(proxy: Proxy, version: str) -> None:
    done = subprocess.run(
        ["curl", "-sSN", version, "-d", json.dumps(BODY), proxy.url + "/v1/chat/completions"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,  # curl fails when the end of the stream is not a proper one
    )
    assert text_of(done.stdout.splitlines()) == TEXT


def raw(proxy: Proxy, version: str) -> bytes:
    """The bytes on the wire."""
    body = json.dumps(BODY).encode()
    head = f"POST /v1/chat/completions HTTP/{version}\r\nHost: 127.0.0.1\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", proxy.port), 10) as connection:
        connection.sendall(head.encode() + body)
        received = b""
        while data := connection.recv(65536):
            received += data
    return received


def test_http_1_1_gets_chunks_and_their_terminator(proxy: Proxy) -> None:
    head, _, body = raw(proxy, "1.1").partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    assert body.endswith(b"0\r\n\r\n")


def test_http_1_0_gets_plain_bytes_and_a_closed_connection(proxy: Proxy) -> None:
    head, _, body = raw(proxy, "1.0").partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert body.endswith(b"data: [DONE]\n\n")


def neutral(stream: bytes) -> list[Any]:
    """The events of a stream, without what differs between two of them."""
    found: list[Any] = []
    for line in stream.split(b"\n"):
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            found.append({k: v for k, v in event.items() if k not in ("id", "created")})
        elif line.startswith(b"data: "):
            found.append(line)
    return found


def test_a_stream_is_what_the_backend_sent_but_for_the_models_name(proxy: Proxy) -> None:
    path = proxy.health()["model_id"]
    direct = requests.post(
        f"http://127.0.0.1:{proxy.backend_port}/v1/chat/completions",
        json={**BODY, "model": path},
        timeout=30,
    ).content
    assert path.encode() in direct
    through = proxy.post("/v1/chat/completions", BODY).content
    expected = neutral(direct.replace(path.encode(), b"tiny/alpha"))
    for event in expected[1:-1]:  # the role comes once
        for choice in event["choices"]:
            choice["delta"].pop("role", None)
    assert neutral(through) == expected


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("endpoint", "asks"),
    [("chat/completions", {}), ("chat/completions", {"logprobs": True}), ("completions", {})],
)
def test_no_answer_shows_a_path_of_this_machine(
    proxy: Proxy, stream: bool, endpoint: str, asks: dict[str, Any]
) -> None:
    prompt = {"prompt": "Hello!"} if endpoint == "completions" else {"messages": BODY["messages"]}
    body = {**prompt, "model": "any", "max_tokens": 4, "stream": stream, **asks}
    answer = proxy.post(f"/v1/{endpoint}", body)
    events = neutral(answer.content)[:-1] if stream else [answer.json()]
    assert events
    assert all(event["model"] == "tiny/alpha" for event in events)
    assert proxy.health()["model_id"] not in answer.text


def figures(proxy: Proxy, answer: requests.Response) -> dict[str, str]:
    """What the log line of an answer says, once it is there."""
    number = answer.headers["X-Request-Id"]
    lines = until(
        lambda: [
            line for line in proxy.get("/v1/logs").text.splitlines() if f"id={number} " in line
        ],
        what="the log line",
    )
    return dict(re.findall(r"(\w+)=(\S+)", lines[0]))


def test_a_prompt_counts_whole_whatever_of_it_is_cached(start: Any, tmp_path: Path) -> None:
    """To its end an answer has the backend's own count; cut off, the keepalives have told it."""
    tiny_models.build_slow(tmp_path / "models" / "tiny" / "slow", says="s", layers=48)
    proxy = start(tmp_path / "models")
    proxy.load("tiny/slow")
    messages = [{"role": "user", "content": tiny_models.long_prompt(60)}]
    body = {**BODY, "messages": messages, "max_tokens": 3}
    url = "/v1/chat/completions"
    whole = proxy.post(url, {**body, "stream": False})
    usage = whole.json()["usage"]
    assert usage["prompt_tokens"] > 60
    streams = [proxy.post(url, body)]
    streams.append(proxy.post(url, {**body, "stream_options": {"include_usage": True}}))
    for number, answer in enumerate([whole, *streams]):
        found = figures(proxy, answer)
        assert int(found["tokens_in"]) == usage["prompt_tokens"]
        assert int(found["tokens_out"]) == 3
        assert (int(found["cached_tokens"]) > 60) == (number > 0)
    with proxy.post(url, {**body, "max_tokens": 2000}, stream=True) as left:
        next(line for line in left.iter_lines() if line.startswith(b"data: "))
    found = figures(proxy, left)
    assert found["outcome"] == "client_gone"
    assert int(found["tokens_in"]) == usage["prompt_tokens"]
    assert int(found["tokens_out"]) > 0


def test_tokens_arrive_one_by_one_as_they_are_generated(start: Any, tmp_path: Path) -> None:
    tiny_models.build_slow(tmp_path / "models" / "tiny" / "slow", says="s", layers=96)
    proxy = start(tmp_path / "models")
    proxy.load("tiny/slow")
    arrivals = []
    with proxy.post("/v1/chat/completions", {**BODY, "max_tokens": 20}, stream=True) as answer:
        for line in answer.iter_lines():
            if line.startswith(b"data: {"):
                arrivals.append(time.monotonic())
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    assert len(arrivals) >= 20
    # Collected output would come in one burst; made one after the other, the gaps are alike.
    assert max(gaps) < 0.7 * (arrivals[-1] - arrivals[0])
    assert sum(gap > 0.005 for gap in gaps) >= 10


def test_the_head_comes_before_the_first_token_of_a_long_prompt(start: Any, tmp_path: Path) -> None:
    tiny_models.build(tmp_path / "models" / "tiny" / "slow", says="s", layers=2)
    proxy = start(tmp_path / "models")
    proxy.load("tiny/slow")
    messages = [{"role": "user", "content": tiny_models.long_prompt(6000)}]
    body = json.dumps({**BODY, "messages": messages, "max_tokens": 2})
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", body)
    answer = connection.getresponse()
    at_head = time.monotonic()
    assert answer.status == 200
    while not answer.readline().startswith(b"data: "):
        pass
    assert time.monotonic() - at_head > 0.5
    connection.close()


def test_the_originals_examples_run_unchanged(proxy: Proxy) -> None:
    """The script of the original documentation, its ports and model aside."""
    requests.post(
        f"{proxy.url}/v1/models/load",
        json={"model_id": "tiny/alpha", "enable_thinking": False},
        timeout=60,
    )
    health = requests.get(f"{proxy.url}/health", timeout=5).json()
    model_path = health["model_id"]
    url = f"http://127.0.0.1:{proxy.backend_port}/v1/chat/completions"
    payload = {
        "model": model_path,
        "messages": [{"role": "user", "content": "Hello!"}],
        "stream": True,
        "max_tokens": TOKENS,
    }
    said = ""
    with requests.post(url, json=payload, stream=True, timeout=30) as resp:
        for line in resp.iter_lines():
            if not line:
                continue
            line_str = line.decode() if isinstance(line, bytes) else line
            if not line_str.startswith("data: "):
                continue
            data_str = line_str[6:]
            if data_str.strip() == "[DONE]":
                break
            chunk = json.loads(data_str)
            said += chunk["choices"][0]["delta"].get("content", "")
    assert said == TEXT
