"""Detection of when `mlx_vlm.server` is ready.

Its port opens once the model is loaded, and a load of a model that chats ends the process if it
fails. One that embeds or ranks only leaves a line in the log, so all are proved by an answer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any, Final

from mlxproxy.backend.connection import parsed
from mlxproxy.backend.protocol import Fault, Probe, Stage

CHAT_PATH: Final = "/v1/chat/completions"
EMBED_PATH: Final = "/v1/embeddings"
RANK_PATH: Final = "/v1/rerank"
FIRST_CHAT: Final[Mapping[str, Any]] = {
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 1,
    "temperature": 0.0,
    "context_management": [],
}


def health(authorization: str) -> Probe:
    """Return the probe for a process that serves: its event loop has to answer."""
    return Probe("/health", lambda status, _: None, authorization=authorization)


def chat(model: str, authorization: str) -> Stage:
    """Return the step in which a model that chats answers for the first time.

    Args:
        model: the model's path as requests spell it: another spelling would load it anew.
    """
    body = {**FIRST_CHAT, "model": model}
    return Stage("warming", Probe(CHAT_PATH, _chat, body, authorization=authorization))


def _chat(status: int, answer: bytes) -> Fault | None:
    if status != 200:
        return Fault(f"its first chat failed: {error_text(answer) or status}")
    with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
        if parsed(answer)["choices"][0]["message"]["role"] == "assistant":
            return None
    return Fault("its answer to the first chat is incomplete")


def embed(model: str, authorization: str) -> Stage:
    """Return the step in which an embedding model reads its first text."""
    body = {"model": model, "input": "Hi"}
    return Stage("warming", Probe(EMBED_PATH, _embed, body, authorization=authorization))


def rank(model: str, authorization: str) -> Stage:
    """Return the step in which a reranker reads its first pair of texts."""
    body = {"model": model, "query": "Hi", "documents": ["Hi"]}
    return Stage("warming", Probe(RANK_PATH, _rank, body, authorization=authorization))


def _embed(status: int, answer: bytes) -> Fault | None:
    if status != 200:
        return Fault(f"its first embedding failed: {error_text(answer) or status}")
    with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
        if math.isfinite(sum(parsed(answer)["data"][0]["embedding"])):
            return None
    return Fault("its first embedding is not one")


def _rank(status: int, answer: bytes) -> Fault | None:
    if status != 200:
        return Fault(f"its first ranking failed: {error_text(answer) or status}")
    with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
        if math.isfinite(parsed(answer)["results"][0]["relevance_score"]):
            return None
    return Fault("its first ranking is not one")


def error_text(answer: bytes) -> str:
    """Return what an error of the backend says."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(parsed(answer)["detail"])[:500]
    return answer[:200].decode("utf-8", "replace").strip()
