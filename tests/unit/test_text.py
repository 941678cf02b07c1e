"""What others have written is harmless in a log, on a terminal and in JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mlxproxy.commands import terminal
from mlxproxy.commands.client import ClientError, Refused
from mlxproxy.commands.service import ServiceError
from mlxproxy.commands.terminal import Row
from mlxproxy.text import harmless, harmless_json
from tests.support.hostile_text import CLEAN, NASTY

CONTROLS = [chr(it) for it in range(32) if chr(it) not in "\n\t"] + [
    chr(it) for it in range(127, 160)
]

TURNING = list("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

OTHERS = ["\u2028", "\u2029", "\ud800", "\udfff"]

HARMFUL = [*CONTROLS, *TURNING, *OTHERS]


@pytest.mark.parametrize("character", HARMFUL, ids=ascii)
def test_control_characters_are_removed(character: str) -> None:
    assert harmless(f"a{character}b") == "ab"
    value = {f"a{character}b": character}
    shown = harmless_json(json.dumps(value, indent=1, ensure_ascii=False))
    assert json.loads(shown) == value
    assert character not in shown


def test_text_in_any_language_is_kept() -> None:
    text = "Zoë 日本語 שלום العربية 👩‍👩‍👧 a\tb\nc ﷺ e\u0301 \u200f"
    assert harmless(text) == text
    assert harmless_json(text) == text


@pytest.mark.parametrize("tty", [True, False])
def test_no_way_of_printing_passes_control_characters_on(
    tty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.StringIO()
    monkeypatch.setattr(file, "isatty", lambda: tty)
    monkeypatch.setattr("sys.stdout", file)
    console = terminal.output()
    grid = Table.grid()
    grid.add_row(Text(NASTY))
    console.print(NASTY, style="bold")
    console.print(Text(NASTY), Group(NASTY, grid), soft_wrap=True)
    terminal.say(console, NASTY)
    terminal.table(console, Row(NASTY, (NASTY,)), [Row(NASTY * 20, (NASTY,), "green")])
    terminal.print_json({NASTY: NASTY})
    with terminal.spinner(console, "waiting") as show:
        show(NASTY)
    printed = file.getvalue()
    assert printed.count(CLEAN) >= 4
    for sequence in (
        "\x1b]",
        "\x07",
        "\x1b[2J\x1b[",
        "\x9b",
        "\u202e",
        "\u2028",
        "\x85",
        "\b",
        "\0",
    ):
        assert sequence not in printed, ascii(sequence)
    if not tty:
        assert "\x1b" not in printed


@pytest.mark.parametrize("error", [ClientError, ServiceError, lambda it: Refused({"message": it})])
def test_a_commands_error_message_has_no_control_characters(error: Callable[[str], Any]) -> None:
    assert error(NASTY).format_message() == CLEAN
