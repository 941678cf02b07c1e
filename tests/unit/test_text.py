"""What others have written is harmless in a log, on a terminal and in JSON."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mlxproxy.commands import terminal
from mlxproxy.commands.client import ClientError, Refused
from mlxproxy.commands.service import ServiceError
from mlxproxy.text import harmless, harmless_json
from tests.conftest import Proxy, until
from tests.support import scripted_server
from tests.support.pty import Terminal, environment, run

CONTROLS = [chr(it) for it in range(32) if chr(it) not in "\n\t"] + [
    chr(it) for it in range(127, 160)
]
TURNING = list("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
OTHERS = ["\u2028", "\u2029", "\ud800", "\udfff"]
HARMFUL = [*CONTROLS, *TURNING, *OTHERS]
NASTY = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202eevil\u2028\x85\b\x00"
CLEAN = "]0;owned[2J31mevil"


@pytest.mark.parametrize("character", HARMFUL, ids=ascii)
def test_what_a_terminal_obeys_is_taken_out(character: str) -> None:
    assert harmless(f"a{character}b") == "ab"
    value = {f"a{character}b": character}
    shown = harmless_json(json.dumps(value, indent=1, ensure_ascii=False))
    assert json.loads(shown) == value
    assert character not in shown


def test_what_people_write_stays() -> None:
    text = "Zoë 日本語 שלום العربية 👩‍👩‍👧 a\tb\nc ﷺ e\u0301 \u200f"
    assert harmless(text) == text
    assert harmless_json(text) == text


@pytest.mark.parametrize("tty", [True, False])
def test_no_way_of_printing_passes_it_on(tty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(file, "isatty", lambda: tty)
    monkeypatch.setattr("sys.stdout", file)
    console = terminal.output()
    table = terminal.table("HEADING")
    table.add_row(NASTY, style="green")
    grid = Table.grid()
    grid.add_row(Text(NASTY))
    console.print(NASTY, style="bold")
    console.print(Text(NASTY), Group(NASTY, grid), soft_wrap=True)
    terminal.show(console, table)
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
def test_the_sentence_that_ends_a_command_is_harmless(error: Callable[[str], Any]) -> None:
    assert error(NASTY).format_message() == CLEAN


@pytest.mark.standin
def test_what_a_backend_logs_reaches_file_readers_followers_and_terminals_clean(
    start: Callable[..., Proxy],
    models: Path,
    tmp_path: Path,
    terminal: Callable[..., Terminal],
) -> None:
    program = scripted_server.install(tmp_path / "standin", load_failure=f"of {NASTY} and more")
    proxy = start(models, MLX_SERVER_BIN=program)
    with proxy.get("/v1/logs?source=backend&follow=true", stream=True) as following:
        answer = proxy.load("tiny/alpha")
        assert answer.status_code == 500
        lines = following.iter_lines(chunk_size=1)
        followed = next(line for line in lines if b"of ]0" in line).decode()
    log = proxy.instance / "logs" / "backend.log"
    until(lambda: CLEAN in log.read_text(), what="the line")
    seen = {
        "the file": log.read_text(),
        "/v1/logs": proxy.get("/v1/logs?source=backend").text,
        "a follower": followed,
        "the error's log": "\n".join(answer.json()["error"]["log"]),
    }
    for place, text in seen.items():
        assert CLEAN in text, place
        assert harmless(text) == text, place
    env = environment(tmp_path, proxy.url)
    for command in (["logs", "--backend"], ["ps"], ["status"], ["load", "tiny/alpha"]):
        screen = terminal(*command, env=env)
        screen.wait()
        assert "]0;owned" in screen.text, command
        for sequence in ("\x1b]", "\x07", "\x1b[2J", "\x9b", "\u202e", "\x85", "\0"):
            assert sequence not in screen.raw, (command, ascii(sequence))


@pytest.mark.standin
def test_an_older_log_is_read_clean_too(start: Callable[..., Proxy], tmp_path: Path) -> None:
    log = tmp_path / "instance" / "logs" / "backend.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"{NASTY}\n")
    proxy = start(tmp_path, instance=tmp_path / "instance")
    assert proxy.get("/v1/logs?source=backend").text == f"{CLEAN}\n"
    done: subprocess.CompletedProcess[str] = run(
        "logs", "--backend", env=environment(tmp_path, proxy.url)
    )
    assert done.stdout == f"{CLEAN}\n"
