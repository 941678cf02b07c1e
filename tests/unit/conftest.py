"""What holds for the fast tests: none of them starts a process."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that starts a process: it belongs into another folder."""

    def refuse(_: object, command: Any, *arguments: Any, **options: Any) -> None:
        pytest.fail(f"a test of tests/unit starts a process: {command}")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
