"""Logs, events and metrics, as somebody sees them who watches the proxy."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from mlxproxy import settings, wiring
from mlxproxy.blueprints.app import create_app
from mlxproxy.controller.plan import Scheduler
from mlxproxy.controller.state import Limits, Moment, SlotState
from mlxproxy.errors import TooManyRequests
from mlxproxy.logfile import LogFile
from mlxproxy.observability.events import FOLLOWERS, FOLLOWERS_OF_ONE, KEPT, EventBus
from mlxproxy.observability.logtail import LogTail
from mlxproxy.observability.metrics import Metrics
from mlxproxy.relay.statistics import AnswerStats
from tests.conftest import Proxy, until
from tests.support import tiny_models
from tests.support.fake_backend import model_spec

pytestmark = pytest.mark.standin


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Proxy]:
    proxy = Proxy(tmp_path_factory.mktemp("observe") / "instance", models)
    try:
        yield proxy.start()
    finally:
        proxy.clean_up()


class Following:
    """One follower of a stream, read event by event."""

    def __init__(self, proxy: Proxy, path: str) -> None:
        self._response = requests.get(proxy.url + path, stream=True, timeout=20)
        self.status = self._response.status_code
        self._lines = self._response.iter_lines()

    def next(self) -> tuple[str, str]:
        """The next event: its kind and its data."""
        kind, data = "message", []
        for raw in self._lines:
            line = raw.decode()
            if line.startswith("event: "):
                kind = line[7:]
            elif line.startswith("data: "):
                data.append(line[6:])
            elif not line and data:
                return kind, "\n".join(data)
        return "end", ""

    def until(self, kind: str, **wanted: Any) -> dict[str, Any]:
        """The next event of that kind with these fields."""
        while True:
            found, data = self.next()
            assert found != "end", f"{kind} {wanted} did not come"
            if found == kind:
                fields: dict[str, Any] = json.loads(data)
                if wanted.items() <= fields.items():
                    return fields

    def close(self) -> None:
        self._response.close()


@pytest.fixture
def follow() -> Iterator[Callable[..., Following]]:
    """Follows streams and leaves none open."""
    opened: list[Following] = []

    def opener(*arguments: Any) -> Following:
        opened.append(Following(*arguments))
        return opened[-1]

    yield opener
    for one in opened:
        one.close()


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


@pytest.mark.backend
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


@pytest.mark.backend
def test_a_death_is_an_event_and_is_counted(
    start: Callable[..., Proxy], models: Path, follow: Callable[..., Following]
) -> None:
    proxy = start(models)
    proxy.load("tiny/alpha")
    events = follow(proxy, "/v1/events")
    (backend,) = proxy.children()
    backend.kill()
    assert "SIGKILL" in events.until("death", id="tiny/alpha")["reason"]
    assert metrics(proxy)["mlxproxy_deaths_total{model=tiny/alpha}"] == 1


def test_health_checks_and_scrapes_are_no_events(
    proxy: Proxy, follow: Callable[..., Following]
) -> None:
    events = follow(proxy, "/v1/events")
    events.until("snapshot")
    for _ in range(3):
        proxy.get("/health")
        proxy.get("/metrics")
    proxy.get("/v1/models", headers={"X-Request-Id": "seen"})
    while True:
        kind, data = events.next()
        if kind in ("request", "request_started"):
            assert "/health" not in data
            assert "/metrics" not in data
        if kind == "request" and json.loads(data)["id"] == "seen":
            break


def test_the_snapshot_alone_is_json(proxy: Proxy) -> None:
    found = proxy.get("/v1/events?follow=false").json()
    assert {"state", "in_flight", "waiting", "tokens_per_second", "memory_bytes"} <= found.keys()


def test_a_reader_who_does_not_keep_up_loses_old_events_and_learns_it(tmp_path: Path) -> None:
    chosen = {"INSTANCE_PATH": str(tmp_path), "MODELS_ROOT": str(tmp_path)}
    made = wiring.build(settings.load(chosen, {}))
    parts = made.services
    try:
        answer = create_app(parts).test_client().get("/v1/events")
        stream = iter(answer.response)
        assert next(stream).startswith(b"event: snapshot\n")
        for number in range(KEPT + 10):
            parts.bus.publish("loaded", {"id": f"number {number}"})
        told = [next(stream) for _ in range(KEPT + 2)]
        assert told[0].startswith(b"event: lost\n")
        assert b'"count": 10' in told[0]
        assert told[1].startswith(b"event: snapshot\n")
        assert b'"number 10"' in told[2]
        assert f'"number {KEPT + 9}"'.encode() in told[-1]
        answer.close()
        for _ in range(FOLLOWERS_OF_ONE):  # its own place is free again
            parts.bus.subscribe(client="127.0.0.1")
    finally:
        made.close()


# -- logs


def test_the_log_is_text_and_can_be_followed_with_its_history_first(
    proxy: Proxy, follow: Callable[..., Following]
) -> None:
    proxy.get("/v1/models", headers={"X-Request-Id": "before"})
    until(lambda: "id=before" in proxy.get("/v1/logs").text, what="the line before")
    assert len(proxy.get("/v1/logs?lines=2").text.splitlines()) == 2
    assert proxy.get("/v1/logs?lines=0").text == ""
    log = follow(proxy, "/v1/logs?follow=true&lines=10000")
    proxy.get("/v1/models", headers={"X-Request-Id": "after"})
    seen = ""
    while "id=after" not in seen:
        kind, data = log.next()
        assert kind == "message"
        seen += data + "\n"
    assert seen.count("id=before ") == 1
    assert seen.index("id=before") < seen.index("id=after")


@pytest.mark.backend
def test_the_backends_log_is_followed_while_it_starts(
    proxy: Proxy, follow: Callable[..., Following]
) -> None:
    log = follow(proxy, "/v1/logs?source=backend&follow=true&lines=0")
    proxy.unload()
    assert proxy.load("tiny/beta").ok
    seen = ""
    while "Starting httpd" not in seen:
        seen += log.next()[1]


@pytest.mark.parametrize(
    ("query", "param"),
    [("source=disk", "source"), ("lines=many", "lines"), ("lines=99999", "lines"),
     ("follow=perhaps", "follow")],
)  # fmt: skip
def test_a_wrong_question_names_the_parameter(proxy: Proxy, query: str, param: str) -> None:
    answer = proxy.get(f"/v1/logs?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_no_line_is_lost_or_doubled_while_the_file_is_rotated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxproxy.logfile.FILE_BYTES", 2000)
    path = tmp_path / "logs" / "backend.log"
    file = LogFile(path)
    with LogTail(path, 10) as tail:
        seen = tail.read()
        for number in range(300):
            file.put(f"line {number}\n")
            wanted = f"line {number}\n"
            deadline = time.monotonic() + 5
            while wanted not in seen and time.monotonic() < deadline:
                seen += tail.read()
    file.close()
    assert path.with_name("backend.log.1").exists()
    assert seen.splitlines() == [f"line {number}" for number in range(300)]


def test_history_goes_back_beyond_the_last_rotation(tmp_path: Path) -> None:
    path = tmp_path / "proxy.log"
    path.with_name("proxy.log.1").write_text("one\ntwo\n")
    path.write_text("three\nbegun")
    with LogTail(path, 2) as tail:
        assert tail.read() == "three\n"
        with path.open("a") as file:
            file.write(" and ended\n")
        assert tail.read() == "begun and ended\n"
    with LogTail(path, 3) as tail:
        assert tail.read() == "two\nthree\nbegun and ended\n"


# -- followers


def test_one_client_cannot_have_all_places_of_followers() -> None:
    bus = EventBus()
    kept = [bus.subscribe(client="greedy") for _ in range(FOLLOWERS_OF_ONE)]
    with pytest.raises(TooManyRequests):
        bus.subscribe(client="greedy")
    for number in range(FOLLOWERS - FOLLOWERS_OF_ONE):
        bus.subscribe(client=f"another {number}")
    with pytest.raises(TooManyRequests):
        bus.subscribe(client="one too many")
    bus.unsubscribe(kept[0])
    bus.subscribe(client="one too many")


def test_followers_beyond_the_limit_are_refused_until_one_leaves(
    proxy: Proxy, follow: Callable[..., Following]
) -> None:
    paths = ("/v1/events", "/v1/logs?follow=true")
    all_of_them: list[Following] = []

    def another(number: int) -> Following:
        """As soon as those of other tests are gone."""

        def accepted() -> Following | None:
            one = follow(proxy, paths[number % 2])
            return one if one.status == 200 else None

        found: Following = until(accepted, what=f"place number {number}")
        return found

    for number in range(FOLLOWERS_OF_ONE):
        all_of_them.append(another(number))
    refused = proxy.get("/v1/events")
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "too_many_requests"
    assert "Retry-After" in refused.headers
    assert proxy.get("/v1/events?follow=false").ok
    assert proxy.get("/v1/logs").ok
    for one in all_of_them:
        one.close()
    another(0)


def test_following_ends_when_the_proxy_stops(
    start: Callable[..., Proxy], models: Path, follow: Callable[..., Following]
) -> None:
    proxy = start(models)
    events, log = follow(proxy, "/v1/events"), follow(proxy, "/v1/logs?follow=true&lines=0")
    events.until("snapshot")
    started = time.monotonic()
    assert proxy.stop() == 0
    assert time.monotonic() - started < 5
    for stream in (events, log):
        with contextlib.suppress(requests.exceptions.ChunkedEncodingError):
            while stream.next()[0] != "end":
                pass


def test_all_of_it_needs_the_key(start: Callable[..., Proxy], models: Path) -> None:
    proxy = start(models, API_KEY="right")
    for path in ("/v1/logs", "/v1/events", "/metrics"):
        assert proxy.get(path).status_code == 401
        right = proxy.get(path + "?follow=false", headers={"Authorization": "Bearer right"})
        assert right.ok


# -- metrics


@pytest.mark.backend
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
    assert found["mlxproxy_tokens_per_second_count{model=tiny/beta}"] == 2
    for model in ("tiny/alpha", "tiny/beta"):
        assert found[f"mlxproxy_load_seconds_count{{model={model}}}"] == 1
    assert found["mlxproxy_swap_seconds_count{model=tiny/beta}"] == 1
    assert 0 < found["mlxproxy_swap_seconds_sum{model=tiny/beta}"] < 60
    assert found["mlxproxy_in_flight{model=tiny/beta}"] == found["mlxproxy_waiting"] == 0
    assert found["mlxproxy_backend_memory_bytes{model=tiny/beta}"] > 10_000_000


@pytest.mark.backend
def test_a_stream_under_way_is_in_flight_and_has_a_speed(
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


def told(metrics: Metrics, *states: str) -> int:
    """The swaps counted after these states: of the first slot, and after a / of the second."""
    for state in states:
        pair = state.partition("/")
        snapshot = Scheduler(Limits(), slots=2).snapshot(Moment(0.0, 0.0))
        slots = [
            replace(slot, state=SlotState(now or "empty"), spec=model_spec(name))
            for slot, now, name in zip(snapshot.slots, (pair[0], pair[2]), "ab", strict=True)
        ]
        metrics.event(replace(snapshot, slots=tuple(slots)))
    swaps = metrics.counts().swaps
    return sum(sum(swaps[name].counts) for name in list(swaps))


def test_only_one_model_replacing_another_is_a_swap() -> None:
    metrics = Metrics()
    assert told(metrics, "loading", "ready") == 0
    assert told(metrics, "stopping", "empty", "loading", "ready") == 0
    assert told(metrics, "draining", "ready") == 0
    assert told(metrics, "stopping", "loading", "empty", "loading", "ready") == 0
    assert told(metrics, "draining", "stopping", "loading", "ready", "ready") == 1
    assert told(metrics, "stopping", "loading", "ready") == 2


def test_a_swap_is_counted_for_its_slot_whatever_another_slot_does() -> None:
    metrics = Metrics()
    assert told(metrics, "ready/ready", "stopping/ready", "empty/ready", "loading/ready") == 0
    assert told(metrics, "ready/ready", "ready/draining", "ready/stopping", "ready/loading") == 0
    assert told(metrics, "draining/loading", "ready/ready") == 1
    swaps = metrics.counts().swaps
    assert {name: sum(each.counts) for name, each in swaps.items()} == {"b": 1}


def test_an_answer_that_failed_counts_as_far_as_it_came() -> None:
    metrics = Metrics()
    metrics.request(
        "/v1/chat/completions", 502, AnswerStats(model="a", outcome="backend_failed", tokens_out=3)
    )
    counts = metrics.counts()
    assert counts.requests["/v1/chat/completions", 502] == 1
    assert counts.tokens_out == {"a": 3}
    assert not counts.first_token
