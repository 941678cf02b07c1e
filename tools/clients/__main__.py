"""Drive real clients, unmodified, against a real proxy; the results go into docs/clients.md.

    python -m tools.clients [NAME …] [--no-install]

The clients are installed into build/clients, from PyPI and npm. Each of them then asks a proxy
over `mlx_lm.server` with tiny models for a whole answer and a stream, and one over a scripted
stand-in, which answers as a capable model would, for calls of its tools, an error, a model that
has to be loaded, and an answer in the middle of which it leaves. With names, only the clients
whose names contain one of them are tried, and the others keep their last results. On Linux, the
clients run in a network of their own, with this machine's loopback and nothing else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tools.clients.checks import Checks
from tools.clients.clients import CLIENTS, Client
from tools.clients.compliance import PACKAGE, compliance
from tools.clients.houses import Houses, houses
from tools.clients.installation import Installation
from tools.clients.table import Results
from tools.reference import put

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "clients.md"
ALONE = "MLXPROXY_CLIENTS_ALONE"  # set in the process that has no network


def main(arguments: Sequence[str] | None = None) -> int:
    """Install and try the clients; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.clients",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--no-install", action="store_true", help="use what is installed")
    options = parser.parse_args(arguments)
    installation = Installation(ROOT / "build" / "clients")
    if not options.no_install:
        for place, reason in installation.install().items():
            print(f"{place}: {reason}", file=sys.stderr)
    installation.put_programs()
    if ALONE not in os.environ and (without := _without_network()):
        command = [*without, sys.executable, "-m", "tools.clients", "--no-install", *options.names]
        return subprocess.run(command, env={**os.environ, ALONE: "1"}, check=False).returncode
    results, passed = Results(installation.folder / "results.json"), True
    temporary = tempfile.TemporaryDirectory(prefix="mlxproxy-clients-")
    with temporary as folder, houses(Path(folder)) as both:
        for client in CLIENTS:
            if _is_chosen(client.name, options.names):
                version, outcomes = _tried(client, installation, both)
                results.note(client, version, outcomes)
                passed = passed and not any(outcomes.values())
        if _is_chosen(PACKAGE, options.names):
            results.note_more(list(compliance(both, installation)), _system())
    DOCUMENT.write_text(put(DOCUMENT.read_text(), "clients", results.table()))
    return not passed


def _is_chosen(name: str, names: Sequence[str]) -> bool:
    return not names or any(each.casefold() in name.casefold() for each in names)


def _tried(
    client: Client, installation: Installation, both: Houses
) -> tuple[str | None, dict[str, str | None]]:
    """Run all checks of a client; return its version and, for each check, what is wrong."""
    version = installation.version(client.place, client.package)
    checks = Checks(client, both, installation)
    outcomes: dict[str, str | None] = {}
    for name in checks.names() if version else ():
        begun = time.monotonic()
        outcomes[name] = checks.run(name)
        said = f"{client.name:22} {client.api:10} {name:7} {time.monotonic() - begun:5.1f} s"
        print(f"{said}  {outcomes[name] or 'ok'}", flush=True)
    return version, outcomes


def _without_network() -> list[str]:
    """Return the words that run a command with the loopback only; none if that is not possible."""
    words = [
        "unshare",
        "--net",
        "--map-root-user",
        "sh",
        "-c",
        'ip link set lo up && exec "$@"',
        "sh",
    ]
    if not shutil.which("unshare"):
        return []
    done = subprocess.run([*words, "true"], capture_output=True, check=False)
    return [] if done.returncode else words


def _system() -> str:
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=False)
    python = ".".join(map(str, sys.version_info[:3]))
    alone = ", without a network" if ALONE in os.environ else ""
    return (
        f"Tried with `make clients` on {time.strftime('%Y-%m-%d')}, with Python {python} and "
        f"Node.js {node.stdout.strip().removeprefix('v')}{alone}."
    )


if __name__ == "__main__":
    sys.exit(main())
