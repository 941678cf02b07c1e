"""The checks: what a client is asked to do, on which server, and how its answer is judged."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.clients.clients import Client, Task
from tools.clients.houses import BROKEN, Houses, patiently
from tools.clients.installation import Installation

WORDS = 300  # characters of a failure that are told
LIMIT_SECONDS = 180.0  # for one run of a client
QUIET_SECONDS = 15.0  # after a client has left, until the server is at rest
LONG = {"events": 5000, "interval": 0.02}  # an answer that nobody waits for
TOO_LONG = "the prompt has 300000 tokens, and the model's context is 262144"  # the backend's words
TOLD_SO = "300000|300,000|[Pp]rompt is too long|context window"
CHECKS = ("chat", "stream", "tools", "error", "load", "leave")

# Clients may reach this machine only; where they have a switch of their own, it is set too.
ENVIRONMENT = {
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "NO_PROXY": "127.0.0.1,localhost",
    "DO_NOT_TRACK": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "PYDANTIC_AI_NO_TELEMETRY": "1",
    "TERM": "dumb",
    "LANG": "C.UTF-8",
}


class Wrong(Exception):
    """A check has failed; the text says how."""


@dataclass
class Run:
    """A client at work."""

    process: subprocess.Popen[bytes]
    output: Path
    is_program: bool

    def wait(self) -> None:
        """Wait for its end.

        Raises:
            Wrong: it does not end.
        """
        try:
            self.process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise Wrong(f"no end within {LIMIT_SECONDS:g} s") from None

    @property
    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def text(self) -> str:
        """Return what the answer was.

        Raises:
            Wrong: there was an error instead.
        """
        if not self.is_program:
            return _spoken(self.said)
        told = self.told()
        if "error" in told:
            raise Wrong(str(told["error"]))
        return str(told.get("text"))

    def told(self) -> dict[str, object]:
        """Return the JSON that a program has printed last.

        Raises:
            Wrong: there is none.
        """
        for line in reversed(self.said.splitlines()):
            with contextlib.suppress(ValueError):
                told = json.loads(line)
                if isinstance(told, dict):
                    return told
        raise Wrong(self.said[-300:] or "nothing was printed")


def _spoken(output: str) -> str:
    """Return the text in an agent's output; if that is JSON, all text in it, in order."""
    found: list[str] = []

    def collect(value: object) -> None:
        if isinstance(value, str):
            found.append(value)
        for inner in (
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        ):
            collect(inner)

    for line in output.splitlines():
        try:
            collect(json.loads(line))
        except ValueError:
            found.append(line)
    return re.sub(r"\s+", " ", " ".join(found))


@dataclass
class Checks:
    """All checks of one client."""

    client: Client
    houses: Houses
    installation: Installation

    def names(self) -> list[str]:
        """Return the checks that make sense for the client."""
        without = {"chat"} if not self.client.has_whole_answers else set()
        if self.client.calls is None:
            without.add("tools")
        return [name for name in CHECKS if name not in without]

    def run(self, name: str) -> str | None:
        """Run a check; return what is wrong, or None."""
        self.houses.script()
        try:
            getattr(self, f"_{name}")()
        except Wrong as wrong:
            said = self.client.known.get(name)
            return said or re.sub(r"\s+", " ", str(wrong))[:WORDS]
        finally:
            rests = self.houses.at_rest(QUIET_SECONDS)
        return None if rests else "the server does not come to rest"

    def _chat(self) -> None:
        with self._started("chat", "alpha", real=True) as run:
            run.wait()
            _require("alpha0 alpha1 alpha2", run)

    def _stream(self) -> None:
        with self._started("stream", "alpha", real=True) as run:
            run.wait()
            _require("alpha0 alpha1 alpha2", run)
            pieces = run.told().get("pieces") if run.is_program else None
            if isinstance(pieces, int) and pieces < 3:
                raise Wrong(f"the stream came in {pieces} pieces")

    def _tools(self) -> None:
        self.houses.script(calls=self.client.calls)
        with self._started("tools", "alpha") as run:
            run.wait()
            said = ".*?".join(("The tool said:", *map(re.escape, self.client.result)))
            if not re.search(said, run.text()):
                raise Wrong(f"the results do not come back: {run.said[-300:]}")

    def _error(self) -> None:
        # The prompt is too long for the model.
        self.houses.scripted.load("tiny/alpha")
        self.houses.script(error=TOO_LONG)
        with self._started("error", "alpha") as run:
            run.wait()
            if not re.search(TOLD_SO, run.said):
                raise Wrong(f"the reason is not told: {run.said[-300:]}")
        if not self.client.is_launched:  # there, a model that cannot be loaded is told before
            self.houses.script()
            with self._started("error", "broken") as run:
                run.wait()
                if BROKEN not in run.said:
                    raise Wrong(f"the reason is not told: {run.said[-300:]}")

    def _load(self) -> None:
        self.houses.scripted.load("tiny/alpha")
        with self._started("load", "beta") as run:
            run.wait()
            _require("beta1 beta2", run)

    def _leave(self) -> None:
        self.houses.scripted.load("tiny/alpha")
        self.houses.script(**LONG)
        earlier = self.houses.requests()
        with self._started("leave", "alpha") as run:
            if run.is_program:
                run.wait()
                _require("alpha1", run)
            else:
                if not patiently(lambda: self.houses.requests() > earlier, 60):
                    raise Wrong("no request came")
                patiently(lambda: run.process.poll() is not None, 1.0)
                os.killpg(run.process.pid, signal.SIGINT)
                if not patiently(lambda: run.process.poll() is not None, 10):
                    os.killpg(run.process.pid, signal.SIGTERM)
        if not self.houses.generation_ended(earlier, QUIET_SECONDS):
            raise Wrong("the generation goes on")

    @contextlib.contextmanager
    def _started(self, check: str, model: str, real: bool = False) -> Iterator[Run]:
        """Start the client in a folder of its own; end what is left of it."""
        proxy = self.houses.real if real else self.houses.scripted
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            home, work = Path(folder) / "home", Path(folder) / "work"
            home.mkdir()
            work.mkdir()
            task = Task(check, proxy.url, f"tiny/{model}", home, self.installation)
            command = self.client.command(task)
            own = {"HOME": str(home), "PATH": os.environ["PATH"], "CODEX_HOME": str(home / "codex")}
            (home / "codex").mkdir()
            output = Path(folder) / "output"
            with output.open("wb") as file:
                process = subprocess.Popen(
                    [str(word) for word in command.words],
                    cwd=work,
                    env={**ENVIRONMENT, **_kept(), **own, **command.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            try:
                yield Run(process, output, self.client.is_program)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _kept() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}


def _require(words: str, run: Run) -> None:
    if words not in re.sub(r"\s+", " ", run.text()):
        raise Wrong(f"expected “{words}”: {run.said[-300:]}")
