"""The clients, installed from PyPI and npm into a folder of their own."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PROGRAMS = Path(__file__).parent / "programs"

Place = Literal["python", "aider", "node"]
PYPI: dict[Place, tuple[str, ...]] = {
    "python": (
        *("openai", "anthropic", "ollama", "litellm"),
        *("langchain-openai", "langchain-anthropic", "langchain-ollama"),
        *("pydantic-ai-slim[openai,anthropic]", "llm", "llm-comply"),
    ),
    "aider": ("aider-chat",),  # it pins old versions of what others need
}
_MACHINE = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
_SYSTEM = f"{sys.platform}-{_MACHINE}"
CLAUDE = f"@anthropic-ai/claude-code-{_SYSTEM}"  # the program; the other package only fetches it
OPENCODE = f"opencode-{_SYSTEM}"
NPM = (
    *("openai", "@anthropic-ai/sdk", "ollama"),
    *("ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible", "@ai-sdk/anthropic"),
    *(CLAUDE, "@openai/codex", OPENCODE, "@mariozechner/pi-coding-agent"),
)


@dataclass(frozen=True)
class Installation:
    """The folder that the clients are installed into."""

    folder: Path

    def install(self) -> dict[Place, str]:
        """Install or update everything; return the last words of what failed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        failures: dict[Place, str] = {}
        for place, packages in PYPI.items():
            python = self.python(place)
            if not python.exists():
                _run([sys.executable, "-m", "venv", str(python.parents[1])])
            pip = [str(python), "-m", "pip", "install", "--quiet", "--upgrade"]
            if said := _run([*pip, "--disable-pip-version-check", *packages]):
                failures[place] = said
        node = self.folder / "node"
        node.mkdir(exist_ok=True)
        (node / "package.json").write_text('{"private": true}')
        npm = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"]
        if said := _run([*npm, "--prefix", str(node), *(f"{name}@latest" for name in NPM)]):
            failures["node"] = said
        return failures

    def put_programs(self) -> None:
        """Copy the programs: Node.js looks for packages in the folders above a program."""
        for place, pattern in (("node", "*.mjs"), ("python", "*.py")):
            folder = self.folder / place
            folder.mkdir(parents=True, exist_ok=True)
            for program in PROGRAMS.glob(pattern):
                shutil.copy(program, folder / program.name)

    def python(self, place: Place) -> Path:
        """Return the Python of an environment."""
        return self.folder / place / "bin" / "python"

    def program(self, place: Place, name: str) -> Path:
        """Return a client's own program."""
        if place != "node":
            return self.folder / place / "bin" / name
        modules = self.folder / "node" / "node_modules"
        binaries = {
            "claude": modules / CLAUDE / "claude",
            "opencode": modules / OPENCODE / "bin/opencode",
        }
        return binaries.get(name, modules / ".bin" / name)

    def version(self, place: Place, package: str) -> str | None:
        """Return the installed version of a package; None: it is not installed."""
        if place == "node":
            described = self.folder / "node" / "node_modules" / package / "package.json"
            return str(json.loads(described.read_text())["version"]) if described.exists() else None
        code = f"from importlib.metadata import version; print(version({package!r}))"
        done = subprocess.run(
            [self.python(place), "-c", code], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() or None


def _run(command: Sequence[str]) -> str:
    """Run a command; return the last line of its complaints if it fails, else nothing."""
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        return str(error)
    lines = done.stderr.strip().splitlines()
    return (lines[-1] if lines else f"exit status {done.returncode}") if done.returncode else ""
