"""`mlxproxy cache`: the prompts that are kept on disk."""

from __future__ import annotations

import time
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from mlxproxy.commands import terminal
from mlxproxy.commands.terminal import Row
from mlxproxy.engines.mlx_lm.inside.disk import store

HEAD = Row("MODEL", ("PROMPTS", "SIZE", "LAST USED"), "bold")
NUMBERS = (0, 1)  # the columns of PROMPTS and SIZE


class NotKept(Exception):
    """No prompt of such a model is kept; the message is the sentence for the user."""


class Kept(NamedTuple):
    """What is kept for a model.

    Attributes:
        folders: one for each of its versions and of its options.
    """

    model: str
    folders: list[Path]
    entries: list[store.Stored]

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.entries)

    @property
    def used(self) -> float:
        return max(entry.used for entry in self.entries)


def ls(root: Path, as_json: bool) -> None:
    """Print how much is kept for each model, the one that was used last first."""
    models = sorted(kept(root), key=lambda model: -model.used)
    if as_json:
        terminal.print_json(
            [
                {
                    "model": model.model,
                    "prompts": len(model.entries),
                    "size_bytes": model.size,
                    "used_at": datetime.fromtimestamp(model.used, timezone.utc).isoformat(),
                }
                for model in models
            ]
        )
        return
    if not models:
        terminal.say(terminal.messages(), f"No prompts are kept in {root}.")
        return
    rows = [
        Row(
            model.model,
            (
                str(len(model.entries)),
                terminal.size(model.size),
                f"{terminal.duration(max(0.0, time.time() - model.used))} ago",
            ),
        )
        for model in models
    ]
    terminal.table(terminal.output(), HEAD, rows, NUMBERS)


def clear(root: Path, name: str | None) -> None:
    """Delete what is kept for a model, or everything.

    Raises:
        NotKept: nothing is kept for that model.
    """
    models = kept(root)
    chosen = models if name is None else [model for model in models if model.model == name]
    if name is not None and not chosen:
        names = ", ".join(model.model for model in models)
        there_are = f"There are some of: {names}." if names else "None are kept at all."
        raise NotKept(f"No prompts of '{name}' are kept. {there_are}")
    number = sum(len(model.entries) for model in chosen)
    size = terminal.size(sum(model.size for model in chosen))
    for model in chosen:
        for folder in model.folders:
            store.clear(folder)
    left = sum(len(store.entries(folder)) for model in chosen for folder in model.folders)
    if left:
        raise NotKept(f"{left} of {number} prompts in {root} could not be deleted.")
    what = "prompt" if number == 1 else "prompts"
    terminal.say(terminal.output(), f"Deleted {number} {what} ({size}).")


def kept(root: Path) -> list[Kept]:
    """Return what is kept, by model."""
    folders: defaultdict[str, list[Path]] = defaultdict(list)
    for folder in store.folders(root):
        folders[str(store.about(folder).get("model", "unknown"))].append(folder)
    found = [
        Kept(model, own, [entry for folder in own for entry in store.entries(folder)])
        for model, own in folders.items()
    ]
    return [model for model in found if model.entries]
