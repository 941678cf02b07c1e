"""Start and stop: one proxy per port, nothing left behind, an orphan taken back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import requests

from mlxproxy.backend.ports import is_free
from mlxproxy.backend.processes import lives
from tests.support import tiny_models
from tests.support.ports import free_port
from tests.support.proxy import Proxy
from tests.support.waiting import until


def gone(processes: list[psutil.Process]) -> bool:
    return not any(lives(process) for process in processes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_stops_proxy_and_backend_with_exit_status_0(
    start: Callable[..., Proxy], models: Path, number: int
) -> None:
    proxy = start(models)
    proxy.load("tiny/alpha")
    family = proxy.children()
    assert family
    assert proxy.stop(number) == 0
    assert gone(family)
    assert is_free(proxy.backend_port)
    assert is_free(proxy.port)
    assert "Traceback" not in proxy.said()
    assert not list(proxy.instance.glob("backend-*.json"))
    assert not list(proxy.instance.glob("proxy-*.json"))


def test_a_proxy_started_in_a_scripts_background_heeds_ctrl_c_too(
    start: Callable[..., Proxy], models: Path
) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what a shell does for `command &`
    try:
        proxy = start(models)
    finally:
        signal.signal(signal.SIGINT, before)
    assert proxy.stop(signal.SIGINT) == 0


def test_a_stop_during_a_load_ends_the_load(start: Callable[..., Proxy], models: Path) -> None:
    proxy = start(models)
    proxy.load("tiny/alpha", wait=False)
    until(proxy.children, what="the backend's start")
    family = proxy.children()
    assert proxy.stop(signal.SIGINT) == 0
    assert gone(family)


def test_a_stop_lets_a_stream_end_with_done_and_refuses_new_work(
    start: Callable[..., Proxy], tmp_path: Path
) -> None:
    tiny_models.build_slow(tmp_path / "models" / "tiny" / "slow")
    proxy = start(tmp_path / "models")
    proxy.load("tiny/slow")
    with proxy.chat(stream=True, max_tokens=60) as answer:
        lines = answer.iter_lines()
        next(line for line in lines if line.startswith(b"data: "))
        assert proxy.process is not None
        proxy.process.send_signal(signal.SIGTERM)
        until(lambda: proxy.chat().status_code == 503, what="the refusal of new work")
        refused = proxy.chat().json()["error"]["code"]
        rest = [line for line in lines if line]
    assert refused == "shutting_down"
    assert rest[-1] == b"data: [DONE]"
    assert proxy.process.wait(20) == 0


def test_a_stop_past_its_limit_ends_the_stream_with_an_error(
    start: Callable[..., Proxy], tmp_path: Path
) -> None:
    tiny_models.build_slow(tmp_path / "models" / "tiny" / "slow")
    proxy = start(tmp_path / "models", SHUTDOWN_TIMEOUT=0.5)
    proxy.load("tiny/slow")
    with proxy.chat(stream=True, max_tokens=2000) as answer:
        lines = answer.iter_lines()
        next(line for line in lines if line.startswith(b"data: "))
        assert proxy.process is not None
        proxy.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix(b"data: "))["error"]["code"] == "shutting_down"
    assert b"data: [DONE]" not in rest
    assert proxy.process.wait(20) == 0


def test_a_second_proxy_on_the_same_backend_port_is_refused_with_the_firsts_pid(
    start: Callable[..., Proxy], models: Path
) -> None:
    first = start(models)
    assert first.process is not None
    environment = {**first.environment, "MLXPROXY_PROXY_PORT": str(free_port())}
    started = time.monotonic()
    second = subprocess.run(
        [sys.executable, "-m", "mlxproxy", "serve"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert second.returncode == 1
    assert str(first.process.pid) in second.stderr
    assert "Traceback" not in second.stderr
    assert time.monotonic() - started < 5
    assert first.health()["proxy"] == "ok"


def test_a_taken_proxy_port_is_reported_in_a_sentence(models: Path, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        proxy = Proxy(tmp_path / "instance", models, PROXY_PORT=holder.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "mlxproxy", "serve"],
            env=proxy.environment,
            capture_output=True,
            text=True,
            timeout=20,
        )
    assert done.returncode == 1
    assert "PROXY_PORT" in done.stderr
    assert "Traceback" not in done.stderr


def test_after_a_kill_the_next_start_ends_the_orphan_and_loads(
    start: Callable[..., Proxy], models: Path
) -> None:
    first = start(models)
    first.load("tiny/alpha")
    (orphan,) = first.children()
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    assert orphan.is_running()
    second = start(
        models,
        instance=first.instance,
        MLX_BACKEND_PORT=first.backend_port,
        PROXY_PORT=first.port,
    )
    assert gone([orphan])
    assert second.load("tiny/beta").ok


def test_a_process_with_the_reused_pid_of_an_orphan_is_left_alone(
    start: Callable[..., Proxy], models: Path
) -> None:
    """The record names a process that is not our child: another one has its pid by now."""
    with subprocess.Popen(["sleep", "60"]) as stranger:
        try:
            proxy = Proxy(models.parent / "recycled", models)
            proxy.instance.mkdir(exist_ok=True)
            record = {"command": ["x", "--port", "1"], "pid": stranger.pid, "created": 0}
            (proxy.instance / f"backend-{proxy.backend_port}.json").write_text(json.dumps(record))
            try:
                proxy.start()
                assert stranger.poll() is None
            finally:
                proxy.clean_up()
        finally:
            stranger.kill()


def test_another_program_on_the_backend_port_is_named_and_left_alone(
    start: Callable[..., Proxy], models: Path
) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        proxy = start(models, MLX_BACKEND_PORT=stranger.getsockname()[1])
        answer = proxy.load("tiny/alpha")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "port_in_use"
        assert str(os.getpid()) in answer.json()["error"]["message"]
        assert proxy.children() == []
    assert proxy.load("tiny/alpha").ok


def test_preload_last_restores_the_model_with_its_options(
    start: Callable[..., Proxy], models: Path
) -> None:
    first = start(models)
    first.load("tiny/beta", enable_thinking=True)
    first.stop()
    second = start(models, instance=first.instance, PRELOAD="last")
    until(lambda: second.loaded()["loaded"], 20, "the load of what was loaded last")
    assert second.loaded()["id"] == "tiny/beta"
    assert second.loaded()["enable_thinking"] is True


def test_a_disconnect_is_noticed_while_no_byte_is_sent(
    start: Callable[..., Proxy], tmp_path: Path
) -> None:
    tiny_models.build_slow(tmp_path / "models" / "tiny" / "slow")
    proxy = start(tmp_path / "models")
    proxy.load("tiny/slow")
    for stream in (True, False):
        body = {
            "messages": [{"role": "user", "content": tiny_models.long_prompt(1000)}],
            "max_tokens": 500,
            "stream": stream,
        }

        def ask(body: dict[str, object] = body) -> None:
            with contextlib.suppress(requests.RequestException):
                requests.post(proxy.url + "/v1/chat/completions", json=body, timeout=1)

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: proxy.loaded()["in_flight"] == 1, what="the request's place")
        thread.join()
        until(lambda: proxy.loaded()["in_flight"] == 0, 1.0, "the notice of the client's leaving")
