"""The start says who can reach what, and what to try next."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mlxproxy import banner, program, settings
from mlxproxy.blueprints.auth import is_loopback


def given(folder: Path, **env: str) -> settings.Settings:
    environment = {f"MLXPROXY_{name}": value for name, value in env.items()}
    return settings.load({}, {"MLXPROXY_INSTANCE_PATH": str(folder / "instance"), **environment})


@pytest.mark.parametrize(
    ("host", "keys", "said"),
    [
        ("0.0.0.0", "", True),
        ("192.168.1.5", "", True),
        ("::", "", True),
        ("127.0.0.1", "", False),
        ("::1", "", False),
        ("0.0.0.0", "k", False),
    ],
)
def test_the_startup_message_warns_of_an_open_port_without_a_key(
    host: str, keys: str, said: bool, on_path: Path
) -> None:
    found = given(on_path, PROXY_HOST=host, API_KEY=keys)
    text = "\n".join(announced(found, is_private=is_loopback(host)))
    assert ("anyone on your network" in text) is said
    assert ("No API_KEY is set" in text) is said
    assert ("for this machine only" in text) is is_loopback(host)


def announced(found: settings.Settings, **facts: Any) -> list[str]:
    known = {"folders": [Path("/models")], "models": 1, "complete": True, "is_private": False}
    return list(banner.lines(found, keys=found.keys, **{**known, **facts}))


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation whose command is on PATH, the only thing there."""
    for name in ("python", "mlxproxy"):
        tool = tmp_path / "tool" / name
        tool.parent.mkdir(exist_ok=True)
        tool.touch(0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mlxproxy").symlink_to(tmp_path / "tool" / "mlxproxy")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "tool" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(settings, "_default_instance", lambda: tmp_path / "instance")
    return tmp_path


def test_the_last_line_is_one_command_to_try(on_path: Path) -> None:
    said = announced(given(on_path))
    assert said[0] == "mlxproxy is running at http://localhost:8080 (listening on 0.0.0.0)"
    assert said[1] == "Models: 1 in /models"
    assert said[2].startswith("No API_KEY is set")
    assert said[-2:] == ["To chat, type in another terminal:", "  mlxproxy chat"]


def test_the_command_to_try_finds_a_proxy_that_is_elsewhere(on_path: Path) -> None:
    assert (
        announced(given(on_path, PROXY_PORT="9000"))[-1] == "  mlxproxy chat --host localhost:9000"
    )
    found = given(on_path, PROXY_HOST="fd00::1", API_KEY="secret")
    assert announced(found)[-1] == "  mlxproxy chat --host '[fd00::1]:8080' --key YOUR_API_KEY"


def test_the_command_to_try_does_without_what_the_settings_file_says(on_path: Path) -> None:
    (on_path / "instance").mkdir()
    (on_path / "instance" / "config.py").write_text("PROXY_PORT = 9000\nAPI_KEY = 'secret'\n")
    assert announced(given(on_path))[-1] == "  mlxproxy chat"


def test_a_command_that_is_not_on_path_is_given_by_its_path(
    on_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(on_path)
    said = announced(given(on_path))
    assert said[-3] == "  tool/mlxproxy chat"
    assert said[-2].startswith("mlxproxy is not on your PATH")
    assert said[-1] == f"  alias mlxproxy={on_path}/tool/mlxproxy"
    monkeypatch.chdir(on_path / "bin")
    assert announced(given(on_path))[-3] == f"  {on_path}/tool/mlxproxy chat"


def test_without_the_script_python_runs_it(on_path: Path) -> None:
    (on_path / "tool" / "mlxproxy").unlink()
    assert program.command() == (str(on_path / "tool" / "python"), "-m", "mlxproxy")
    assert announced(given(on_path))[-1].endswith(f"'{on_path}/tool/python -m mlxproxy'")


def test_without_a_model_the_command_to_try_tells_why(on_path: Path) -> None:
    said = announced(given(on_path), models=0, folders=[])
    assert said[1] == "Models: none"
    assert said[-1] == "  mlxproxy ls --all"
    assert announced(given(on_path), models=0, complete=False)[-1] == "  mlxproxy chat"
