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


def test_all_help_fits_80_columns_and_cuts_no_word() -> None:
    with click.Context(main, info_name="mlxproxy", max_content_width=80) as context:
        for each in reference.contexts(context):
            each.terminal_width = 80
            shown = each.command.get_help(each)
            assert max(map(len, shown.splitlines())) <= 80, shown
            helps = [each.command.help, *(option.help for option in reference.options(each))]
            words = {word for text in helps for word in (text or "").split()} - {"\b"}
            assert words <= set(shown.split()), words - set(shown.split())


def test_each_setting_says_what_kind_of_value_it_takes() -> None:
    flags = {
        flag.opts[0]: flag.metavar
        for flag in main.commands["serve"].get_params(click.Context(main.commands["serve"]))
        if isinstance(flag, click.Option)
    }
    kinds = {
        "--proxy-port": "PORT",
        "--max-queue": "INTEGER",
        "--enable-thinking": "true|false",
        "--model-selection": "loaded|requested",
        "--idle-ttl": "DURATION",
        "--max-body": "SIZE",
        "--api-key-file": "PATH",
        "--proxy-host": "ADDRESS",
    }
    assert kinds.items() <= flags.items()


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
