"""The `mlx_lm.server` program: where it is, how it is started, and which package it belongs to."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from mlxproxy.backend.protocol import Examined
from mlxproxy.engines.mlx_lm.package import Package
from mlxproxy.errors import LoadFailed

log = logging.getLogger("mlxproxy.engines.mlx_lm")

NAME = "mlx_lm.server"
INSIDE = Path(__file__).parent / "inside" / "start.py"
EXAMINE_SECONDS = 120.0  # a first start can take long
# The first line of a script that pip has made, or the first two if the path has a space.
_PYTHON = re.compile(
    rb"#! ?(?:/bin/sh\n'''exec' [\"']?)?(/[^\n\"']*/(?:python|pypy)[\w.]*)"
    rb"(?: ?\n|[\"']? \"\$0\" \"\$@\"\n)"
)


def server_program(configured: Path | None) -> Path:
    """Return the `mlx_lm.server` to run.

    Args:
        configured: the setting MLX_SERVER_BIN.

    Raises:
        LoadFailed: there is none.
    """
    if configured is not None:
        if configured.is_file() and os.access(configured, os.X_OK):
            return configured
        what = "is not executable" if configured.is_file() else "is not a file"
        log.error("MLX_SERVER_BIN = %s %s", configured, what)
        raise LoadFailed(
            f"The program that MLX_SERVER_BIN names {what}. Set it to the path of mlx_lm.server, "
            "or do not set it, to use the one next to the running Python."
        )
    beside = _beside_python()
    if beside.is_file():
        return beside
    found = shutil.which(NAME)
    if found is None:
        raise LoadFailed(
            "There is no mlx_lm.server next to the running Python or on PATH. Run `pip install "
            "mlx-lm`, or set MLX_SERVER_BIN."
        )
    return Path(found)


def program_on_path_alone() -> Path | None:
    """Return the program if only this shell's PATH leads to it, else None."""
    found = shutil.which(NAME)
    return Path(found).absolute() if found and not _beside_python().is_file() else None


def program_command(program: Path) -> list[str]:
    """Return the command that starts that `mlx_lm.server`.

    The script that pip makes is started from inside (`inside/`); any other wrapper is run as it is.
    """
    try:
        with program.open("rb") as file:
            script = file.read(2048)
    except OSError:
        return [str(program)]
    shebang = _PYTHON.match(script)
    if shebang is None or b"mlx_lm.server" not in script:
        return [str(program)]
    return [os.fsdecode(shebang[1]), str(INSIDE), str(program)]


def is_inside(command: list[str]) -> bool:
    """Return whether :func:`program_command` starts the program from inside."""
    return str(INSIDE) in command


def package_of(configured: Path | None) -> Path | None:
    """Return the mlx_lm package that belongs to the program; None if it is not next to it."""
    try:
        program = server_program(configured)
    except LoadFailed:
        return None
    found = sorted(program.resolve().parent.parent.glob("lib/python3*/site-packages/mlx_lm"))
    return found[-1] if found else None


def examine(configured: Path | None) -> Examined:
    """Return whether the program can be found and started."""
    subject = "mlx-lm"
    try:
        program = server_program(configured)
    except LoadFailed as error:
        return Examined(subject, error.message, f"{sys.executable} -m pip install mlx-lm")
    beside = program.parent / "python"
    install = f"{beside if beside.exists() else sys.executable} -m pip install"
    update = f"{install} --upgrade mlx-lm"
    command = program_command(program)
    try:
        done = subprocess.run(
            [*command, "--help"], capture_output=True, text=True, timeout=EXAMINE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Examined(subject, f"{program} cannot be run: {error}", update)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return Examined(subject, f"{program} fails to start: {words[-1]}", update)
    wrapper = "" if is_inside(command) else ", a wrapper: runs without mlxproxy's additions"
    lacks = ""
    package = package_of(configured)
    if is_inside(command) and package and not Package(package).keeps_to_schemas:
        lacks = f"; schemas and forced calls are rejected until you run {install} llguidance"
    return Examined(subject, f"{_version(configured)}works ({program}{wrapper}){lacks}")


def _version(configured: Path | None) -> str:
    package = package_of(configured)
    with contextlib.suppress(OSError):
        if package and (
            text := re.search("""['"](.+)['"]""", (package / "_version.py").read_text())
        ):
            return f"{text[1]} "
    return ""


def _beside_python() -> Path:
    return Path(sys.executable).parent / NAME
