"""What `make clients` says about the clients that it has tried."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.clients.checks import CHECKS, Checks
from tools.clients.clients import CLIENTS, Client, Command, Task
from tools.clients.installation import NPM, PYPI, Installation
from tools.clients.table import Results

ROOT = Path(__file__).parents[2]
FIRST, SECOND = CLIENTS[:2]
ALL_WELL: dict[str, str | None] = dict.fromkeys(CHECKS)


def test_a_client_that_fails_is_listed_with_the_reason(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    results.note(FIRST, "1.2.3", ALL_WELL)
    results.note(SECOND, "4.5", {**ALL_WELL, "tools": "it crashed"})
    lines = results.table().splitlines()
    assert f"| {FIRST.name} | 1.2.3 | {FIRST.api} |{' yes |' * len(CHECKS)}" in lines
    assert f"1. {SECOND.name}, {SECOND.api}, tools: it crashed." in lines
    assert "no (1)" in results.table()


def test_a_client_that_is_not_tried_again_keeps_its_result(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    Results(file).note(FIRST, "1.2.3", ALL_WELL)
    later = Results(file)
    later.note(SECOND, "4.5", ALL_WELL)
    assert "1.2.3" in later.table()
    assert "4.5" in later.table()


def test_the_document_has_a_line_for_each_client() -> None:
    shown = (ROOT / "docs" / "clients.md").read_text().partition("<!-- clients -->")[2]
    for client in CLIENTS:
        assert any(
            line.startswith(f"| {client.name} | ") and f" | {client.api} | " in line
            for line in shown.splitlines()
        ), f"{client.name}, {client.api}: run make clients"


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: f"{client.name}-{client.api}")
def test_each_client_has_its_package_and_its_command(client: Client, tmp_path: Path) -> None:
    names = {name.partition("[")[0] for name in (*NPM, *sum(PYPI.values(), ()))}
    assert client.package in names
    checks = Checks(client, None, None).names()  # type: ignore[arg-type]
    assert {"stream", "error", "load", "leave"} <= set(checks)
    task = Task("stream", "http://localhost:1", "tiny/a", tmp_path, Installation(tmp_path))
    command = client.command(task)
    assert isinstance(command, Command)
    said = [*map(str, command.words), *command.environment.values()]
    said += [file.read_text() for file in tmp_path.rglob("*.*") if file.is_file()]
    assert any("tiny/a" in each for each in said)
