"""The application, without a server: its routes, and faults that nobody has foreseen."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flask.testing import FlaskClient

from mlxproxy.backend.batch import ANY_BATCH
from mlxproxy.blueprints import answering, hooks
from mlxproxy.blueprints.app import create_app
from mlxproxy.blueprints.auth import Access
from mlxproxy.blueprints.budget import Budget
from mlxproxy.engines.mlx_lm.rules import RULES
from mlxproxy.errors import NoModelLoaded
from mlxproxy.guard.check import Terms
from mlxproxy.guard.shapes import Limits
from mlxproxy.observability.answers import Answers
from mlxproxy.observability.events import EventBus
from mlxproxy.observability.metrics import Metrics
from mlxproxy.settings import Settings
from tests.support.fake_connection import FakeConnection, Scene
from tests.support.network import CALLS, PLACE, PROMPT
from tests.support.raw_http import shape


def test_the_tests_of_keys_and_origins_call_every_route() -> None:
    """The tests below know every route there is."""
    parts: Any = SimpleNamespace(settings=Settings(instance_path=Path("/nowhere")))
    routes = {
        re.sub("<.*>", "tiny/alpha", rule.rule) for rule in create_app(parts).url_map.iter_rules()
    }
    assert routes == {path for _, path in CALLS if path != "/nothing"} | {"/health"}


def test_an_unforeseen_error_shows_its_request_id_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fault() -> None:
        raise RuntimeError(f"{PLACE} {PROMPT}")

    parts: Any = SimpleNamespace(
        settings=Settings(instance_path=Path("/nowhere")),
        access=Access(),
        controller=SimpleNamespace(describe=fault),
        bus=EventBus(),
        metrics=Metrics(),
        answers=Answers(),
    )
    answer = create_app(parts).test_client().get("/v1/models/loaded")
    assert answer.status_code == 500
    error = shape(answer.get_json())
    assert error["code"] == "internal_error"
    assert answer.headers["X-Request-Id"] in error["message"]
    assert PLACE not in answer.text
    assert any(
        answer.headers["X-Request-Id"] in it.message and it.exc_info for it in caplog.records
    )


def streaming(scene: Scene) -> tuple[FlaskClient, Any]:
    """A client of the application whose answers come from a scene, and the application's parts."""
    parts: Any = SimpleNamespace(
        settings=Settings(instance_path=Path("/nowhere")),
        access=Access(),
        controller=SimpleNamespace(
            current=lambda: None, has=lambda feature: False, lease=lambda *_: scene.lease
        ),
        relay=scene.relay,
        peers=None,
        selection=SimpleNamespace(
            expected=lambda name, kind: None,
            profile_for=lambda name, spec: None,
            fallback=lambda: None,
            terms=lambda spec, profile: Terms(RULES, Limits(frozenset())),
            engine_of=lambda spec: SimpleNamespace(
                batch=lambda fields, spec, has: ANY_BATCH, unmet=lambda *_: ()
            ),
        ),
        bodies=Budget(1 << 20),
        bus=EventBus(),
        metrics=Metrics(),
        answers=Answers(),
    )
    return create_app(parts).test_client(), parts


STREAM = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}


def test_a_stream_that_nobody_reads_is_recorded_and_gives_its_place_back() -> None:
    scene = Scene(FakeConnection([b"data: {}\n\n"])).grant()
    client, parts = streaming(scene)
    answer = client.post("/v1/chat/completions", json=STREAM, buffered=False)
    assert (answer.status_code, answer.headers["Cache-Control"]) == (200, "no-cache")
    assert scene.controller.released == 0
    answer.response.close()  # type: ignore[attr-defined]
    assert scene.controller.released == 1
    assert parts.metrics.counts().requests == {("/v1/chat/completions", 200): 1}
    assert parts.metrics.speed(parts.answers.stats())["now"] is None


def test_a_stream_whose_head_cannot_be_sent_gives_its_place_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server never gets it: its own end of the request is the last resort."""
    scene = Scene(FakeConnection([b"data: {}\n\n"])).grant()
    client, _ = streaming(scene)

    def fault(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(hooks, "_share", fault)
    with ExitStack() as at_end:
        answer = client.post(
            "/v1/chat/completions",
            json=STREAM,
            headers={"Origin": "http://localhost"},
            environ_overrides={"mlxproxy.at_end": at_end},
        )
        assert answer.status_code == 500
    assert scene.controller.released == 1


def test_a_stream_that_a_fault_follows_gives_its_place_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is told of an answer is told once its end is seen to."""
    scene = Scene(FakeConnection([b"data: {}\n\n"])).grant()
    client, _ = streaming(scene)

    def fault(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(answering, "warn", fault)
    with ExitStack() as at_end:
        environment = {"mlxproxy.at_end": at_end}
        answer = client.post("/v1/chat/completions", json=STREAM, environ_overrides=environment)
        assert answer.status_code == 500
    assert scene.controller.released == 1


def test_an_error_that_was_answered_keeps_no_request_in_memory() -> None:
    """It may be kept by what has raised it; its frames would keep the request's body in memory."""
    error = NoModelLoaded("No model is loaded.")

    def fault() -> None:
        raise error

    parts: Any = SimpleNamespace(
        settings=Settings(instance_path=Path("/nowhere")),
        access=Access(),
        controller=SimpleNamespace(describe=fault),
        bus=EventBus(),
        metrics=Metrics(),
        answers=Answers(),
    )
    assert create_app(parts).test_client().get("/v1/models/loaded").status_code == 503
    assert error.__traceback__ is None
