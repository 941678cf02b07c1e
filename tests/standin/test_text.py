"""What others have written is harmless wherever a running proxy shows it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from mlxproxy.text import harmless
from tests.support import scripted_server
from tests.support.hostile_text import CLEAN, NASTY
from tests.support.proxy import Proxy
from tests.support.pty import Terminal, environment, run
from tests.support.waiting import until


def test_control_characters_in_the_backends_log_reach_no_file_client_or_terminal(
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


def test_control_characters_in_an_older_log_are_removed_when_it_is_read(
    start: Callable[..., Proxy], tmp_path: Path
) -> None:
    log = tmp_path / "instance" / "logs" / "backend.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"{NASTY}\n")
    proxy = start(tmp_path, instance=tmp_path / "instance")
    assert proxy.get("/v1/logs?source=backend").text == f"{CLEAN}\n"
    done: subprocess.CompletedProcess[str] = run(
        "logs", "--backend", env=environment(tmp_path, proxy.url)
    )
    assert done.stdout == f"{CLEAN}\n"
