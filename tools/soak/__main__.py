"""The soak: clients do everything at once while backends die, and at the end the books balance.

    python -m tools.soak [--seconds N] [--seed N] [--clients N] [--max-loaded N] [--real]

Each phase starts a proxy, lets clients loose on it, waits for quiet and looks at what is left. The
backend is the scripted stand-in; with ``--real`` it is `mlx_lm.server` with tiny models. The exit
status is 1, and the logs are kept, if anything was wrong; each problem names its request's id.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tools.soak.soak import Soak

CLIENTS = 10


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="for all phases together")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000))
    parser.add_argument("--clients", type=int, help=f"default {CLIENTS}, 4 with --real")
    parser.add_argument("--max-loaded", type=int, default=1, help="models in memory at a time")
    parser.add_argument("--real", action="store_true", help="over mlx_lm.server and tiny models")
    options = parser.parse_args(arguments)
    options.clients = options.clients or (4 if options.real else CLIENTS)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak; return the exit status."""
    options = parsed(arguments)
    console = Console(width=None if sys.stdout.isatty() else 110)
    folder = Path(tempfile.mkdtemp(prefix="mlxproxy-soak-"))
    ledger = Soak(folder, options, console).run()
    ledger.print(console)
    if ledger.balanced:
        shutil.rmtree(folder, ignore_errors=True)
        console.print("The ledger balances.")
        return 0
    console.print(f"The ledger does not balance. The logs are in {folder}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
