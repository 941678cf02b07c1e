"""`mlxproxy ls`: the models on disk."""

from __future__ import annotations

from typing import Any

from mlxproxy.commands import terminal
from mlxproxy.commands.client import Client, ClientError, connect
from mlxproxy.commands.terminal import Row
from mlxproxy.text import harmless

HEAD = Row("MODEL", ("SIZE", "QUANT", "CTX", "CAN", "STATE"), "bold")
NUMBERS = (0, 2)  # the columns of SIZE and CTX


def ls(client: Client, everything: bool, as_json: bool) -> None:
    """Print the models.

    Raises:
        ClientError: there is no server, or it rejects the request.
    """
    listed = client.get("/v1/models" + ("?all=true" if everything else ""))
    models = listed["data"]
    complete = listed.get("complete", True)
    if not complete:
        terminal.say(
            terminal.messages(),
            "A models folder is still being read, so the list may be incomplete.",
        )
    if as_json:
        terminal.print_json(models)
        return
    console = terminal.output()
    usable = [model for model in models if model["loadable"]]
    others = [model for model in models if not model["loadable"]]
    if usable:
        terminal.table(console, HEAD, [row(model) for model in usable], NUMBERS)
    _say_folders(client, nothing=not usable and complete)
    if others:
        console.print("\nCannot be loaded:", style="bold")
        for model in others:
            terminal.say(console, f"{model['id']}: {model['reason']}")


def completions(host: str | None, key: str | None, begun: str) -> list[str]:
    """Return the model names that begin with this text, for the shell; none if no server answers.

    A name is an id or, if it is unique, the last part of one, which a load accepts too.
    """
    try:
        models = connect(host, key).get("/v1/models")["data"]
    except ClientError:
        return []
    ids = [harmless(model["id"]) for model in models]
    short = [id_.rpartition("/")[2] for id_ in ids]
    names = [*ids, *(name for name in short if begun and short.count(name) == 1)]
    return [name for name in names if name.casefold().startswith(begun.casefold())]


def row(model: dict[str, Any]) -> Row:
    """Return the table row for a model."""
    cells = (
        terminal.size(model["size_bytes"]),
        _quantization(model["quantization"]),
        _tokens(model["max_context_length"]),
        _abilities(model["capabilities"]),
        _state(model),
    )
    return Row(model["id"], cells, "green" if model["loaded"] else None)


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


def _say_folders(client: Client, nothing: bool) -> None:
    """Print which models folders are missing, and which contain nothing that can be loaded.

    Args:
        nothing: whether no folder contains a model that can be loaded.
    """
    health = client.get("/health")
    missing = health.get("models_root_missing", ())
    for folder in missing:
        terminal.say(
            terminal.messages(),
            f"The models folder {folder} does not exist. Connect its disk, or set MODELS_ROOT.",
        )
    there = [folder for folder in health.get("models_root", ()) if folder not in missing]
    if nothing and (there or not missing):
        folders = " and ".join(there)
        terminal.say(
            terminal.messages(),
            f"No model in {folders or 'the models folder'} can be loaded. Download an MLX model "
            "in LM Studio, or set MODELS_ROOT.",
        )
