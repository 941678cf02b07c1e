"""`mlxproxy ls`: what is on disk."""

from __future__ import annotations

import contextlib
from typing import Any

from rich.console import Console
from rich.table import Table

from mlxproxy.commands import terminal
from mlxproxy.commands.client import Client, ClientError, connect
from mlxproxy.text import harmless

HEADINGS = ("MODEL", "SIZE", "QUANT", "CTX", "CAN", "STATE")


def ls(client: Client, everything: bool, as_json: bool) -> None:
    """Prints the models."""
    listed = client.get("/v1/models" + ("?all=true" if everything else ""))
    models = listed["data"]
    if not listed.get("complete", True):
        terminal.messages().print(
            "A models folder is still being read, so the list may be incomplete."
        )
    if as_json:
        terminal.print_json(models)
        return
    console = terminal.output()
    usable = [model for model in models if model["loadable"]]
    others = [model for model in models if not model["loadable"]]
    if usable:
        terminal.show(console, _listing(console, usable))
    elif listed.get("complete", True):
        _say_where(client, console)
    if others:
        console.print("\nCannot be loaded:", style="bold")
        for model in others:
            console.print(f"{model['id']}: {model['reason']}")


def completions(host: str | None, key: str | None, begun: str) -> list[str]:
    """The ids that begin so, for the shell; none where no server answers."""
    with contextlib.suppress(ClientError):
        models = connect(host, key).get("/v1/models")["data"]
        return [harmless(model["id"]) for model in models if model["id"].startswith(begun)]
    return []


def _listing(console: Console, models: list[dict[str, Any]]) -> Table:
    """The table; ids that leave the other columns no room are folded after the publisher."""
    table = _table(models, 0)
    longest = max(len("MODEL"), *(len(model["id"]) for model in models))
    excess = terminal.natural_width(console, table) - console.width
    return _table(models, longest - excess) if excess > 0 else table


def _table(models: list[dict[str, Any]], room: int) -> Table:
    table = terminal.table(*HEADINGS, right=("SIZE", "CTX"))
    for model in models:
        id_ = model["id"]
        if 0 < room < len(id_):
            id_ = id_.replace("/", "/\n", 1)
        table.add_row(
            id_,
            terminal.size(model["size_bytes"]),
            _quantization(model["quantization"]),
            _tokens(model["max_context_length"]),
            _abilities(model["capabilities"]),
            _state(model),
            style="green" if model["loaded"] else None,
        )
    return table


def _state(model: dict[str, Any]) -> str:
    if model["state"] != "not-loaded":
        return str(model["state"])
    return "" if model.get("fits", True) else "too big"


def _quantization(found: dict[str, Any] | None) -> str:
    return str(found["name"]).removeprefix("mixed ") if found else "none"


def _tokens(number: int | None) -> str:
    if number is None:
        return ""
    return f"{number / 1024:.0f}K" if number < 1 << 20 else f"{number / (1 << 20):.3g}M"


def _abilities(found: dict[str, Any]) -> str:
    words = (("tools", "tools"), ("vision", "see"), ("thinking", "think"))
    return " ".join(word for name, word in words if found[name])


def _say_where(client: Client, console: Console) -> None:
    folders = " and ".join(client.get("/health").get("models_root", ()))
    console.print(
        f"No model in {folders or 'the models folder'} can be loaded. Download an MLX model in LM "
        "Studio, or set MODELS_ROOT.",
        soft_wrap=True,
    )
