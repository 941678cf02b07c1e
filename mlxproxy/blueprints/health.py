"""`GET /health`: whether the proxy and the backend are up. It needs no key and never waits."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, request

from mlxproxy.blueprints import shapes
from mlxproxy.blueprints.services import services
from mlxproxy.errors import ProxyError

blueprint = Blueprint("health", __name__)


@blueprint.get("/health")
def health() -> dict[str, Any]:
    """Return the original's four fields, then what is under way and what went wrong last."""
    parts = services()
    state = shapes.state(parts.controller.describe())
    answer = {
        "proxy": "ok",
        "backend": backend_word(state),
        "model_id": state["model_id"],
        "enable_thinking": state["enable_thinking"] or False,
    }
    try:
        parts.access.check_key(
            request.headers.get("Authorization"), request.headers.get("x-api-key")
        )
    except ProxyError:
        # Without the key, a client gets what a health check needs, but no paths and no log lines.
        return {**answer, "model_id": state["id"]}
    missing = [str(root) for root in parts.catalog.missing_roots()]
    return {
        **answer,
        "state": state["state"],
        "in_flight": state["in_flight"],
        "waiting": state["waiting"],
        "models": state["models"],
        "transition": state["transition"],
        "last_failure": state["last_failure"],
        "models_root": [str(root) for root in parts.roots],
        "models_root_missing": missing,
    }


def backend_word(state: dict[str, Any]) -> str:
    """Return `ok`, `loading` or `not_running`, the contract's names for the backend's state."""
    if state["state"] in ("ready", "draining"):
        return "ok"
    transition = state["transition"]
    return "loading" if transition and transition["kind"] == "load" else "not_running"
