"""Refuse prompts that the model cannot take, before they reach the batch.

A prompt of no tokens (blank messages under a bare template, a `role_mapping` of empty texts) ends
the generation thread with `Sequence … has an empty prompt`. A prompt beyond the model's context is
read for minutes, while everybody waits, for an answer that is noise. What a prompt's tokens are is
known here alone; both become errors of that one request (mlx-lm 0.32.2 answers 404 with the text).
"""

from __future__ import annotations

import functools
from typing import Any

from . import gate

EMPTY = "the prompt has no tokens"
TOO_LONG = "the prompt has {tokens} tokens, and the model's context is {context}"


def arm(server: Any, context: int | None) -> None:
    """Patch `mlx_lm.server`.

    Args:
        context: tokens that the model can take; None where it is not known.

    Raises:
        Unexpected: it tokenizes in another way.
    """
    gate.require(server, {"ResponseGenerator._tokenize": ("self", "tokenizer", "request", "args")})
    tokenize = server.ResponseGenerator._tokenize

    @functools.wraps(tokenize)
    def _tokenize(self: Any, tokenizer: Any, request: Any, args: Any) -> Any:
        result = tokenize(self, tokenizer, request, args)
        tokens = len(result[0])
        if not tokens:
            raise ValueError(EMPTY)
        if context is not None and tokens > context:
            raise ValueError(TOO_LONG.format(tokens=tokens, context=context))
        return result

    server.ResponseGenerator._tokenize = _tokenize
