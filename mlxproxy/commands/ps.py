"""`mlxproxy ps`: the loaded models and their figures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from mlxproxy.commands import terminal
from mlxproxy.commands.client import Client
from mlxproxy.commands.terminal import duration, size, switch


def ps(client: Client, as_json: bool) -> None:
    """Print each loaded model with its figures, then the models that are being loaded.

    Raises:
        ClientError: there is no server, or it rejects the request.
    """
    state = client.get("/v1/events?follow=false")
    if as_json:
        terminal.print_json(state)
        return
    console = terminal.output()
    models = _models(state)
    for model in models:
        console.print(model["id"], style="bold", soft_wrap=True)
        for name, value in _figures(model):
            console.print(f"  {name:11}{value}", soft_wrap=True)
    transition = state["transition"]
    if transition and transition["id"]:
        phase, seconds = transition["phase"], duration(transition["seconds"])
        terminal.say(console, f"{transition['id']} is being loaded: {phase}, {seconds}")
    elif not models:
        failure = state["last_failure"]
        terminal.say(console, failure["reason"] if failure else "No model is loaded.")
    for peer in state.get("peers", ()):
        terminal.say(console, _peer(peer))


def _peer(peer: dict[str, Any]) -> str:
    """Return what is loaded at a peer, or why that is not known, as a sentence."""
    if not peer["reachable"]:
        return f"The peer {peer['name']} ({peer['url']}) {peer['reason']}."
    return f"At {peer['name']}: {', '.join(peer['loaded']) or 'no model is loaded'}"


def _models(state: dict[str, Any]) -> list[dict[str, Any]]:
    return [model for model in state["models"] if model["loaded_at"] is not None]


def _figures(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "state", _state(model)
    yield "thinking", switch(model["enable_thinking"])
    yield "requests", f"{model['in_flight']} in flight, {model['waiting']} waiting"
    yield "speed", _speed(model["tokens_per_second"])
    resident, weights = size(model["memory_bytes"]), size(model["weights_bytes"])
    yield "memory", f"{resident or 'unknown'} resident, {weights} weights"
    yield "idle TTL", _idle(model)
    if model["pinned"]:
        yield "pinned", "never evicted for another model"


def _state(model: dict[str, Any]) -> str:
    if model["state"] == "draining":
        return "finishing its answers before it is unloaded"
    return f"loaded {duration(max(0.0, time.time() - model['loaded_at']))} ago"


def _speed(speed: dict[str, float | None]) -> str:
    if speed["now"] is not None:
        return f"{speed['now']:.1f} tokens/s now"
    if speed["last"] is not None:
        return f"{speed['last']:.1f} tokens/s in the last answer"
    return "not known yet"


def _idle(model: dict[str, Any]) -> str:
    if model["idle_unload_in"] is not None:
        return f"unloads in {duration(model['idle_unload_in'])}"
    busy = model["in_flight"] or model["waiting"]
    return "not while there are requests" if busy else "never unloads"
