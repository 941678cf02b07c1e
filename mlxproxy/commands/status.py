"""`mlxproxy status`: the server's health as a sentence and as the exit status."""

from __future__ import annotations

from typing import Any

from mlxproxy.commands import terminal
from mlxproxy.commands.client import Client

FINE, FAULT = 0, 3  # 1: no server, 2: wrong usage


def status(client: Client, as_json: bool) -> int:
    """Print the server's health; return the exit status.

    ClientError: there is no server, or it rejects the request.
        ClientError: no server, or it refuses.
    """
    health = client.get("/health")
    fault = _fault(health)
    if as_json:
        terminal.print_json(health)
    else:
        sentence = f"mlxproxy is running at {client.url}; {_loaded(health)}."
        terminal.say(terminal.output(), " ".join(filter(None, (sentence, fault))))
    return FAULT if fault else FINE


def _loaded(health: dict[str, Any]) -> str:
    transition = health.get("transition") or {}
    if health.get("backend") == "loading":
        phase = f" ({transition['phase']})" if transition else ""
        return f"{transition.get('id') or 'a model'} is being loaded{phase}"
    if not health.get("model_id"):
        return "no model is loaded"
    thinking = terminal.switch(health["enable_thinking"])
    sentence = f"{_short(health)} is loaded, thinking {thinking}"
    if "in_flight" in health:  # a server with a key reports less to clients without it
        sentence += f", {health['in_flight']} in flight, {health['waiting']} waiting"
    return sentence


def _short(health: dict[str, Any]) -> str:
    """Return the loaded model's id, which is its path relative to its models folder."""
    path = str(health["model_id"])
    for root in health.get("models_root", ()):
        path = path.removeprefix(root.rstrip("/") + "/")
    return path


def _fault(health: dict[str, Any]) -> str | None:
    missing = health.get("models_root_missing")
    if missing:
        return f"The models folder {' and '.join(missing)} does not exist."
    failure = health.get("last_failure")
    if failure and health.get("backend") == "not_running":
        return str(failure["reason"])
    return None
