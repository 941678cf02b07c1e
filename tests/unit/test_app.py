"""The application, without a server: its routes, and faults that nobody has foreseen."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlxproxy.blueprints.app import create_app
from mlxproxy.blueprints.auth import Access
from mlxproxy.errors import NoModelLoaded
from mlxproxy.observability.events import EventBus
from mlxproxy.observability.metrics import Metrics
from mlxproxy.settings import Settings
from tests.support.network import CALLS, PLACE, PROMPT
from tests.support.raw_http import shape


def test_all_routes_are_asked_here() -> None:
    """The tests below know every route there is."""
    parts: Any = SimpleNamespace(settings=Settings(instance_path=Path("/nowhere")))
    routes = {
        re.sub("<.*>", "tiny/alpha", rule.rule) for rule in create_app(parts).url_map.iter_rules()
    }
    assert routes == {path for _, path in CALLS if path != "/nothing"} | {"/health"}


def test_an_unforeseen_fault_tells_its_number_and_nothing_else(
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


def test_an_error_that_was_answered_holds_nothing_of_its_request() -> None:
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
    )
    assert create_app(parts).test_client().get("/v1/models/loaded").status_code == 503
    assert error.__traceback__ is None
