"""Events and those who follow them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxproxy import settings, wiring
from mlxproxy.blueprints.app import create_app
from mlxproxy.errors import TooManyRequests
from mlxproxy.observability.events import FOLLOWERS, FOLLOWERS_OF_ONE, KEPT, EventBus


def test_a_slow_follower_loses_old_events_and_is_told_how_many(tmp_path: Path) -> None:
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


def test_one_client_cannot_take_all_follower_places() -> None:
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
