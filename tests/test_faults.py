"""Faults of the real backend: killed, stopped, its thread dead, models that do not load."""

from __future__ import annotations

import contextlib
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

from mlxproxy.ports import is_free
from tests import tiny
from tests.conftest import Proxy, until

pytestmark = pytest.mark.backend


class Stream(threading.Thread):
    """A stream read in a thread of its own."""

    def __init__(self, proxy: Proxy, **fields: Any) -> None:
        super().__init__()
        self._proxy, self._fields = proxy, fields
        self.begun = threading.Event()
        self.lines: list[str] = []
        self.start()

    def run(self) -> None:
        with self._proxy.chat(**{"stream": True, "max_tokens": 400, **self._fields}) as answer:
            for line in answer.iter_lines():
                if line.startswith(b"data: "):
                    self.lines.append(line.decode())
                    self.begun.set()

    def end(self, seconds: float = 30.0) -> dict[str, Any] | None:
        """Waits for the end; the error the stream ended with, or None if with [DONE]."""
        self.join(seconds)
        assert not self.is_alive(), "the stream does not end"
        if self.lines[-1] == "data: [DONE]":
            return None
        assert "data: [DONE]" not in self.lines
        error: dict[str, Any] = json.loads(self.lines[-1].removeprefix("data: "))["error"]
        return error


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A models folder with a slow and a quick model."""
    tiny.build_slow(tmp_path / "models" / "tiny" / "slow", says="slow")
    tiny.build(tmp_path / "models" / "tiny" / "quick", says="quick")
    return tmp_path / "models"


def test_a_swap_never_cuts_an_answer_off(start: Callable[..., Proxy], slow: Path) -> None:
    proxy = start(slow)
    proxy.load("tiny/slow")
    streams = [Stream(proxy, max_tokens=30) for _ in range(3)]
    for stream in streams:
        assert stream.begun.wait(20)
    swap = threading.Thread(target=proxy.load, args=("tiny/quick",))
    swap.start()
    until(lambda: proxy.health()["state"] == "draining", what="the drain")
    later = Stream(proxy, max_tokens=5)
    for stream in streams:
        assert stream.end() is None
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in stream.lines[:-1]]
        said = "".join(delta.get("content", "") for delta in deltas)
        assert said == tiny.answer("slow", 30)
    swap.join()
    assert later.end() is None
    assert "quick0" in "".join(later.lines)


def test_a_killed_backend_is_noticed_and_the_next_request_brings_the_model_back(
    start: Callable[..., Proxy], slow: Path
) -> None:
    proxy = start(slow)
    proxy.load("tiny/slow", enable_thinking=True)
    stream = Stream(proxy)
    assert stream.begun.wait(20)
    psutil.Process(proxy.loaded()["pid"]).kill()
    killed = time.monotonic()
    error = stream.end()
    assert time.monotonic() - killed < 1.5
    assert error is not None
    assert error["code"] == "backend_failed"
    assert "SIGKILL" in error["message"]
    assert "SIGKILL" in proxy.health()["last_failure"]["reason"]
    assert proxy.chat(max_tokens=2).ok
    assert proxy.loaded()["enable_thinking"] is True


def test_a_dead_generation_thread_is_noticed_although_the_process_lives(
    start: Callable[..., Proxy], slow: Path
) -> None:
    proxy = start(slow)
    proxy.load("tiny/slow")
    stream = Stream(proxy)
    assert stream.begun.wait(20)
    # Directly at the backend: one of the requests that the guard keeps away from it.
    with contextlib.suppress(requests.RequestException):
        requests.post(
            f"http://127.0.0.1:{proxy.backend_port}/v1/completions",
            json={"model": proxy.loaded()["model_id"], "prompt": "x", "stop": [5]},
            timeout=5,
        )
    error = stream.end()
    assert error is not None
    assert error["code"] == "backend_failed"
    assert proxy.chat(max_tokens=2).ok


def test_a_stopped_backend_is_taken_for_dead_at_the_stall_limit(
    start: Callable[..., Proxy], slow: Path
) -> None:
    proxy = start(slow, STALL_TIMEOUT=6, STOP_TIMEOUT=1)
    proxy.load("tiny/slow")
    stream = Stream(proxy)
    assert stream.begun.wait(20)
    pid = proxy.loaded()["pid"]
    psutil.Process(pid).send_signal(signal.SIGSTOP)
    error = stream.end()
    assert error is not None
    assert error["code"] == "backend_timeout"
    assert "STALL_TIMEOUT" in error["message"]
    until(lambda: not psutil.pid_exists(pid), what="its end")
    assert proxy.chat(max_tokens=2).ok


def test_a_client_that_leaves_a_whole_answer_lets_the_backend_rest(
    start: Callable[..., Proxy], slow: Path
) -> None:
    proxy = start(slow)
    proxy.load("tiny/slow")
    backend = psutil.Process(proxy.loaded()["pid"])
    with contextlib.suppress(requests.ReadTimeout):
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2000}
        proxy.post("/v1/chat/completions", body, timeout=1)
    until(lambda: backend.cpu_percent(0.3) < 30, what="the backend's rest")


@pytest.fixture(scope="module")
def broken(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy over a sound model and one for each defect."""
    root = tmp_path_factory.mktemp("broken")
    shutil.copytree(models / "tiny" / "alpha", root / "models" / "tiny" / "sound")
    for defect in tiny.DEFECTS:
        shards = 2 if defect == "missing_shard" else 1
        folder = tiny.build(root / "models" / "tiny" / defect, shards=shards)
        tiny.break_model(folder, defect)
    proxy = Proxy(root / "instance", root / "models")
    yield proxy.start()
    proxy.clean_up()


@pytest.mark.parametrize("defect", sorted(tiny.DEFECTS))
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
    assert not error["message"].startswith("mlx_lm.server could not load it"), "no advice"
    assert error["log"]
    assert not any("site-packages" in line or "Traceback" in line for line in error["log"])
    assert broken.children() == []
    assert is_free(broken.backend_port)
    assert broken.health()["last_failure"]["id"] == f"tiny/{defect}"
    assert broken.health()["last_failure"]["previous"] == "tiny/sound"
