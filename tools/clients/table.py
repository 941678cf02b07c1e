"""The results as a table of docs/clients.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tools.clients.checks import CHECKS
from tools.clients.clients import Client


class Result(NamedTuple):
    """What came of a client.

    Attributes:
        version: None: it could not be installed.
        outcomes: for each check that was run, what is wrong, or None.
    """

    client: Client
    version: str | None
    outcomes: Mapping[str, str | None]


def table(results: Sequence[Result], system: str) -> str:
    """Return the table, and the reasons below it."""
    head = ["Client", "Version", "API", *CHECKS]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    reasons = []
    for client, version, outcomes in results:
        cells = [f"{client.name}", version or "not installed", client.api]
        for check in CHECKS:
            if check not in outcomes:
                cells.append("-")
            elif outcomes[check] is None:
                cells.append("yes")
            else:
                reasons.append(f"{client.name}, {client.api}, {check}: {outcomes[check]}")
                cells.append(f"no ({len(reasons)})")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", system]
    if reasons:
        lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]
    return "\n".join(lines) + "\n"
