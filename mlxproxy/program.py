"""The command that runs this program: as a program runs it, and as a person types it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

NAME = "mlxproxy"


def command() -> tuple[str, ...]:
    """Return the command that runs this installation from any folder, with an absolute path."""
    script = Path(sys.executable).parent / NAME
    if script.is_file():
        return (str(script),)
    return (sys.executable, "-m", NAME)


def is_on_path() -> bool:
    """Return whether the program's name alone runs this installation."""
    found = shutil.which(NAME)
    return found is not None and os.path.realpath(found) == os.path.realpath(command()[0])


def as_typed() -> str:
    """Return the shortest command that runs this installation from the current folder."""
    if is_on_path():
        return NAME
    program, *rest = command()
    here = os.path.join(os.getcwd(), "")
    if program.startswith(here):
        program = program.removeprefix(here)
    return shlex.join((program, *rest))
