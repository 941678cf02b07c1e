"""The results, kept from run to run, as a table of docs/clients.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.clients.checks import CHECKS
from tools.clients.clients import CLIENTS, Client


class Results:
    """The latest result of each client.

    Args:
        file: what keeps them.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def note(self, client: Client, version: str | None, outcomes: Mapping[str, str | None]) -> None:
        """Keep a result.

        Args:
            version: None: the client could not be installed.
            outcomes: for each check that was run, what is wrong, or None.
        """
        self._keep(_name(client), {"version": version, "outcomes": dict(outcomes)})

    def note_more(self, lines: Sequence[str], system: str) -> None:
        """Keep the lines below the table: further results, and where they were obtained."""
        self._keep("more", list(lines))
        self._keep("system", system)

    def _keep(self, name: str, value: object) -> None:
        self._kept[name] = value
        self._file.write_text(json.dumps(self._kept, indent=1))

    def table(self) -> str:
        """Return the table, and below it the reasons of what failed and the further lines."""
        head = ["Client", "Version", "API", *CHECKS]
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        reasons: list[str] = []
        for client in CLIENTS:
            result = self._kept.get(_name(client), {"version": None, "outcomes": {}})
            cells = [client.name, result["version"] or "not installed", client.api]
            for check in CHECKS:
                outcome = result["outcomes"].get(check, "-")
                if outcome not in (None, "-"):
                    reasons.append(f"{client.name}, {client.api}, {check}: {outcome}.")
                    outcome = f"no ({len(reasons)})"
                cells.append(outcome or "yes")
            lines.append(f"| {' | '.join(cells)} |")
        if reasons:
            lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]
        for more in (self._kept.get("more"), [self._kept.get("system", "")]):
            lines += ["", *more] if more else []
        return "\n".join(lines) + "\n"


def _name(client: Client) -> str:
    return f"{client.name}, {client.api}"
