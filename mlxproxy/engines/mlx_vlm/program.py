"""The `mlx_vlm.server` program: an extra, so it may be missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from mlxproxy.backend.protocol import Examined
from mlxproxy.errors import LoadFailed

NAME: Final = "mlx_vlm.server"
EXAMINE_SECONDS: Final = 120.0  # a first start can take long
INSTALL: Final = "Run `make install-vision` (or `pip install mlx-vlm`) and restart mlxproxy."


def find(configured: Path | None) -> Path | None:
    """Return the `mlx_vlm.server` to run; None if there is none.

    Args:
        configured: the setting VLM_SERVER_BIN.
    """
    if configured is not None:
        return configured if configured.is_file() and os.access(configured, os.X_OK) else None
    beside = Path(sys.executable).parent / NAME
    if beside.is_file():
        return beside
    found = shutil.which(NAME)
    return Path(found).absolute() if found else None


def server_program(configured: Path | None) -> Path:
    """Return the `mlx_vlm.server` to run.

    Raises:
        LoadFailed: there is none.
    """
    program = find(configured)
    if program is not None:
        return program
    if configured is not None:
        raise LoadFailed(
            "The program that VLM_SERVER_BIN names is not an executable file. Set it to the path "
            "of mlx_vlm.server, or do not set it, to use the one next to the running Python."
        )
    raise LoadFailed(f"mlx-vlm is not installed. {INSTALL}")


def package_of(configured: Path | None) -> Path | None:
    """Return the mlx_vlm package that belongs to the program; None if it is not next to it."""
    program = find(configured)
    if program is None:
        return None
    found = sorted(program.resolve().parent.parent.glob("lib/python3*/site-packages/mlx_vlm"))
    return found[-1] if found else None


def examine(configured: Path | None) -> Examined:
    """Return whether the program can be found and started; that it is missing is no fault."""
    subject = "mlx-vlm"
    program = find(configured)
    if program is None and configured is None:
        return Examined(
            subject, "not installed: no models that see, embed or rank (`make install-vision`)"
        )
    if program is None:
        return Examined(
            subject,
            "VLM_SERVER_BIN does not name an executable file",
            "set it to the path of mlx_vlm.server, or do not set it",
        )
    python = program.parent / "python"
    update = f"{python if python.exists() else sys.executable} -m pip install --upgrade mlx-vlm"
    try:
        done = subprocess.run(
            [program, "--help"], capture_output=True, text=True, timeout=EXAMINE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Examined(subject, f"{program} cannot be run: {error}", update)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return Examined(subject, f"{program} fails to start: {words[-1]}", update)
    return Examined(subject, f"{_version(configured)}works ({program})")


def _version(configured: Path | None) -> str:
    package = package_of(configured)
    try:
        text = (package / "version.py").read_text() if package else ""
    except OSError:
        return ""
    found = re.search("""['"](.+)['"]""", text)
    return f"{found[1]} " if found else ""
