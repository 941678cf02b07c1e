"""The two servers that every client meets: the real backend, and one that calls tools."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import scripted_server, tiny_models
from tests.support.proxy import Proxy
from tests.support.server_process import SERVER_BIN

# Agents begin with prompts of 100 kB, and a tiny model has a token for each byte.
CONTEXT = 1 << 18
WORDS = 12  # in an answer of a real model
SLOW_LOAD_SECONDS = 4.0  # more than the time in which an answer may still get another status
BROKEN = "the weights are broken"


def patiently(condition: Callable[[], Any], seconds: float) -> bool:
    """Return whether the condition comes true within that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@dataclass(frozen=True)
class Houses:
    """Two proxies: over `mlx_lm.server` with tiny models, and over a scripted stand-in for it.

    Both have the models `tiny/alpha` and `tiny/beta`, which say their names; of the stand-in's,
    `tiny/beta` takes its time to load, and `tiny/broken` cannot be loaded.
    """

    real: Proxy
    scripted: Proxy
    program: Path

    def script(self, **script: Any) -> None:
        """Set what the stand-in does from now on."""
        plain = {"events": 6, "interval": 0.0, "thoughts": 1, "calls": [], "error": None}
        scripted_server.change(self.program, **{**plain, **script})

    def requests(self) -> int:
        """Return how many chats have reached the stand-in so far."""
        return len(scripted_server.record(self.program, "request"))

    def generation_ended(self, earlier: int, seconds: float) -> bool:
        """Wait until each chat after the earlier ones has ended since its client left."""

        def ended() -> bool:
            entries = scripted_server.record(self.program)
            asked = [each for each in entries if each["event"] == "request"][earlier:]
            over = {
                (each["pid"], each["number"])
                for each in entries
                if each["event"] == "finished" and each["how"] == "client_gone"
            }
            return bool(asked) and any((each["pid"], each["number"]) in over for each in asked)

        return patiently(ended, seconds)

    def at_rest(self, seconds: float) -> bool:
        """Wait until the stand-in's proxy has no request in flight or in its queue."""

        def rests() -> bool:
            told = self.scripted.health()
            return not (told["in_flight"] or told["waiting"])

        return patiently(rests, seconds)


@contextlib.contextmanager
def houses(folder: Path) -> Iterator[Houses]:
    """Start both proxies in a folder; stop them at the end."""
    models = folder / "models"
    for name in ("alpha", "beta", "broken"):
        tiny_models.build(models / "tiny" / name, says=name, length=WORDS, max_context=CONTEXT)
    program = scripted_server.install(
        folder / "standin",
        models={"beta": {"load_seconds": SLOW_LOAD_SECONDS}, "broken": {"load_failure": BROKEN}},
    )
    real = Proxy(folder / "real", models, MLX_SERVER_BIN=SERVER_BIN)
    scripted = Proxy(folder / "scripted", models, MLX_SERVER_BIN=program)
    try:
        real.start(60)
        scripted.start(60)
        built = Houses(real, scripted, program)
        built.script()
        yield built
    finally:
        real.clean_up()
        scripted.clean_up()
