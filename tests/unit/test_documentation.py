"""The README says all that the commands and the endpoints can do, and nothing else."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from mlxproxy.cli import main
from tools import reference

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = README.partition(reference.BEGIN)[2].partition(reference.END)[0]


def test_the_command_section_is_what_the_commands_say() -> None:
    again = "make it anew: python -m tools.reference README.md"
    assert reference.put(README) == README, again


def test_every_command_and_option_says_what_it_does() -> None:
    with click.Context(main, info_name="mlxproxy") as context:
        for it in reference.contexts(context):
            assert it.command.help, f"{it.command_path} has no help"
            for option in reference.options(it):
                assert option.help, f"{it.command_path} {option.opts[0]} has no help"


@pytest.mark.parametrize("path", ["/v1/logs", "/v1/events", "/metrics"])
def test_what_can_be_watched_is_in_the_readme(path: str) -> None:
    assert path in README.replace(SECTION, "")
