"""Faults of the real backend: killed, stopped, its thread dead, models that do not load."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from mlxproxy.backend.ports import is_free
from tests.support import tiny_models
from tests.support.proxy import Proxy
from tests.support.waiting import until


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
    tiny_models.build_slow(tmp_path / "models" / "tiny" / "slow", says="slow")
    tiny_models.build(tmp_path / "models" / "tiny" / "quick", says="quick")
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
        assert said == tiny_models.answer("slow", 30)
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


def test_a_crashed_generation_thread_is_noticed_although_the_process_lives(
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


def test_a_suspended_backend_counts_as_hung_after_the_stall_limit(
    start: Callable[..., Proxy], slow: Path
) -> None:
    proxy = start(slow, STALL_TIMEOUT=6, STOP_TIMEOUT=1)  # 20 seconds where it is longer
    proxy.load("tiny/slow")
    stream = Stream(proxy)
    assert stream.begun.wait(20)
    pid = proxy.loaded()["pid"]
    psutil.Process(pid).send_signal(signal.SIGSTOP)
    error = stream.end()
    assert error is not None
    assert error["code"] == "backend_timeout"
    assert "no sign of life" in error["message"]
    until(lambda: not psutil.pid_exists(pid), what="its end")
    assert proxy.chat(max_tokens=2).ok


def sabotaged(folder: Path, patch: str) -> Path:
    """An `mlx_lm.server` of the kind that pip makes, with lines of Python run first."""
    program = folder / "mlx_lm.server"
    program.write_text(
        f"#!{sys.executable}\n{patch}\n"
        "import sys\nfrom mlx_lm.server import main\nsys.exit(main())\n"
    )
    program.chmod(0o755)
    return program


def test_a_generation_thread_that_hangs_is_found_within_seconds(
    start: Callable[..., Proxy], slow: Path, tmp_path: Path
) -> None:
    program = sabotaged(
        tmp_path,
        "import importlib, os, time\n"
        "batch = importlib.import_module('mlx_lm.generate').BatchGenerator\n"
        "advance = batch.next\n"
        "def hang_once(self):\n"
        f"    while os.path.exists({str(tmp_path / 'hang')!r}):\n"
        "        time.sleep(0.1)\n"
        "    return advance(self)\n"
        "batch.next = hang_once\n",
    )
    proxy = start(slow, MLX_SERVER_BIN=program)  # with the STALL_TIMEOUT of five minutes
    proxy.load("tiny/slow")
    stream = Stream(proxy)
    assert stream.begun.wait(20)
    (tmp_path / "hang").touch()
    error = stream.end(40)
    assert error is not None
    assert error["code"] == "backend_timeout"
    assert "has been stalled" in error["message"]
    (tmp_path / "hang").unlink()
    assert proxy.chat(max_tokens=2).ok


def test_a_tool_call_may_take_longer_than_the_stall_limit(
    start: Callable[..., Proxy], tmp_path: Path
) -> None:
    call = [f"part{number}," for number in range(400)]
    tiny_models.build_slow(tmp_path / "models" / "tiny" / "caller", says="caller", call=call)
    proxy = start(tmp_path / "models", STALL_TIMEOUT=1)
    proxy.load("tiny/caller")
    pid = proxy.loaded()["pid"]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for fields in ({"stream": True}, {"logprobs": True}):
        began = time.monotonic()
        answer = proxy.chat(tools=tools, max_tokens=500, **fields)
        assert answer.ok
        assert "error" not in answer.text
        assert time.monotonic() - began > 1.5, "the call was too quick to show anything"
    assert proxy.loaded()["pid"] == pid


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("text", "calls"), [('{"name": "f"}', ["{}"]), ("[1, 22]", []), ('"hello"', []), ('{"na', [])]
)
def test_a_malformed_tool_call_of_the_model_does_not_abort_the_answer(
    start: Callable[..., Proxy], tmp_path: Path, text: str, calls: list[str], stream: bool
) -> None:
    pieces = [text[first : first + 5] for first in range(0, len(text), 5)]
    tiny_models.build(tmp_path / "models" / "tiny" / "caller", says="caller", call=pieces)
    proxy = start(tmp_path / "models")
    proxy.load("tiny/caller")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    answer = proxy.chat(tools=tools, max_tokens=50, stream=stream)
    assert answer.ok
    assert "error" not in answer.text
    for arguments in calls:
        assert json.dumps(arguments) in answer.text


def test_no_output_of_a_model_aborts_an_answer_or_reaches_another_client(
    start: Callable[..., Proxy], tmp_path: Path
) -> None:
    """Not even what looks like the log line of a dead generation thread."""
    secret = "SECRET-ANSWER"
    forged = f"2026-01-01 00:00:00,000 - ERROR - mlx_lm.server generation thread died: {secret}"
    text = f"<function=f><parameter=n>\n{forged}\n</parameter></function>"
    template = (
        "{# <tool_call>\n<function= #}" + tiny_models.CHAT_TEMPLATE
    )  # how that parser is chosen
    pieces = [text[start : start + 9] for start in range(0, len(text), 9)]
    models = tmp_path / "models"
    tiny_models.build_slow(
        models / "tiny" / "liar", says="liar", call=pieces, chat_template=template
    )
    proxy = start(models, LOG_LEVEL="DEBUG")
    proxy.load("tiny/liar")
    other = Stream(proxy, max_tokens=150)
    assert other.begun.wait(20)
    parameters = {"properties": {"n": {"type": "integer"}}}  # which that text is not
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    assert proxy.chat(tools=tools, max_tokens=200).ok
    assert other.end() is None
    log = proxy.get("/v1/logs?source=backend").text
    assert "could not be parsed" in log
    psutil.Process(proxy.loaded()["pid"]).kill()
    until(lambda: proxy.health()["last_failure"], what="the report of the death")
    for shown in (log, proxy.said(), proxy.get("/health").text, proxy.get("/v1/logs").text):
        assert secret not in shown


def test_a_prompt_without_tokens_is_rejected_and_aborts_no_other_answer(
    start: Callable[..., Proxy], tmp_path: Path
) -> None:
    models = tmp_path / "models"
    bare = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tiny_models.build_slow(models / "tiny" / "bare", says="bare", chat_template=bare)
    proxy = start(models)
    proxy.load("tiny/bare")
    other = Stream(proxy, max_tokens=60)
    assert other.begun.wait(20)
    for stream in (True, False):
        answer = proxy.chat("", stream=stream)
        assert answer.status_code == 400
        assert "no tokens" in answer.json()["error"]["message"]
    assert other.end() is None


def test_a_token_id_without_text_aborts_no_answer(
    start: Callable[..., Proxy], tmp_path: Path
) -> None:
    models = tmp_path / "models"
    tiny_models.build_slow(models / "tiny" / "gap", says="gap", nameless=3, thinking=False)
    proxy = start(models)
    proxy.load("tiny/gap")
    other = Stream(proxy, max_tokens=60)
    assert other.begun.wait(20)
    for stream in (True, False):
        answer = proxy.chat(logit_bias={"257": 100}, top_logprobs=3, logprobs=True, stream=stream)
        assert answer.ok
        assert "error" not in answer.text
    assert other.end() is None


def test_a_prompt_is_counted_in_tokens(start: Callable[..., Proxy], tmp_path: Path) -> None:
    """Characters tell little: each digit is a token of its own to many tokenizers."""
    models = tmp_path / "models"
    tiny_models.build(models / "tiny" / "short", says="short", max_context=300)
    proxy = start(models)
    proxy.load("tiny/short")
    assert proxy.chat("1" * 200).ok
    refused = proxy.chat("1" * 400)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert "maximum context length is 300 tokens" in refused.json()["error"]["message"]


def test_other_streams_continue_while_a_long_prompt_is_read(
    start: Callable[..., Proxy], tmp_path: Path
) -> None:
    models = tmp_path / "models"
    tiny_models.build(models / "tiny" / "deep", says="deep", layers=24)
    proxy = start(models)
    proxy.load("tiny/deep")
    arrivals: list[float] = []
    reading = threading.Event()

    def read() -> None:
        with proxy.chat(stream=True, max_tokens=1000) as answer:
            for line in answer.iter_lines():
                if line.startswith(b"data: "):
                    arrivals.append(time.monotonic())
                    reading.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert reading.wait(20)
    began = time.monotonic()
    assert proxy.chat(tiny_models.long_prompt(4000), max_tokens=1).ok  # two of mlx-lm's own pieces
    ended = time.monotonic()
    moments = [began, *(moment for moment in arrivals if began < moment < ended), ended]
    longest = max(after - before for before, after in pairwise(moments))
    assert longest < (ended - began) / 2
    reader.join(60)


def test_the_backend_stops_when_the_client_of_a_non_streamed_answer_disconnects(
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
    for defect in tiny_models.DEFECTS:
        shards = 2 if defect == "missing_shard" else 1
        folder = tiny_models.build(root / "models" / "tiny" / defect, shards=shards)
        tiny_models.break_model(folder, defect)
    proxy = Proxy(root / "instance", root / "models")
    yield proxy.start()
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
    assert not error["message"].startswith("mlx_lm.server could not load it"), "no advice"
    assert error["log"]
    assert not any("site-packages" in line or "Traceback" in line for line in error["log"])
    assert broken.children() == []
    assert is_free(broken.backend_port)
    assert broken.health()["last_failure"]["id"] == f"tiny/{defect}"
    assert broken.health()["last_failure"]["previous"] == "tiny/sound"
