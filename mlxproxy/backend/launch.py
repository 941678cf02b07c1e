"""The start of a process, with the pipes that connect it to the proxy."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlxproxy.backend.processes import Mark
from mlxproxy.backend.protocol import Link

MAKE_VARIABLES = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "API_KEY", "API_KEY_FILE")


@dataclass(frozen=True)
class Launched:
    """A process that has been started.

    Attributes:
        argv: its command line.
        mark: what it carries in its environment.
        process: its handle.
        output: the read end of the pipe that receives its output.
        link: the channel to it; None if there is none.
    """

    argv: tuple[str, ...]
    mark: Mark
    process: subprocess.Popen[bytes]
    output: int
    link: Link | None


def launch(
    argv: Sequence[str], environment: Mapping[str, str], mark: Mark, link: Link | None
) -> Launched:
    """Start a process.

    Args:
        environment: variables besides the proxy's own.

    Raises:
        OSError: it cannot be executed; the link is closed.
    """
    read_end, write_end = os.pipe()
    try:
        process = subprocess.Popen(
            argv,
            stdin=link.fileno() if link else subprocess.DEVNULL,
            stdout=write_end,
            stderr=write_end,
            env={**_environment(), **environment, **mark.environment()},
            # A session of its own: the proxy handles Ctrl-C at the terminal, and a stop reaches
            # whatever the backend has started (`mlx.launch` starts processes).
            start_new_session=True,
        )
    except OSError:
        os.close(read_end)
        if link:
            link.close()
        raise
    finally:
        os.close(write_end)
    if link:
        link.open()
    return Launched(tuple(argv), mark, process, read_end, link)


def _environment() -> dict[str, str]:
    """Return the proxy's environment without its settings (which include the keys)."""
    return {
        name: value
        for name, value in os.environ.items()
        # `make run API_KEY=…` leaves the key in make's own variables, too.
        if not name.startswith("MLXPROXY_") and name not in MAKE_VARIABLES
    }
