"""`mlxproxy ps`: what is loaded, and its figures."""

from __future__ import annotations

import time
from typing import Any

from rich.table import Table

from mlxproxy.commands import terminal
from mlxproxy.commands.client import Client
from mlxproxy.commands.terminal import duration, size, switch


def ps(client: Client, as_json: bool) -> None:
    """Prints the state."""
    state = client.get("/v1/events?follow=false")
    if as_json:
        terminal.print_json(state)
        return
    console = terminal.output()
    transition = state["transition"]
    models = [model for model in state["models"] if model["loaded_at"] is not None]
    for model in models:
        console.print(model["id"], style="bold")
        terminal.show(console, _figures(model))
    if not models and not transition:
        console.print("No model is loaded.")
    if transition and transition["id"]:
        phase, seconds = transition["phase"], duration(transition["seconds"])
        console.print(f"{transition['id']} is being loaded: {phase}, {seconds}", soft_wrap=True)
    elif not models and state["last_failure"]:
        console.print(state["last_failure"]["reason"], soft_wrap=True)


def _figures(model: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2), pad_edge=True)
    rows = {
        "state": model["state"],
        "loaded": duration(max(0.0, time.time() - model["loaded_at"])) + " ago",
        "thinking": switch(model["enable_thinking"]),
        "in flight": str(model["in_flight"]),
        "waiting": str(model["waiting"]),
        "tokens/s": _speed(model["tokens_per_second"]),
        "memory": f"{size(model['memory_bytes'])} resident, {size(model['weights_bytes'])} weights",
        "idle unload": _idle(model),
        **({"pinned": "never evicted for another model"} if model["pinned"] else {}),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _speed(speed: dict[str, float | None]) -> str:
    if speed["now"] is not None:
        return f"{speed['now']:.1f} now"
    return (
        f"{speed['last']:.1f} in the last answer" if speed["last"] is not None else "not known yet"
    )


def _idle(model: dict[str, Any]) -> str:
    if model["idle_unload_in"] is not None:
        return f"in {duration(model['idle_unload_in'])}"
    return "not while requests are in flight" if model["in_flight"] or model["waiting"] else "never"
