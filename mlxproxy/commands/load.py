"""`mlxproxy load` and `unload`, with progress as far as it is known."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any
from urllib.parse import quote

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from mlxproxy.commands import terminal
from mlxproxy.commands.client import Client, ClientError, Refused
from mlxproxy.commands.terminal import duration, size, switch


def load(client: Client, model: str, as_json: bool, **options: Any) -> dict[str, Any]:
    """Load a model and print the result; return the server's last event.

    Args:
        options: `enable_thinking`, `ttl`, `context`, `force`, `pin`; None: the server's own.

    Raises:
        ClientError: the model was not loaded.
    """
    started = time.monotonic()
    loaded = load_with_progress(client, model, **options)
    if as_json:
        terminal.print_json(loaded)
        return loaded
    thinking = f"thinking {switch(loaded['enable_thinking'])}"
    if loaded["enable_thinking"] and not can_think(client, loaded["id"]):
        thinking = "but it has no thinking mode"
    if loaded.get("changed"):
        said = f"Loaded {loaded['id']} in {duration(time.monotonic() - started)}, {thinking}."
    else:
        said = f"{loaded['id']} is already loaded, {thinking}."
    terminal.say(terminal.output(), said)
    return loaded


def can_think(client: Client, id_: str) -> bool:
    """Return whether the model has a thinking mode; True if that is unknown."""
    try:
        return bool(client.get(f"/v1/models/{quote(id_)}")["capabilities"]["thinking"])
    except (ClientError, KeyError):
        return True


def load_with_progress(client: Client, model: str, **options: Any) -> dict[str, Any]:
    """Load a model behind a progress bar; return the server's last event.

    Raises:
        ClientError: the model was not loaded.
    """
    console = terminal.messages()
    given = {name: value for name, value in options.items() if value is not None}
    body = {"model_id": model, "stream": True, **given}
    try:
        with (
            _Bar(console) as bar,
            closing(client.events("POST", "/v1/models/load", body)) as events,
        ):
            for event in events:
                told = event.json()
                if "error" in told:
                    raise Refused(told["error"])
                if told.get("status") == "loaded":
                    return told
                if told:
                    bar.update(told)
    except KeyboardInterrupt:
        console.print("A load in progress continues; `mlxproxy unload` cancels it.")
        raise
    raise ClientError("The connection was closed before the model was ready.")


def unload(client: Client, model: str | None, as_json: bool) -> None:
    """Unload a model.

    Args:
        model: its name; None: the model that answers requests that name none.

    Raises:
        ClientError: there is no server, it is shutting down, or it has no such model.
    """
    console = terminal.messages()
    before = client.get("/v1/models/loaded")
    busy = before.get("in_flight") or 0
    waiting = f"waiting for answers in flight: {busy}" if busy else "unloading"
    with terminal.spinner(console, waiting):
        answer = client.post("/v1/models/unload", {} if model is None else {"model_id": model})
    if as_json:
        terminal.print_json(answer)
    elif answer["status"] == "already_unloaded":
        said = f"{model} was not loaded." if model else "No model was loaded."
        terminal.say(terminal.output(), said)
    else:
        loading = (before.get("transition") or {}).get("id")
        what = model or before.get("id") or loading or "the model"
        terminal.say(terminal.output(), f"Unloaded {what}.")


class _Bar:
    """The progress of a load: a percentage if the server counts bytes, else only the time."""

    def __init__(self, console: Console) -> None:
        self._shown = console.is_terminal
        self._heading = Text()
        self._progress = Progress(
            TextColumn("{task.description:8}", markup=False),
            BarColumn(30),
            TextColumn("{task.fields[facts]}", markup=False),
        )
        self._task = self._progress.add_task("waiting", total=None, facts="")
        self._live = Live(Group(self._heading, self._progress), console=console, transient=True)

    def __enter__(self) -> _Bar:
        if self._shown:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, told: dict[str, Any]) -> None:
        """Show a progress event."""
        self._heading.plain = f"Loading {told['id']} ({size(told['bytes_total'])})"
        facts = [f"{told['seconds']:.0f} s"]
        read, total = told["bytes_read"], told["bytes_total"]
        counted = told["phase"] == "loading" and read is not None and bool(total)
        if counted:
            facts.insert(0, f"{size(read)} of {size(total)}")
        if told["last_seconds"] is not None:
            facts.append(f"last time {duration(told['last_seconds'])}")
        self._progress.update(
            self._task,
            description=told["phase"],
            completed=read if counted else 0,
            total=total if counted else None,
            facts=", ".join(facts),
        )
