"""Logs, events and metrics of the real backend, as somebody sees them who watches the proxy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.support import tiny_models
from tests.support.following import Following
from tests.support.network import PROMPT
from tests.support.proxy import Proxy
from tests.support.waiting import until


def metrics(proxy: Proxy) -> dict[str, float]:
    """All samples, each by its name and labels."""
    samples = {}
    answer = proxy.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain")
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


# -- events


def test_events_begin_with_a_snapshot_and_tell_of_loads_and_requests(
    proxy: Proxy, follow: Callable[..., Following]
) -> None:
    proxy.unload()
    events = follow(proxy, "/v1/events")
    kind, data = events.next()
    assert kind == "snapshot"
    assert json.loads(data)["state"] == "empty"
    assert proxy.load("tiny/alpha").ok
    assert events.until("state", state="loading")
    phases = [events.until("load", id="tiny/alpha")["phase"]]
    while phases[-1] != "warming":
        phases.append(events.until("load", id="tiny/alpha")["phase"])
    assert list(dict.fromkeys(phases)) == ["starting", "loading", "warming"]
    assert events.until("loaded", id="tiny/alpha")["seconds"] > 0
    proxy.get("/health")
    headers = {"X-Request-Id": "the-chat"}
    body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8, "stream": True}
    assert proxy.post("/v1/chat/completions", body, headers=headers).ok
    started = events.until("request_started", path="/v1/chat/completions")
    assert (started["id"], started["method"]) == ("the-chat", "POST")
    ended = events.until("request", id="the-chat")
    assert ended["status"] == 200
    assert ended["outcome"] == "done"
    assert ended["tokens_out"] == 8
    assert ended["first_token"] > 0


def test_a_crash_of_the_backend_is_an_event_and_is_counted(
    start: Callable[..., Proxy], models: Path, follow: Callable[..., Following]
) -> None:
    proxy = start(models)
    proxy.load("tiny/alpha")
    events = follow(proxy, "/v1/events")
    (backend,) = proxy.children()
    backend.kill()
    assert "SIGKILL" in events.until("death", id="tiny/alpha")["reason"]
    assert metrics(proxy)["mlxproxy_deaths_total{model=tiny/alpha}"] == 1


# -- logs


def test_the_backends_log_is_followed_while_it_starts(
    proxy: Proxy, follow: Callable[..., Following]
) -> None:
    log = follow(proxy, "/v1/logs?source=backend&follow=true&lines=0")
    proxy.unload()
    assert proxy.load("tiny/beta").ok
    seen = ""
    while "Starting httpd" not in seen:
        seen += log.next()[1]


# -- metrics


def test_metrics_count_requests_tokens_and_swaps(start: Callable[..., Proxy], models: Path) -> None:
    proxy = start(models)
    proxy.load("tiny/alpha")
    proxy.load("tiny/beta")
    assert proxy.chat(stream=True).text.endswith("[DONE]\n\n")
    assert proxy.chat().ok
    assert proxy.chat(temperature="hot").status_code == 400
    for name in ("nobody", "knows", "them"):
        proxy.get(f"/v1/models/{name}")
        proxy.get(f"/{name}")
    found = metrics(proxy)
    chat = "mlxproxy_requests_total{path=/v1/chat/completions,status=%d}"
    assert found[chat % 200] == 2
    assert found[chat % 400] == 1
    assert found["mlxproxy_requests_total{path=/v1/models/<path:name>,status=404}"] == 3
    assert found["mlxproxy_requests_total{path=other,status=404}"] == 3
    assert found["mlxproxy_tokens_out_total{model=tiny/beta}"] == 16
    assert found["mlxproxy_tokens_in_total{model=tiny/beta}"] > 10
    assert found["mlxproxy_first_token_seconds_count{model=tiny/beta}"] == 2
    # What comes all at once, as an answer of a tiny model may, has no speed that anybody knows.
    assert found.get("mlxproxy_tokens_per_second_count{model=tiny/beta}", 0) <= 2
    for model in ("tiny/alpha", "tiny/beta"):
        assert found[f"mlxproxy_load_seconds_count{{model={model}}}"] == 1
    assert found["mlxproxy_swap_seconds_count{model=tiny/beta}"] == 1
    assert 0 < found["mlxproxy_swap_seconds_sum{model=tiny/beta}"] < 60
    assert found["mlxproxy_in_flight{model=tiny/beta}"] == found["mlxproxy_waiting"] == 0
    assert found["mlxproxy_backend_memory_bytes{model=tiny/beta}"] > 10_000_000


def test_a_running_stream_counts_as_in_flight_and_has_a_speed(
    start: Callable[..., Proxy], tmp_path: Path
) -> None:
    tiny_models.build_slow(tmp_path / "models" / "tiny" / "slow")
    proxy = start(tmp_path / "models")
    proxy.load("tiny/slow")
    with proxy.chat(stream=True, max_tokens=500) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith(b"data: "))
        for _ in range(3):
            next(lines)
        speed = proxy.get("/v1/events?follow=false").json()["tokens_per_second"]
        assert speed["now"] > 0
        assert metrics(proxy)["mlxproxy_in_flight{model=tiny/slow}"] == 1
    until(
        lambda: metrics(proxy)["mlxproxy_in_flight{model=tiny/slow}"] == 0,
        what="the end of the stream",
    )
    speed = proxy.get("/v1/events?follow=false").json()["tokens_per_second"]
    assert speed["now"] is None
    assert speed["last"] > 0


# -- what stays secret, after all of the above and a little more


def test_no_prompt_is_in_the_logs_of_the_real_backend(
    start: Callable[..., Proxy], models: Path
) -> None:
    proxy = start(models)
    assert proxy.load("tiny/alpha").ok
    tools = [{"type": "function", "function": {"name": PROMPT, "parameters": {}}}]
    for fields in ({}, {"stream": True}, {"tools": tools}, {"logprobs": True}):
        assert proxy.chat(PROMPT, **fields).ok
    assert proxy.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 2}).ok
    assert proxy.unload().ok
    assert proxy.stop() == 0
    files = list((proxy.instance / "logs").iterdir())
    assert "POST /v1/chat/completions" in "".join(file.read_text() for file in files)
    assert not any(PROMPT in file.read_text() for file in [*files, proxy.output])
