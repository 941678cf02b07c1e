"""Swaps, loads, waiting and death as clients see them, over a scripted stand-in for the backend.

What the real backend can be made to show is shown with it, in test_faults.py.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from mlxproxy.backend.ports import is_free
from tests.support import scripted_server
from tests.support.proxy import Proxy
from tests.support.raw_http import shape
from tests.support.waiting import until

Start = Callable[..., tuple[Proxy, Path]]


@pytest.fixture
def scripted(
    start: Callable[..., Proxy], models: Path, tmp_path: Path
) -> Callable[..., tuple[Proxy, Path]]:
    """Starts a proxy over a stand-in with that script; returns both."""

    def starter(script: dict[str, Any] | None = None, **settings: Any) -> tuple[Proxy, Path]:
        program = scripted_server.install(tmp_path / "standin", **(script or {}))
        return start(models, MLX_SERVER_BIN=program, **settings), program

    return starter


def streamed(proxy: Proxy, **fields: Any) -> list[str]:
    """All lines of a stream that are not empty; fails if the stream does not end properly."""
    with proxy.chat(**{"stream": True, "max_tokens": 1000, **fields}) as answer:
        assert answer.status_code == 200, answer.text
        return [line.decode() for line in answer.iter_lines() if line]


def text(lines: list[str]) -> str:
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    deltas = [event["choices"][0]["delta"] for event in events if "choices" in event]
    return "".join(delta.get("content", "") for delta in deltas)


def failure(lines: list[str]) -> dict[str, Any]:
    """The error that a stream ended with; it must be the last event, without [DONE]."""
    assert "data: [DONE]" not in lines
    return shape(json.loads(lines[-1].removeprefix("data: ")))


def numbered(model: str, count: int) -> str:
    return "".join(f"{model}{number} " for number in range(count))


# -- a swap


def test_a_swap_lets_every_answer_in_flight_end_and_starts_the_next_after_it(
    scripted: Start, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    proxy, program = scripted({"events": 30, "interval": 0.03})
    proxy.load("tiny/alpha")
    streams = [pool.submit(streamed, proxy) for _ in range(6)]
    wholes = [pool.submit(lambda: proxy.chat(max_tokens=1000).json()) for _ in range(3)]
    until(lambda: proxy.loaded()["in_flight"] == 9, what="nine answers in flight")
    swap = pool.submit(proxy.load, "tiny/beta")
    until(lambda: proxy.health()["state"] == "draining", what="the drain")
    later = [pool.submit(streamed, proxy) for _ in range(4)]
    for stream in streams:
        lines = stream.result()
        assert lines[-1] == "data: [DONE]"
        assert text(lines) == numbered("alpha", 30)
    for whole in wholes:
        message = whole.result()["choices"][0]["message"]
        assert message["content"] == numbered("alpha", 30)
    assert swap.result().json()["id"] == "tiny/beta"
    for stream in later:
        assert text(stream.result()) == numbered("beta", 30)
    first, second = scripted_server.record(program, "started")
    ended = scripted_server.record(program, "terminated")[0]
    assert ended["pid"] == first["pid"]
    assert ended["time"] <= second["time"]
    finished = [
        it for it in scripted_server.record(program, "finished") if it["pid"] == first["pid"]
    ]
    assert max(it["time"] for it in finished) <= ended["time"]


def test_past_the_drain_limit_a_stream_ends_with_the_error_and_a_whole_answer_is_503(
    scripted: Start, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    proxy, _ = scripted({"events": 1000, "interval": 0.02}, DRAIN_TIMEOUT=0.3)
    proxy.load("tiny/alpha")
    stream = pool.submit(streamed, proxy)
    whole = pool.submit(proxy.chat, max_tokens=1000)
    until(lambda: proxy.loaded()["in_flight"] == 2, what="two answers in flight")
    assert proxy.load("tiny/beta").ok
    assert failure(stream.result())["code"] == "model_swapped"
    assert whole.result().status_code == 503
    assert whole.result().json()["error"]["code"] == "model_swapped"


def test_a_client_that_does_not_read_cannot_hold_up_a_swap(scripted: Start) -> None:
    proxy, _ = scripted({"events": 2000, "event_bytes": 20000}, DRAIN_TIMEOUT=0.3)
    proxy.load("tiny/alpha")
    with proxy.chat(stream=True, max_tokens=2000):  # nothing is read
        until(lambda: proxy.loaded()["in_flight"] == 1, what="the answer in flight")
        started = time.monotonic()
        assert proxy.load("tiny/beta").ok
        assert time.monotonic() - started < 10
    assert proxy.loaded()["in_flight"] == 0


def test_with_model_selection_requested_each_chat_is_answered_by_the_model_it_names(
    scripted: Start, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    proxy, program = scripted({"events": 5, "interval": 0.02}, MODEL_SELECTION="requested")
    names = ["alpha", "beta"] * 6
    answers = [pool.submit(streamed, proxy, model=f"tiny/{name}") for name in names]
    for name, answer in zip(names, answers, strict=True):
        assert text(answer.result()) == numbered(name, 5)
    assert len(scripted_server.record(program, "started")) <= 4  # in turns, not one swap a request


# -- waiting


def test_a_waiting_stream_says_what_it_waits_for_until_it_is_answered(scripted: Start) -> None:
    proxy, _ = scripted({"load_seconds": 4.0})
    lines = streamed(proxy, model="tiny/alpha")
    comments = [line for line in lines if line.startswith(": loading tiny/alpha")]
    assert comments
    assert comments[0].endswith("s")
    assert lines[-1] == "data: [DONE]"


def test_a_load_that_fails_while_a_stream_waits_arrives_as_its_error(scripted: Start) -> None:
    proxy, _ = scripted({"load_seconds": 3.0, "load_failure": "Model type x not supported."})
    error = failure(streamed(proxy, model="tiny/alpha"))
    assert error["code"] == "load_failed"
    assert "architecture x" in error["message"]
    answer = proxy.chat(model="tiny/alpha")
    assert answer.status_code == 500


def test_a_full_queue_gives_429_with_retry_after_while_management_answers_at_once(
    scripted: Start, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    proxy, _ = scripted({"events": 100, "interval": 0.03}, MAX_CONCURRENT=2, MAX_QUEUE=3)
    proxy.load("tiny/alpha")
    asked = [pool.submit(streamed, proxy) for _ in range(5)]
    until(lambda: proxy.loaded()["waiting"] == 3, what="a full queue")
    refused = proxy.chat(stream=True)
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) > 0
    assert refused.json()["error"]["code"] == "too_many_requests"
    for path in ("/health", "/v1/models", "/v1/models/loaded"):
        started = time.monotonic()
        assert proxy.get(path).ok
        assert time.monotonic() - started < 0.5
    assert proxy.load("tiny/alpha").ok
    for stream in asked:
        assert stream.result()[-1] == "data: [DONE]"


def test_a_client_that_disconnects_while_it_waits_starts_no_work(scripted: Start) -> None:
    proxy, program = scripted(
        {"events": 60, "interval": 0.03}, MODEL_SELECTION="requested", MAX_CONCURRENT=1
    )
    proxy.load("tiny/alpha")
    with proxy.chat(stream=True, max_tokens=1000, model="tiny/alpha") as first:
        until(lambda: proxy.loaded()["in_flight"] == 1, what="the answer in flight")
        with contextlib.suppress(requests.ReadTimeout):
            proxy.post(
                "/v1/chat/completions",
                {"model": "tiny/beta", "messages": [{"role": "user", "content": "x"}]},
                timeout=0.5,
            )
        until(lambda: proxy.loaded()["waiting"] == 0, 1.0, "the notice of its leaving")
        assert [line for line in first.iter_lines() if line][-1] == b"data: [DONE]"
    assert streamed(proxy, model="tiny/alpha")[-1] == "data: [DONE]"
    assert len(scripted_server.record(program, "started")) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_reaches_the_backend_within_a_second(scripted: Start, stream: bool) -> None:
    proxy, program = scripted({"events": 1000, "interval": 0.02})
    proxy.load("tiny/alpha")
    with contextlib.suppress(requests.RequestException):
        proxy.post(
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1000},
            timeout=0.5,
        ) if not stream else next(proxy.chat(stream=True, max_tokens=1000).iter_lines())
    left = time.time()

    def told() -> list[scripted_server.Json]:
        finished = scripted_server.record(program, "finished")
        return [it for it in finished if it["how"] == "client_gone"]

    assert until(told, what="the backend's notice")[0]["time"] - left < 1.0
    until(lambda: proxy.loaded()["in_flight"] == 0, what="the place's return")


# -- loads


def test_twenty_loads_of_one_model_at_once_start_one_process(
    scripted: Start, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    proxy, program = scripted({"load_seconds": 1.0})
    answers = [pool.submit(proxy.load, "tiny/alpha") for _ in range(20)]
    assert all(answer.result().json()["status"] == "loaded" for answer in answers)
    assert len(scripted_server.record(program, "started")) == 1


def test_an_unload_ends_a_load_in_progress_within_a_second(
    scripted: Start, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    proxy, program = scripted({"load_seconds": 60})
    load = pool.submit(proxy.load, "tiny/alpha")
    (started,) = until(lambda: scripted_server.record(program, "started"), what="the start")
    until(lambda: (proxy.health()["transition"] or {}).get("phase") == "loading", what="the load")
    at = time.monotonic()
    assert proxy.unload().json()["status"] == "unloaded"
    assert time.monotonic() - at < 1.0
    assert not psutil.pid_exists(started["pid"])
    assert load.result().status_code == 409
    assert load.result().json()["error"]["code"] == "load_cancelled"


def test_a_load_streams_its_progress_as_events(scripted: Start) -> None:
    proxy, _ = scripted({"open_after": 1.0, "load_seconds": 1.0})
    for last_seconds in (None, pytest.approx(2.0, abs=2.0)):
        with proxy.post(
            "/v1/models/load", {"model_id": "tiny/alpha", "stream": True}, stream=True
        ) as answer:
            events = [json.loads(line[6:]) for line in answer.iter_lines() if line]
        phases = [event["phase"] for event in events[:-1]]
        assert phases == sorted(phases, key=["starting", "loading", "warming"].index)
        assert {"starting", "loading"} <= set(phases)
        assert all(event["bytes_total"] > 0 for event in events[:-1])
        assert events[0]["last_seconds"] == last_seconds
        assert events[-1]["status"] == "loaded"
        proxy.unload()


def test_a_failing_load_ends_its_events_with_the_error(scripted: Start) -> None:
    proxy, _ = scripted({"load_failure": "Missing 12 parameters: x", "load_seconds": 0.7})
    with proxy.post(
        "/v1/models/load", {"model_id": "tiny/alpha", "stream": True}, stream=True
    ) as answer:
        lines = [line.decode() for line in answer.iter_lines() if line]
    error = failure(lines)
    assert error["code"] == "load_failed"
    assert any("Missing 12 parameters" in line for line in error["log"])


def test_a_load_that_is_not_waited_for_is_accepted_at_once(scripted: Start) -> None:
    proxy, _ = scripted({"load_seconds": 1.0})
    answer = proxy.load("tiny/alpha", wait=False)
    assert answer.status_code == 202
    assert proxy.health()["backend"] == "loading"
    until(lambda: proxy.loaded()["loaded"], what="the load")


@pytest.mark.parametrize(
    ("script", "code", "status", "words"),
    [
        ({"load_failure": "Model type x not supported."}, "load_failed", 500, "architecture x"),
        ({"load_failure": "[metal::malloc] too much"}, "load_failed", 500, "not enough memory"),
        ({"exit_code": 2}, "load_failed", 500, "exited with status 2"),
        ({"mute": True}, "load_timeout", 504, "LOAD_TIMEOUT"),
        ({"open_after": None}, "load_timeout", 504, "LOAD_TIMEOUT"),
        ({"empty": True}, "load_failed", 500, "without an answer"),
        ({"wire": "good morning\r\n\r\n"}, "load_failed", 500, "does not speak HTTP"),
        ({"error": "something odd"}, "load_failed", 500, "something odd"),
        ({"die_after": 0}, "load_failed", 500, "SIGKILL"),
        ({"mute": True, "ignore_sigterm": True}, "load_timeout", 504, "LOAD_TIMEOUT"),
    ],
)
def test_a_load_that_fails_says_why_and_leaves_nothing(
    scripted: Start, script: dict[str, Any], code: str, status: int, words: str
) -> None:
    proxy, program = scripted(script, LOAD_TIMEOUT=2, STOP_TIMEOUT=0.5)
    answer = proxy.load("tiny/alpha")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert words in error["message"]
    for entry in scripted_server.record(program, "started"):
        assert not psutil.pid_exists(entry["pid"])
    assert is_free(proxy.backend_port)
    told = proxy.loaded()
    assert told["loaded"] is False
    assert told["last_failure"]["id"] == "tiny/alpha"
    assert words in told["last_failure"]["reason"]
    scripted_server.change(program, **{key: scripted_server.SCRIPT[key] for key in script})
    assert proxy.load("tiny/alpha").ok


# -- death


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ({"die_after": 5}, "backend_failed"),
        ({"drop_after": 5}, "backend_failed"),
        ({"generation_dies_after": 5}, "backend_failed"),
        ({"hang_after": 5}, "backend_timeout"),
    ],
)
def test_an_answer_that_is_cut_off_ends_with_an_error(
    scripted: Start, pool: concurrent.futures.ThreadPoolExecutor, script: dict[str, Any], code: str
) -> None:
    proxy, program = scripted({"events": 50, "interval": 0.02}, STALL_TIMEOUT=6)
    proxy.load("tiny/alpha")
    scripted_server.change(program, **script)
    stream = pool.submit(streamed, proxy)
    whole = pool.submit(proxy.chat, max_tokens=1000)
    lines = stream.result()
    assert failure(lines)["code"] == code
    assert numbered("alpha", 50).startswith(text(lines))
    assert whole.result().status_code == {"backend_failed": 502, "backend_timeout": 504}[code]
    assert whole.result().json()["error"]["code"] == code
    scripted_server.change(program, **dict.fromkeys(script))
    answer = proxy.chat(max_tokens=3)  # the next request brings the model back, if it went
    assert answer.json()["choices"][0]["message"]["content"] == numbered("alpha", 3)


def test_an_empty_answer_is_an_error_never_an_empty_200(scripted: Start) -> None:
    proxy, program = scripted()
    proxy.load("tiny/alpha")
    scripted_server.change(program, empty=True)
    for fields in ({}, {"logprobs": True}, {"stream": True}):
        answer = proxy.chat(**fields)
        assert answer.status_code == 502, fields
        assert answer.json()["error"]["code"] == "backend_failed"


def test_a_long_prefill_with_keepalives_is_not_a_hang(scripted: Start) -> None:
    proxy, program = scripted(STALL_TIMEOUT=2)
    proxy.load("tiny/alpha")
    scripted_server.change(program, prefill_seconds=7.0)
    lines = streamed(proxy)
    assert lines[-1] == "data: [DONE]"
    assert sum(line.startswith(": keepalive") for line in lines) > 5


def test_an_answer_in_one_piece_may_take_long_while_the_backend_is_alive(scripted: Start) -> None:
    """With log probabilities the backend sends nothing until all is there: it need not hang."""
    proxy, program = scripted({"events": 80, "interval": 0.05}, STALL_TIMEOUT=1, STOP_TIMEOUT=1)
    proxy.load("tiny/alpha")
    pid = proxy.loaded()["pid"]
    answer = proxy.chat(logprobs=True, max_tokens=100)
    assert answer.json()["choices"][0]["message"]["content"] == numbered("alpha", 80)
    assert proxy.loaded()["pid"] == pid
    scripted_server.change(program, silent_seconds=60.0)
    answer = proxy.chat(logprobs=True)
    assert answer.status_code == 504
    assert "STALL_TIMEOUT" in answer.json()["error"]["message"]
    until(lambda: not psutil.pid_exists(pid), what="the end of the backend that hangs")


def test_a_stream_from_a_silent_backend_gets_keepalive_comments(
    scripted: Start,
) -> None:
    proxy, program = scripted()
    proxy.load("tiny/alpha")
    scripted_server.change(program, silent_seconds=11.0)
    with proxy.chat(stream=True, max_tokens=4) as answer:
        at = [time.monotonic() for line in answer.iter_lines() if line]
    assert max(later - earlier for earlier, later in itertools.pairwise(at)) < 7


def test_after_three_crashes_in_five_minutes_only_a_load_starts_the_model_again(
    scripted: Start,
) -> None:
    proxy, program = scripted()
    proxy.load("tiny/alpha")
    for _ in range(3):
        assert proxy.chat().ok
        psutil.Process(proxy.loaded()["pid"]).kill()
        until(lambda: not proxy.loaded()["loaded"], 1.0, "the notice of the death")
    answer = proxy.chat(model="tiny/alpha")
    assert answer.status_code == 503
    assert "SIGKILL" in answer.json()["error"]["message"]
    assert len(scripted_server.record(program, "started")) == 3
    assert proxy.load("tiny/alpha").ok
    assert proxy.chat().ok


@pytest.mark.parametrize("end", ["stall", "kill"])
def test_a_request_to_a_backend_that_reads_nothing_ends(
    scripted: Start, pool: concurrent.futures.ThreadPoolExecutor, end: str
) -> None:
    proxy, _ = scripted(STALL_TIMEOUT=2 if end == "stall" else 60, STOP_TIMEOUT=1)
    proxy.load("tiny/alpha")
    backend = psutil.Process(proxy.loaded()["pid"])
    backend.suspend()
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "metadata": {"x": "y" * 20_000_000},  # far more than the socket's buffers
    }
    answer = pool.submit(proxy.post, "/v1/chat/completions", body, timeout=20)
    until(lambda: proxy.loaded()["in_flight"] == 1, what="the answer in flight")
    if end == "kill":
        backend.kill()
    error = answer.result().json()["error"]
    assert answer.result().status_code == (504 if end == "stall" else 502)
    assert ("STALL_TIMEOUT" if end == "stall" else "SIGKILL") in error["message"]


# -- idle


def test_an_idle_model_is_unloaded_and_loaded_again_by_the_next_request(scripted: Start) -> None:
    proxy, _ = scripted({"events": 40, "interval": 0.05})
    proxy.load("tiny/alpha", ttl="1s")
    assert streamed(proxy)[-1] == "data: [DONE]"  # 2 s: never while an answer is in flight
    until(lambda: not proxy.loaded()["loaded"], 5, "the idle unload")
    until(lambda: not proxy.children(), 5, "the end of its process")
    assert text(streamed(proxy, max_tokens=4)) == numbered("alpha", 4)


# -- the backend's log


def test_a_flood_of_log_neither_blocks_the_backend_nor_fills_the_disk(scripted: Start) -> None:
    proxy, _ = scripted({"log_megabytes": 10.0})
    proxy.load("tiny/alpha")
    until(lambda: (proxy.instance / "logs" / "backend.log.1").exists(), 20, "a rotation")
    started = time.monotonic()
    assert streamed(proxy)[-1] == "data: [DONE]"
    assert time.monotonic() - started < 5
    logs = list((proxy.instance / "logs").glob("backend.log*"))
    assert sum(log.stat().st_size for log in logs) < 25 << 20


def test_a_log_that_cannot_be_written_costs_no_answer(scripted: Start, tmp_path: Path) -> None:
    (tmp_path / "instance0" / "logs" / "backend.log").mkdir(parents=True)  # cannot be written
    proxy, _ = scripted({"log_megabytes": 1.0})
    assert proxy.load("tiny/alpha").ok
    for _ in range(5):
        assert streamed(proxy)[-1] == "data: [DONE]"


def test_the_backend_runs_offline_and_on_this_machine_alone(scripted: Start) -> None:
    proxy, program = scripted()
    proxy.load("tiny/alpha")
    (started,) = scripted_server.record(program, "started")
    assert started["offline"] == "1"
    assert "127.0.0.1" in started["argv"]
