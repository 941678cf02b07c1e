"""`mlxproxy service`: what is written for launchd and systemd."""

from __future__ import annotations

import plistlib
import sys
from pathlib import Path

import pytest

from mlxproxy.commands import service


def test_the_launchd_file_is_a_property_list_with_everything_in_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXPROXY_API_KEY", "<secret & more>")
    monkeypatch.chdir(home)
    wanted = service.plan({"MODELS_ROOT": "models:/Volumes/SSD", "SHUTDOWN_TIMEOUT": "2m"})
    agent = plistlib.loads(service.of("darwin").render(wanted).encode())
    assert agent["Label"] == service.LABEL
    instance = str(home / "instance")
    assert agent["ProgramArguments"] == [
        *(sys.executable, "-m", "mlxproxy", "serve"),
        *("--instance-path", instance),
    ]
    assert agent["EnvironmentVariables"] == {
        "MLXPROXY_API_KEY": "<secret & more>",
        "MLXPROXY_MODELS_ROOT": f"{home}/models:/Volumes/SSD",
        "MLXPROXY_SHUTDOWN_TIMEOUT": "2m",
    }
    assert agent["RunAtLoad"] is True
    assert agent["KeepAlive"] is True
    assert agent["ExitTimeOut"] > 120 + 10
    for stream in ("StandardOutPath", "StandardErrorPath"):
        assert Path(agent[stream]).parent == home / "instance" / "logs"


def test_the_systemd_unit_restarts_and_allows_time_to_stop(home: Path) -> None:
    unit = service.of("linux").render(service.plan({"STOP_TIMEOUT": "100"}))
    settings = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line)
    assert settings["Restart"] == "always"
    assert settings["KillMode"] == "mixed"
    assert int(settings["TimeoutStopSec"]) > 30 + 100
    assert settings["WantedBy"] == "default.target"
    assert settings["ExecStart"].startswith(f'"{sys.executable}" "-m" "mlxproxy" "serve"')


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_the_service_file_names_the_server_program_found_on_path(
    platform: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service has another PATH."""
    program = home / "mlx_lm.server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(home))
    monkeypatch.setattr(sys, "executable", str(home / "venv" / "bin" / "python"))
    text = service.of(platform).render(service.plan({}))
    assert "MLXPROXY_MLX_SERVER_BIN" in text
    assert str(program) in text
