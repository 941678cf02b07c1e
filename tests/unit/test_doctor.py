"""What `mlxproxy doctor` makes of a running proxy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from mlxproxy.commands import doctor


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
