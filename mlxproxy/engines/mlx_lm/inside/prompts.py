"""Rejection of prompts that the model cannot take, before they reach the batch.

A prompt of no tokens (blank messages under a bare template, a `role_mapping` of empty texts)
crashes the generation thread with `Sequence … has an empty prompt`. A prompt beyond the model's
context is read for minutes, while everybody waits, for an answer that is noise. Only here are a
prompt's tokens known. Both cases become errors of that one request (mlx-lm 0.32.2 answers 404 with
the text).

The generation thread tokenizes, and everybody waits for it. So a very long text is counted
beforehand, on the thread of its own request, and only until it is too long.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from . import gate

PIECE_CHARACTERS = 1 << 16
SEAM_TOKENS = 8  # tokens that a cut between two pieces may add
LONG = 2  # characters per token of the context beyond which a text is counted beforehand

EMPTY = "the prompt has no tokens"
TOO_LONG = "the prompt has {tokens} tokens, and the model's context is {context}"


def arm(server: Any, context: int | None, counter: Counter | None = None) -> None:
    """Patch `mlx_lm.server`.

    Args:
        context: tokens that the model can take; None if that is not known.
        counter: counts long texts; None: one of its own.

    Raises:
        Unexpected: it tokenizes in another way.
    """
    names: gate.Names = {
        "ResponseGenerator._tokenize": ("self", "tokenizer", "request", "args"),
        "ResponseGenerator.generate": ("self", "request", "generation_args"),
    }
    gate.require(server, names)
    tokenize, generate = server.ResponseGenerator._tokenize, server.ResponseGenerator.generate
    counter = counter or Counter()

    @functools.wraps(generate)
    def count_and_generate(self: Any, request: Any, *arguments: Any, **named: Any) -> Any:
        tokenizer = self.model_provider.tokenizer
        if context is not None and (
            tokens := counter.beyond(tokenizer, texts_of(request), context)
        ):
            raise ValueError(TOO_LONG.format(tokens=f"about {tokens}", context=context))
        return generate(self, request, *arguments, **named)

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
    server.ResponseGenerator.generate = count_and_generate


def texts_of(request: Any) -> Iterator[str]:
    """Yield the texts that a prompt will certainly contain."""
    if isinstance(request.prompt, str):
        yield request.prompt
    for message in request.messages or ():
        content = message.get("content")
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text


class Counter:
    """Counts tokens with a tokenizer of its own: one that is shared by two threads may raise."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: Any = None
        self._own: Any = None

    def beyond(self, tokenizer: Any, texts: Iterable[str], context: int) -> int | None:
        """Return about how many tokens these texts have, if certainly more than the context.

        Only as many are counted as are needed for that; the rest is estimated. The result is None
        if they may fit, or if that cannot be determined.
        """
        whole = list(texts)
        characters = sum(map(len, whole))
        if characters <= LONG * context:
            return None
        counted = read = 0
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            own = self.copy_of(tokenizer)
            for text in whole:
                for start in range(0, len(text), PIECE_CHARACTERS):
                    piece = text[start : start + PIECE_CHARACTERS]
                    (encoded,) = own.encode_batch([piece], add_special_tokens=False)
                    counted += max(0, len(encoded.ids) - SEAM_TOKENS)
                    read += len(piece)
                    if counted > context:
                        return counted * characters // read
        return None

    def copy_of(self, tokenizer: Any) -> Any:
        """Return a copy of mlx-lm's tokenizer, for texts alone; several threads may use it.

        Raises:
            AttributeError: it is of a kind that cannot be copied.
        """
        with self._lock:
            if tokenizer is not self._of:
                fast = tokenizer._tokenizer.backend_tokenizer
                own = type(fast).from_str(fast.to_str())
                own.no_truncation()
                own.no_padding()
                self._own, self._of = own, tokenizer
            return self._own
