"""The shell's completion, in the real shells as a user meets them: without any set-up."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.ports import free_port
from tests.support.pty import COMMAND, Terminal, environment, run, scripted
from tests.support.waiting import until

IDS = ["one/Alpha-4bit", "two/Alpha-4bit", "HuggingFaceTB/SmolLM2-135M-Instruct"]
SHELLS = {
    "zsh": ["-f", "-i"],
    "bash": ["--norc", "-i"],
    "fish": ["--no-config", "-i"],
}
LINE_START, LINE_END, ENTER = "\x01", "\x05", "\n"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server with three models, two of which have the same last part."""
    with scripted(lambda path, body: {"data": [{"id": id_} for id_ in IDS]}) as url:
        yield url


class Shell:
    """A shell at a terminal, with a folder for what it is asked to write."""

    def __init__(self, screen: Terminal, folder: Path) -> None:
        self._screen = screen
        self._file = folder / "written"

    def run(self, command: str) -> str:
        """Return the command's output."""
        self._file.unlink(missing_ok=True)
        self._screen.type(f"{command} > {self._file}{ENTER}")
        until(lambda: self._file.is_file() and self._file.read_text().endswith("\n"), 20, command)
        return self._file.read_text().strip()

    def complete(self, typed: str) -> str:
        """Press the tab key after what was typed; return the line that the shell makes of it."""
        return self.run(f"{typed}\t{LINE_START}echo {LINE_END}")


@pytest.fixture(params=list(SHELLS))
def shell(
    request: pytest.FixtureRequest,
    url: str,
    tmp_path: Path,
    terminal: Callable[..., Terminal],
) -> Shell:
    """A shell that has just started and read the line that `mlxproxy completion` prints."""
    name = request.param
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"there is no {name} here")
    env = environment(tmp_path, url, SHELL=program, PATH="/usr/bin:/bin")
    line = run("completion", env=env).stdout.splitlines()[1].strip()
    opened = Shell(terminal(*SHELLS[name], env=env, program=program), tmp_path)
    opened.run(f"{line}{ENTER}echo ready")
    return opened


def test_each_shell_completes_commands_and_flags_and_their_values(shell: Shell) -> None:
    assert shell.complete("mlxproxy sta") == "mlxproxy status"
    assert shell.complete(f"{COMMAND} unl") == f"{COMMAND} unload"
    assert shell.complete("mlxproxy load x --thi") == "mlxproxy load x --thinking"
    assert shell.complete("mlxproxy serve --log-level WA").endswith("--log-level WARNING")


def test_each_shell_completes_models_by_id_and_by_their_last_part(shell: Shell) -> None:
    assert shell.complete("mlxproxy load two") == "mlxproxy load two/Alpha-4bit"
    assert shell.complete("mlxproxy chat Smo") == "mlxproxy chat SmolLM2-135M-Instruct"
    assert shell.complete("mlxproxy chat smol") == "mlxproxy chat SmolLM2-135M-Instruct"
    # Two models have this last part: a load would refuse it.
    assert shell.complete("mlxproxy load Alph") == "mlxproxy load Alph"


def test_each_shell_completes_files_where_a_path_is_wanted(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "keys-of-mine").touch()
    shown = shell.complete(f"mlxproxy serve --api-key-file {tmp_path}/keys-o")
    assert shown == f"mlxproxy serve --api-key-file {tmp_path}/keys-of-mine"


def test_a_server_that_is_not_there_is_no_failure(tmp_path: Path) -> None:
    env = environment(tmp_path, f"localhost:{free_port()}")
    done = run("complete", "--", "load", "t", env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("host", "port"), [("--host", "127.0.0.1:{port}"), ("--key", "secret")], ids=["host", "key"]
)
def test_options_before_the_name_count(host: str, port: str, tmp_path: Path) -> None:
    asked: list[str] = []

    def reply(path: str, body: dict[str, Any]) -> dict[str, Any]:
        asked.append(path)
        return {"data": [{"id": "a/b"}]}

    with scripted(reply) as url:
        value = port.format(port=url.rpartition(":")[2])
        env = environment(tmp_path, None if host == "--host" else url)
        done = run("complete", "--", "load", host, value, "", env=env)
    assert done.stdout == "plain\ta/b\n"
    assert asked == ["/v1/models"]


def test_an_unknown_shell_is_asked_for(tmp_path: Path) -> None:
    done = run("completion", env=environment(tmp_path, SHELL="/bin/csh"))
    assert done.returncode == 2
    assert "Your shell is csh. Name one: zsh, bash, fish." in done.stderr
