"""Faults of the real `mlx_vlm.server`: killed, suspended, left, stopped, models that do not load.

The promises are those of test_faults.py, test_departures.py and test_start_and_stop.py.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from mlxproxy.backend.ports import is_free
from tests.backend.test_departures import computing, leave, used
from tests.backend.test_faults import Stream
from tests.backend.test_start_and_stop import gone
from tests.support import tiny_models, tiny_vision
from tests.support.proxy import Proxy
from tests.support.vision_server import VLM_SERVER_BIN, needs_mlx_vlm
from tests.support.waiting import until

pytestmark = needs_mlx_vlm

Start = Callable[..., Proxy]
SLOW = 24  # layers
LONG_PROMPT = [{"role": "user", "content": tiny_models.long_prompt(6000)}]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("library")
    tiny_vision.build(root / "tiny" / "slow-eye", says="slow", layers=SLOW)
    tiny_models.build(root / "tiny" / "alpha", says="alpha")
    tiny_vision.build_encoder(root / "tiny" / "encoder", positions=512)
    return root


@pytest.fixture
def begin(start: Start, library: Path) -> Callable[..., Proxy]:
    """What starts a proxy with the slow model that sees, loaded."""

    def begun(**settings: Any) -> Proxy:
        proxy = start(library, VLM_SERVER_BIN=VLM_SERVER_BIN, **settings)
        assert proxy.load("tiny/slow-eye").ok
        return proxy

    return begun


def backend(proxy: Proxy) -> psutil.Process:
    return psutil.Process(proxy.loaded()["pid"])


def test_a_swap_never_cuts_an_answer_off(begin: Callable[..., Proxy]) -> None:
    proxy = begin()
    streams = [Stream(proxy, max_tokens=30) for _ in range(3)]
    for stream in streams:
        assert stream.begun.wait(20)
    swap = threading.Thread(target=proxy.load, args=("tiny/alpha",))
    swap.start()
    until(lambda: proxy.health()["state"] == "draining", what="the drain")
    later = Stream(proxy, max_tokens=5)
    for stream in streams:
        assert stream.end() is None
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in stream.lines[:-1]]
        said = "".join(delta.get("content") or "" for delta in deltas)
        assert said == tiny_models.answer("slow", 30)
    swap.join()
    assert later.end() is None
    assert "alpha0" in "".join(later.lines)


def test_a_killed_backend_is_noticed_and_the_next_request_brings_the_model_back(
    begin: Callable[..., Proxy],
) -> None:
    proxy = begin()
    stream = Stream(proxy)
    assert stream.begun.wait(20)
    backend(proxy).kill()
    killed = time.monotonic()
    error = stream.end()
    assert time.monotonic() - killed < 1.5
    assert error is not None
    assert error["code"] == "backend_failed"
    assert "SIGKILL" in error["message"]
    assert "SIGKILL" in proxy.health()["last_failure"]["reason"]
    assert proxy.chat(max_tokens=2).ok
    assert proxy.loaded()["id"] == "tiny/slow-eye"


def test_a_suspended_backend_counts_as_hung_after_the_stall_limit(
    begin: Callable[..., Proxy],
) -> None:
    proxy = begin(STALL_TIMEOUT=6, STOP_TIMEOUT=1)
    stream = Stream(proxy)
    assert stream.begun.wait(20)
    suspended = backend(proxy)
    suspended.send_signal(signal.SIGSTOP)
    error = stream.end()
    assert error is not None
    assert error["code"] == "backend_timeout"
    until(lambda: not suspended.is_running(), what="its end")
    assert proxy.chat(max_tokens=2).ok


# -- clients that leave


@pytest.fixture(scope="module")
def busy(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    instance = tmp_path_factory.mktemp("busy") / "instance"
    made = Proxy(instance, library, VLM_SERVER_BIN=VLM_SERVER_BIN)
    try:
        made.start()
        assert made.load("tiny/slow-eye").ok
        yield made
    finally:
        made.clean_up()


def _seen(text: str) -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": tiny_vision.image(256, 256)}}
    return [{"role": "user", "content": [{"type": "text", "text": text}, image]}]


PHASES: dict[str, dict[str, Any]] = {
    "streamed": {"stream": True},
    "whole": {},
    "with an image": {"messages": _seen("x"), "stream": True},
    "seeded": {"seed": 5, "temperature": 1.0},
    "with logprobs": {"logprobs": True, "top_logprobs": 2},
    "in the prompt": {"messages": LONG_PROMPT},
}


@pytest.mark.parametrize("phase", PHASES)
def test_the_backend_stops_computing_when_its_client_disconnects(busy: Proxy, phase: str) -> None:
    process = backend(busy)
    leave(busy, computing(process), **PHASES[phase])

    def rests() -> bool:
        before = used(process)
        time.sleep(0.3)  # the measured interval
        return used(process) - before < 0.1

    until(rests, 20, "the backend's rest")
    assert busy.chat(max_tokens=2).ok
    assert backend(busy) == process
    assert busy.health()["in_flight"] == 0


# -- the end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_stops_proxy_and_backend_with_exit_status_0(
    begin: Callable[..., Proxy], number: int
) -> None:
    proxy = begin()
    family = proxy.children()
    assert family
    assert proxy.stop(number) == 0
    assert gone(family)
    assert is_free(proxy.backend_port)
    assert "Traceback" not in proxy.said()


@pytest.mark.parametrize(
    "fields", [{"stream": True}, {}, {"messages": LONG_PROMPT}, {"messages": _seen("x")}]
)
def test_a_stop_past_its_limit_does_not_wait_for_an_answer(
    begin: Callable[..., Proxy], fields: dict[str, Any]
) -> None:
    """The backend itself waits for its answers after SIGTERM, however long they take."""
    proxy = begin(SHUTDOWN_TIMEOUT=0.5, STOP_TIMEOUT=5)
    family = proxy.children()
    process = backend(proxy)
    work = computing(process)

    def ask() -> None:
        with contextlib.suppress(requests.RequestException):
            body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3000, **fields}
            proxy.post("/v1/chat/completions", body).close()

    asking = threading.Thread(target=ask)
    asking.start()
    work()
    begun = time.monotonic()
    assert proxy.stop() == 0
    assert time.monotonic() - begun < 12
    assert gone(family)
    asking.join(20)


def test_a_stop_during_a_load_ends_the_load(start: Start, library: Path) -> None:
    proxy = start(library, VLM_SERVER_BIN=VLM_SERVER_BIN)
    proxy.load("tiny/slow-eye", wait=False)
    until(proxy.children, what="the backend's start")
    family = proxy.children()
    assert proxy.stop(signal.SIGINT) == 0
    assert gone(family)


def test_an_unload_ends_embeddings_that_take_long(start: Start, library: Path) -> None:
    proxy = start(library, VLM_SERVER_BIN=VLM_SERVER_BIN, DRAIN_TIMEOUT=0.5, STOP_TIMEOUT=5)
    assert proxy.load("tiny/encoder").ok
    family = proxy.children()
    work = computing(backend(proxy))
    answers: list[requests.Response] = []
    body = {"model": "tiny/encoder", "input": ["bread " * 80] * 2000}
    asking = threading.Thread(target=lambda: answers.append(proxy.post("/v1/embeddings", body)))
    asking.start()
    work()
    assert proxy.unload().ok
    assert gone(family)
    asking.join(20)
    assert answers[0].json()["error"]["code"] == "model_unloaded"


def test_after_a_kill_the_next_start_ends_the_orphan_and_loads(
    begin: Callable[..., Proxy], start: Start, library: Path
) -> None:
    first = begin()
    (orphan,) = first.children()
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    assert orphan.is_running()
    second = start(
        library,
        instance=first.instance,
        MLX_BACKEND_PORT=first.backend_port,
        PROXY_PORT=first.port,
        VLM_SERVER_BIN=VLM_SERVER_BIN,
    )
    assert gone([orphan])
    assert second.load("tiny/slow-eye").ok


# -- loads that fail


def break_model(folder: Path, defect: str) -> None:
    """Apply a defect; what text models have in their config lies in `text_config` here."""
    if defect == "shape_mismatch":
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["intermediate_size"] = 320
        (folder / "config.json").write_text(json.dumps(config))
    elif defect == "missing_shard":
        index = {"weight_map": {"more.weight": "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        tiny_models.break_model(folder, defect)


@pytest.fixture(scope="module")
def broken(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy over a sound model and one for each defect."""
    root = tmp_path_factory.mktemp("broken")
    shutil.copytree(library / "tiny" / "alpha", root / "models" / "tiny" / "sound")
    for defect in tiny_models.DEFECTS:
        break_model(tiny_vision.build(root / "models" / "tiny" / defect), defect)
    proxy = Proxy(root / "instance", root / "models", VLM_SERVER_BIN=VLM_SERVER_BIN)
    try:
        yield proxy.start()
    finally:
        proxy.clean_up()


@pytest.mark.parametrize("defect", sorted(tiny_models.DEFECTS))
def test_a_model_that_cannot_be_loaded_says_why_and_leaves_nothing(
    broken: Proxy, defect: str
) -> None:
    broken.load("tiny/sound")
    pid = broken.loaded()["pid"]
    answer = broken.load(f"tiny/{defect}")
    error = answer.json()["error"]
    if answer.status_code in (404, 422):  # told by its files, before anything is stopped
        assert error["code"] in ("model_unusable", "model_not_found")
        assert broken.loaded()["pid"] == pid
        return
    assert (answer.status_code, error["code"]) == (500, "load_failed")
    assert "could not load it" not in error["message"], "no advice"
    assert error["log"]
    assert not any("site-packages" in line or "Traceback" in line for line in error["log"])
    assert broken.children() == []
    assert is_free(broken.backend_port)
    assert broken.health()["last_failure"]["id"] == f"tiny/{defect}"


# -- what must not be reached


@pytest.fixture
def visited() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine, with the paths that have been fetched from it."""
    paths: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/image.png", paths
        server.shutdown()
        thread.join()


def test_nothing_that_a_request_names_is_fetched(
    busy: Proxy, visited: tuple[str, list[str]]
) -> None:
    url, paths = visited
    process = backend(busy)
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_image", "image_url": url},
        {"type": "image", "image": url},
        {"type": "image", "url": url},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
    ]
    for part in parts:
        messages = [{"role": "user", "content": [part]}]
        assert busy.chat(messages=messages).status_code == 400
        told = busy.post("/v1/responses", {"input": messages, "model": "tiny/slow-eye"})
        assert told.status_code == 400
    said = [{"role": "user", "content": "Hi", "images": [url], "audio": url, "image": url}]
    assert busy.chat(messages=said, max_tokens=2, image=url, images=[url], video=url).ok
    told = busy.post("/api/chat", {"messages": said, "model": "tiny/slow-eye", "stream": False})
    assert told.status_code == 400
    source = {"type": "image", "source": {"type": "url", "url": url}}
    body = {"messages": [{"role": "user", "content": [source]}], "max_tokens": 2}
    assert busy.post("/v1/messages", body).status_code == 400
    assert paths == []
    assert backend(busy) == process


MANAGEMENT = [
    ("POST", "/unload"), ("PATCH", "/settings"), ("GET", "/settings"), ("POST", "/cache/reset"),
    ("GET", "/cache/stats"), ("POST", "/images/generations"), ("POST", "/images/edits"),
    ("POST", "/audio/speech"), ("POST", "/audio/transcriptions"), ("POST", "/realtime"),
    ("GET", "/responses/resp_1"), ("POST", "/decisions"), ("GET", "/openapi.json"),
    ("GET", "/redoc"), ("POST", "/responses/input_tokens"),
]  # fmt: skip


def test_the_backends_management_is_not_reachable_through_the_proxy(busy: Proxy) -> None:
    assert busy.chat(max_tokens=2).ok
    process = backend(busy)
    for method, path in MANAGEMENT:
        for prefix in ("", "/v1", "//", "/v1/chat/completions/.."):
            url = busy.url + prefix + path
            answer = requests.request(method, url, json={}, timeout=20)
            assert answer.status_code in (400, 404, 405), (method, url, answer.text)
    listed = busy.get("/v1/models?model_dir=/etc").json()["data"]
    assert {model["id"].split("/")[0] for model in listed} == {"tiny"}
    log = (busy.instance / "logs" / "backend.log").read_text()
    assert "POST /v1/chat/completions" in log, "the log does not show what reaches the backend"
    for _, path in MANAGEMENT:
        assert path not in log
    assert backend(busy) == process
