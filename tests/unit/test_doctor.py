"""What `mlxproxy doctor` makes of a running proxy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from mlxproxy.commands import doctor
from mlxproxy.engines.mlx_lm import program


def process(command: list[str], **environment: str) -> psutil.Process:
    seen = SimpleNamespace(cmdline=lambda: command, environ=lambda: environment)
    return cast(psutil.Process, seen)


def test_the_settings_of_a_running_proxy_are_its_flags_and_its_environment() -> None:
    proxy = process(
        ["python", "-m", "mlxproxy", "serve", "--proxy-port", "9000", "--models-root=/models"],
        MLXPROXY_PROXY_PORT="9001",
        MLXPROXY_INSTANCE_PATH="/nowhere",
        MLXPROXY_MAX_QUEUE="3",
    )
    found = doctor._settings_of(proxy)
    assert found is not None
    assert (found.proxy_port, found.max_queue) == (9000, 3)
    assert found.models_root == (Path("/models"),)
    assert found.instance_path == Path("/nowhere")


def hidden() -> Any:
    raise psutil.AccessDenied


@pytest.mark.parametrize(
    "proxy",
    [
        SimpleNamespace(cmdline=lambda: ["mlxproxy", "serve"], environ=hidden),
        SimpleNamespace(cmdline=hidden, environ=dict),
        process(["python", "something.py"]),
        process(["mlxproxy", "serve"], MLXPROXY_PROXY_PORT="http"),
    ],
)
def test_settings_that_cannot_be_told_are_not_guessed(proxy: psutil.Process) -> None:
    assert doctor._settings_of(proxy) is None


def test_a_backend_that_cannot_keep_to_schemas_is_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "lib" / "python3.12" / "site-packages" / "mlx_lm"
    package.mkdir(parents=True)
    script = tmp_path / "bin" / "mlx_lm.server"
    script.parent.mkdir()
    script.write_text("#!/usr/bin/python3\nfrom mlx_lm.server import main\nmain()\n")
    script.chmod(0o700)
    done = SimpleNamespace(returncode=0, stderr="")
    monkeypatch.setattr(program.subprocess, "run", lambda *_, **__: done)
    without = program.examine(script)
    assert without.fix is None  # text works
    assert "schemas and forced calls are rejected until you run" in without.sentence
    assert without.sentence.endswith("-m pip install llguidance")
    (package.parent / "llguidance").mkdir()
    assert "schemas" not in program.examine(script).sentence
