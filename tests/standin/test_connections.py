"""Connections that end in odd ways, or at odd times: who left, who waits, and who is told what."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.support import scripted_server
from tests.support.proxy import Proxy
from tests.support.raw_http import CONTINUE, answers, connect, received, request, shape
from tests.support.waiting import until

PATH = "/v1/chat/completions"

NOTICED = 2.0  # seconds after which the backend must work for nobody who has left

LATE = 6.0  # seconds of each phase below, if nobody leaves: far more


def chat(stream: bool = False, version: str = "1.1", **fields: Any) -> bytes:
    message = {"role": "user", "content": "Hello!"}
    return request("POST", PATH, {"messages": [message], "stream": stream, **fields}, version)


@pytest.fixture(scope="module")
def shared(
    models: Path, program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    root = tmp_path_factory.mktemp("connections")
    proxy = Proxy(
        root / "instance",
        models,
        MLX_SERVER_BIN=program,
        MAX_CONCURRENT=1,
        MODEL_SELECTION="loaded",
    )
    yield proxy.start()
    proxy.clean_up()


@pytest.fixture
def proxy(shared: Proxy, program: Path) -> Iterator[Proxy]:
    """The proxy, with a model loaded, one place for answers, and nobody on it."""
    scripted_server.change(program, **scripted_server.SCRIPT)
    assert shared.load("tiny/alpha").ok
    until(lambda: not busy(shared), what="the end of earlier answers")
    yield shared
    scripted_server.change(program, **scripted_server.SCRIPT)


def busy(proxy: Proxy) -> int:
    """How many have a place or wait for one."""
    state = proxy.loaded()
    return int(state["in_flight"] + state["waiting"])


def finished(program: Path) -> list[str]:
    """How the answers of the backend ended."""
    return [entry["how"] for entry in scripted_server.record(program, "finished")]


# What a client may be waiting for when it leaves: the script that makes it last, the request, and
# whether something of the answer has been sent then.
PHASES: dict[str, tuple[dict[str, Any], bytes, bool]] = {
    "a whole answer": ({"events": 60, "interval": LATE / 60}, chat(), False),
    "the backend's head": ({"silent_seconds": LATE}, chat(stream=True), False),
    "the prompt": ({"prefill_seconds": LATE, "keepalive_interval": LATE}, chat(stream=True), True),
    "tokens": ({"events": 60, "interval": LATE / 60}, chat(stream=True), True),
    "a stream of HTTP/1.0": (
        {"events": 60, "interval": LATE / 60},
        chat(stream=True, version="1.0"),
        True,
    ),
}


def leave_by_closing(connection: socket.socket) -> None:
    connection.close()


def leave_in_two_steps(connection: socket.socket) -> None:
    """As proxies of TCP do that hand on each end by itself."""
    connection.shutdown(socket.SHUT_WR)
    time.sleep(0.5)
    connection.close()


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("leave", [leave_by_closing, leave_in_two_steps])
def test_the_backend_stops_when_a_client_disconnects(
    proxy: Proxy, program: Path, phase: str, leave: Callable[[socket.socket], None]
) -> None:
    script, sent, begun = PHASES[phase]
    scripted_server.change(program, **script)
    before = len(finished(program))
    with connect(proxy.port) as connection:
        connection.sendall(sent)
        until(lambda: busy(proxy) == 1, what="its place")
        if begun:
            assert connection.recv(1)
        else:
            time.sleep(0.2)  # it is under way
        leave(connection)
        left = time.monotonic()
        until(lambda: len(finished(program)) > before, what="the end at the backend")
        assert time.monotonic() - left < NOTICED
    until(lambda: finished(program)[-1:] == ["client_gone"], what="the end at the backend")
    until(lambda: not busy(proxy), what="its place is free")


def test_the_backend_stops_when_a_client_is_killed(proxy: Proxy, program: Path) -> None:
    scripted_server.change(program, events=60, interval=LATE / 60)
    before = len(finished(program))
    text = (
        "import socket, sys, time\n"
        f"it = socket.create_connection(('127.0.0.1', {proxy.port}))\n"
        f"it.sendall({chat()!r})\n"
        "time.sleep(60)\n"
    )
    client = subprocess.Popen([sys.executable, "-c", text])
    try:
        until(lambda: busy(proxy) == 1, what="its place")
    finally:
        os.kill(client.pid, signal.SIGKILL)
        client.wait()
    left = time.monotonic()
    until(lambda: len(finished(program)) > before, what="the end at the backend")
    assert time.monotonic() - left < NOTICED


@pytest.mark.parametrize("phase", PHASES)
def test_a_half_closed_client_gets_all_of_its_answer(
    proxy: Proxy, program: Path, phase: str
) -> None:
    """`nc -N`, socat and some load balancers send so."""
    script, sent, _ = PHASES[phase]
    scripted_server.change(program, **script)
    with connect(proxy.port) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        data = received(connection, 20)
    assert data.count(CONTINUE) <= 2
    (answer,) = answers(data)
    assert answer.status == 200
    if b'"stream": true' in sent:
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert b"alpha7 " in answer.body
    else:
        assert json.loads(answer.body)["choices"]
    until(lambda: finished(program)[-1:] == ["done"], what="the end at the backend")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stays", [False, True])
def test_a_half_closed_client_keeps_its_place_in_the_queue_and_a_disconnected_one_loses_it(
    proxy: Proxy, program: Path, stream: bool, stays: bool
) -> None:
    scripted_server.change(program, events=40, interval=0.1)
    with connect(proxy.port) as first, connect(proxy.port) as second:
        first.sendall(chat(stream=True))
        assert first.recv(1)
        second.sendall(chat(stream=stream))
        until(lambda: busy(proxy) == 2, what="one that waits")
        if stays:
            second.shutdown(socket.SHUT_WR)
            (answer,) = answers(received(second, 20))
            assert answer.status == 200
        else:
            second.close()
            until(lambda: busy(proxy) == 1, NOTICED, what="the end of its waiting")


def test_a_half_closed_client_gets_the_answer_to_its_load(proxy: Proxy, program: Path) -> None:
    scripted_server.change(program, load_seconds=2)
    with connect(proxy.port) as connection:
        connection.sendall(request("POST", "/v1/models/load", {"model_id": "tiny/beta"}))
        connection.shutdown(socket.SHUT_WR)
        (answer,) = answers(received(connection, 20))
    assert json.loads(answer.body)["id"] == "tiny/beta"


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/logs", "/nothing"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_half_closed_client_gets_a_quick_answer_without_a_probe(
    proxy: Proxy, path: str, version: str
) -> None:
    with connect(proxy.port) as connection:
        connection.sendall(request("GET", path, version=version))
        connection.shutdown(socket.SHUT_WR)
        data = received(connection, 2)
    assert CONTINUE not in data
    (answer,) = answers(data)
    assert answer.status == (404 if path == "/nothing" else 200)


def test_all_requests_sent_before_a_half_close_are_answered(proxy: Proxy) -> None:
    with connect(proxy.port) as connection:
        connection.sendall(request("GET", "/health") * 3 + b"GET /health HTTP/1.1\r\nHos")
        connection.shutdown(socket.SHUT_WR)
        assert [answer.status for answer in answers(received(connection, 2))] == [200] * 3


def test_a_half_closed_follower_gets_events_and_frees_its_place_when_it_disconnects(
    proxy: Proxy,
) -> None:
    for _ in range(20):  # more than there are places
        with connect(proxy.port) as connection:
            connection.sendall(request("GET", "/v1/events"))
            connection.shutdown(socket.SHUT_WR)
            data = connection.recv(1 << 16)
            assert data.startswith(b"HTTP/1.1 200 ")
            proxy.get("/v1/models")
            until(lambda it=connection: b"event: request" in it.recv(1 << 16), 3)  # type: ignore[misc]
    begun = time.monotonic()
    assert proxy.get("/v1/events?follow=false").ok
    assert time.monotonic() - begun < NOTICED


def test_an_answer_in_one_piece_over_http_1_0_is_aborted_for_a_half_closed_client(
    proxy: Proxy, program: Path
) -> None:
    """There is no way to ask such a client, and its answer may take an hour of the backend's."""
    scripted_server.change(program, events=60, interval=LATE / 60)
    with connect(proxy.port) as connection:
        connection.sendall(chat(version="1.0"))
        connection.shutdown(socket.SHUT_WR)
        (answer,) = answers(received(connection, NOTICED + 1))
    assert shape(json.loads(answer.body))["code"] == "backend_failed"
    until(lambda: finished(program)[-1:] == ["client_gone"], what="the end at the backend")


# -- answers that come before the request is whole


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/models/load HTTP/1.1\r\nContent-Length: 60000000\r\n\r\n",
        b"POST /v1/models/load HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST /v1/models/load HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"no HTTP\r\n\r\n",
    ],
    ids=["too large", "an unknown coding", "no chunks", "no HTTP"],
)
def test_a_client_that_sends_all_before_it_reads_learns_why_it_was_rejected(
    proxy: Proxy, head: bytes
) -> None:
    """As nginx does; with a connection closed meanwhile it would answer 502 of its own."""
    with connect(proxy.port) as connection:
        connection.sendall(head)
        for _ in range(60):
            connection.sendall(b" " * 1_000_000)
        (answer,) = answers(received(connection, 5))
    assert 400 <= answer.status < 600
    shape(json.loads(answer.body))


# -- too little of something


@pytest.mark.parametrize("idle", [0, 20])
def test_with_few_open_files_all_clients_are_served_one_after_the_other(
    models: Path, program: Path, tmp_path: Path, idle: int
) -> None:
    scripted_server.change(program, **scripted_server.SCRIPT)
    proxy = Proxy(tmp_path / "instance", models, MLX_SERVER_BIN=program)
    limited = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
    try:
        proxy.start(prelude=limited)
        assert proxy.load("tiny/alpha").ok
        scripted_server.change(program, events=5, interval=0.1)
        with contextlib.ExitStack() as held, ThreadPoolExecutor(60) as pool:
            for _ in range(idle):
                held.enter_context(connect(proxy.port))  # and says nothing
            large = {"user": "x" * 600_000}
            found = list(pool.map(lambda _: proxy.chat(**large).status_code, range(60)))
        assert found == [200] * 60
        assert "Traceback" not in proxy.said()
    finally:
        scripted_server.change(program, **scripted_server.SCRIPT)
        proxy.clean_up()


def test_a_body_that_finds_no_disk_space_gets_507(
    models: Path, program: Path, tmp_path: Path
) -> None:
    nowhere = tmp_path / "full"
    nowhere.mkdir()
    code = (
        "import errno, tempfile\n"
        "def full(*_, **__): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "tempfile.TemporaryFile = full"
    )
    proxy = Proxy(tmp_path / "instance", models, MLX_SERVER_BIN=program)
    try:
        proxy.start(prelude=code)
        for data in (b" " * 2_000_000, iter([b" " * 1_000_000] * 2)):
            answer = requests.post(proxy.url + PATH, data=data, timeout=10)
            assert answer.status_code == 507
            assert shape(answer.json())["code"] == "insufficient_storage"
            assert "No space left on device" in answer.json()["error"]["message"]
        assert proxy.post("/v1/models/load", {"model_id": "tiny/alpha"}).ok
        assert "Traceback" not in proxy.said()
        assert "uncaptured" not in proxy.said()
    finally:
        proxy.clean_up()


# -- memory


def resident(proxy: Proxy) -> int:
    """The proxy's memory in MiB."""
    assert proxy.process is not None
    return int(psutil.Process(proxy.process.pid).memory_info().rss >> 20)


def test_memory_is_returned_to_the_system_after_large_bodies(proxy: Proxy) -> None:
    message = {"role": "user", "content": "Hello!"}
    body = json.dumps({"messages": [message], "user": "x" * 30_000_000}).encode()
    assert proxy.unload().ok
    before = proxy.resident_mib()
    for _ in range(20):  # each on another thread
        assert requests.post(proxy.url + PATH, data=body, timeout=30).status_code == 503
    assert proxy.resident_mib() - before < 60


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator is not glibc's")
def test_glibc_accepts_the_allocator_settings() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from mlxproxy.server import allocator; allocator.return_what_is_free() or 1/0",
        ],
        check=False,
    )
    assert done.returncode == 0 or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
