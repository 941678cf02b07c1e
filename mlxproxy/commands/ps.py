"""`mlxproxy ps`: what is loaded and how it does."""

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
    if state["id"]:
        console.print(state["id"], style="bold")
        terminal.show(console, _figures(state))
    elif not transition:
        console.print("No model is loaded.")
    if transition and transition["id"]:
        phase, seconds = transition["phase"], duration(transition["seconds"])
        console.print(f"{transition['id']} is being loaded: {phase}, {seconds}", soft_wrap=True)
    elif not state["id"] and state["last_failure"]:
        console.print(state["last_failure"]["reason"], soft_wrap=True)


def _figures(state: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2), pad_edge=True)
    rows = {
        "state": state["state"],
        "loaded": duration(max(0.0, time.time() - state["loaded_at"])) + " ago",
        "thinking": switch(state["enable_thinking"]),
        "in flight": str(state["in_flight"]),
        "waiting": str(state["waiting"]),
        "tokens/s": _speed(state["tokens_per_second"]),
        "memory": f"{size(state['memory_bytes'])} resident, {size(state['weights_bytes'])} weights",
        "idle unload": _idle(state),
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


def _idle(state: dict[str, Any]) -> str:
    if state["idle_unload_in"] is not None:
        return f"in {duration(state['idle_unload_in'])}"
    return "not while requests are in flight" if state["in_flight"] or state["waiting"] else "never"
