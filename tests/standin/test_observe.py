"""Logs, events and metrics, as somebody sees them who watches the proxy."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from mlxproxy.observability.events import FOLLOWERS_OF_ONE
from tests.support.following import Following
from tests.support.proxy import Proxy
from tests.support.waiting import until

# -- events


def test_health_checks_and_metrics_scrapes_are_no_events(
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


def test_events_without_follow_are_one_json_snapshot(proxy: Proxy) -> None:
    found = proxy.get("/v1/events?follow=false").json()
    assert {"state", "in_flight", "waiting", "tokens_per_second", "memory_bytes"} <= found.keys()


# -- logs


def test_the_log_is_text_and_can_be_followed_from_its_history_on(
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


@pytest.mark.parametrize(
    ("query", "param"),
    [("source=disk", "source"), ("lines=many", "lines"), ("lines=99999", "lines"),
     ("follow=perhaps", "follow")],
)  # fmt: skip
def test_a_wrong_query_parameter_of_the_log_is_named(proxy: Proxy, query: str, param: str) -> None:
    answer = proxy.get(f"/v1/logs?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


# -- followers


def test_followers_beyond_the_limit_are_rejected_until_one_disconnects(
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


def test_streams_of_events_and_logs_end_when_the_proxy_stops(
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


def test_logs_events_and_metrics_need_a_key(start: Callable[..., Proxy], models: Path) -> None:
    proxy = start(models, API_KEY="right")
    for path in ("/v1/logs", "/v1/events", "/metrics"):
        assert proxy.get(path).status_code == 401
        right = proxy.get(path + "?follow=false", headers={"Authorization": "Bearer right"})
        assert right.ok


# -- curves


def test_a_follower_is_told_the_curves_of_what_came_before(
    proxy: Proxy, follow: Callable[..., Following]
) -> None:
    assert proxy.load("tiny/alpha").ok
    assert proxy.chat().ok

    def told() -> list[float | None] | None:
        """The waits for a first token, once the second of the answer is over."""
        followed = follow(proxy, "/v1/events?figures=true")
        curves = followed.until("snapshot")["curves"]
        followed.close()
        curve = curves.get("tiny/alpha")
        return curve["first_token"] if curve and any(curve["tokens_per_second"]) else None

    assert any(until(told, what="the answer on the curve"))
    assert "curves" not in follow(proxy, "/v1/events").until("snapshot")
