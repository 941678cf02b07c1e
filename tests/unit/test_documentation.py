"""The README says all that can be done, and SECURITY.md nothing that no test holds."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from mlxproxy.cli import main
from tools import reference

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SECTION = README.partition(reference.BEGIN)[2].partition(reference.END)[0]
NAMED = r"`(test_\w+)::(test_\w+)`"


def test_the_readmes_command_section_is_what_the_commands_say() -> None:
    again = "make it anew: python -m tools.reference README.md"
    assert reference.put(README) == README, again


def test_every_command_and_option_has_a_help_text() -> None:
    with click.Context(main, info_name="mlxproxy") as context:
        for it in reference.contexts(context):
            assert it.command.help, f"{it.command_path} has no help"
            for option in reference.options(it):
                assert option.help, f"{it.command_path} {option.opts[0]} has no help"


@pytest.mark.parametrize("path", ["/v1/logs", "/v1/events", "/metrics"])
def test_the_readme_names_logs_events_and_metrics(path: str) -> None:
    assert path in README.replace(SECTION, "")


def test_every_promise_in_security_md_names_tests_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    promises = [row for row in rows if row not in ("| Promise | Test |", "|---|---|")]
    assert len(promises) > 20
    for row in promises:
        found = re.fullmatch(rf"\| (\S.*) \| ({NAMED}(?:, {NAMED})*) \|", row)
        assert found, f"not a promise and its tests: {row}"
        for file, name in re.findall(NAMED, found[2]):
            sources = [path.read_text() for path in (ROOT / "tests").rglob(f"{file}.py")]
            holders = [source for source in sources if f"\ndef {name}(" in source]
            assert len(holders) == 1, f"{file}::{name} is in {len(holders)} files"
