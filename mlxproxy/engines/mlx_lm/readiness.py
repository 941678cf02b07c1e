"""Detection of when `mlx_lm.server` is ready, and of when it can no longer generate.

Its port is open and `/health` answers 200 before the model is loaded, so neither proves anything:
only a chat does. A load that fails, and a request that fails in the wrong place, crash only the
generation thread; the process lives on.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any, Final

from mlxproxy.backend.connection import parsed
from mlxproxy.backend.protocol import Fault, Probe, Stage

CHAT_PATH: Final = "/v1/chat/completions"
TEXT_PATH: Final = "/v1/completions"
FIRST_CHAT: Final[Mapping[str, Any]] = {
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 1,
}
# It is queued behind the load, then rejected.
INVALID_PROMPT: Final[Mapping[str, Any]] = {"prompt": None, "max_tokens": 1}

DIED: Final = "generation thread died"
# 0.32 logs the first and lives on with /health 503; the thread of 0.31 dies with a bare traceback.
_DEATH = re.compile(rb"generation thread died: ?(.*)|Exception in thread .*\(_generate\)")


def _health(status: int, _: bytes) -> Fault | None:
    return Fault("its generation thread has crashed", is_final=True) if status == 503 else None


HEALTH: Final = Probe("/health", _health)


def stages(model: str) -> tuple[Stage, ...]:
    """Return the steps to readiness.

    Args:
        model: the model's path as requests spell it: another spelling would load it a second time.
    """
    load = Probe(TEXT_PATH, _load_has_ended, {**INVALID_PROMPT, "model": model})
    chat = Probe(CHAT_PATH, _chat, {**FIRST_CHAT, "model": model})
    return Stage("loading", load), Stage("warming", chat)


def death_in(output: bytes) -> str | None:
    """Return why the generation thread has crashed, if the output shows that it has."""
    if b"generation thread died" not in output and b"(_generate)" not in output:
        return None
    match = _DEATH.search(output)
    if match is None:
        return None
    reason = (match[1] or b"").decode("utf-8", "replace").strip()
    return reason or "its generation thread crashed with a traceback"


def _load_has_ended(_: int, __: bytes) -> Fault | None:
    """Accept any answer: the load has ended, successfully or not."""
    return None


def _chat(status: int, answer: bytes) -> Fault | None:
    if status != 200:
        reason = f"its first chat failed: {_error_text(answer) or status}"
        return Fault(reason, is_final=DIED.encode() in answer)
    with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
        if parsed(answer)["choices"][0]["message"]["role"] == "assistant":
            return None
    return Fault("its answer to the first chat is incomplete")


def _error_text(answer: bytes) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(parsed(answer)["error"])
    return answer[:200].decode("utf-8", "replace").strip()
