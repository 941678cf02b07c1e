"""Prompt processing in pieces of about a second, however slow the machine is.

While a piece is read, no other answer gets a token, a disconnect is not noticed, and nobody can
tell a slow machine from one that hangs. mlx-lm's pieces have 2,048 tokens, which take a second on a
fast Mac, but minutes on a CPU. So the pace is measured, and the pieces are sized by it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from . import gate

PIECE_SECONDS = 1.0
FIRST_PIECE = 64  # tokens, until the pace is known
FIRST_PIECE_ALONE = 512  # the same if all pieces of one prompt have the same size
LEAST = 8
# A piece is at most this many times the largest piece so far: one lucky measurement must not lead
# to a long piece, and the deeper in a prompt, the longer each token takes.
GROWTH = 2

BATCH_ATTRIBUTES = (
    "prefill_step_size",
    "prefill_batch_size",
    "_currently_processing",
    "_unprocessed_sequences",
)


class Pace:
    """The measured number of prompt tokens read per second, and the piece size derived from it."""

    def __init__(self) -> None:
        self._rate: float | None = None
        self._largest = FIRST_PIECE

    def piece(self, most: int, prompts: int, first: int = FIRST_PIECE) -> int:
        """Return how many tokens of each prompt to read in one piece.

        Args:
            most: tokens at most (`--prefill-step-size`).
            prompts: how many prompts are read together.
            first: tokens to read as long as nothing has been measured.
        """
        wanted = float(first)
        if self._rate is not None:
            wanted = min(self._rate * PIECE_SECONDS, self._largest * GROWTH) / max(1, prompts)
        return min(max(LEAST, int(wanted)), most)

    def read(self, tokens: int, seconds: float) -> None:
        """Take a measurement: `tokens`, of all prompts together, were read in `seconds`."""
        if tokens < LEAST or seconds <= 0:
            return
        rate = tokens / seconds
        if self._rate is not None and rate > self._rate:
            rate = (self._rate + rate) / 2
        self._rate = rate
        self._largest = max(self._largest, tokens)


def arm(server: Any, generate: Any, clock: Callable[[], float] = time.monotonic) -> None:
    """Patch `mlx_lm.generate` and `mlx_lm.server`.

    Raises:
        Unexpected: prompts are read in another way there.
    """
    gate.require(
        generate,
        {"BatchGenerator.next": ("self",), "PromptProcessingBatch.prompt": ("self", "tokens")},
    )
    gate.require_attributes(generate, "BatchGenerator", BATCH_ATTRIBUTES)
    gate.require(server, {"stream_generate": ()})
    batch, prompts = generate.BatchGenerator, generate.PromptProcessingBatch
    advance, read, stream = batch.next, prompts.prompt, server.stream_generate
    pace = Pace()

    @functools.wraps(advance)
    def advance_once(this: Any) -> Any:
        most = this.__dict__.setdefault("_configured_step", this.prefill_step_size)
        waiting = len(this._currently_processing) + len(this._unprocessed_sequences)
        this.prefill_step_size = pace.piece(most, min(waiting, this.prefill_batch_size))
        return advance(this)

    @functools.wraps(read)
    def read_piece(this: Any, tokens: Any) -> Any:
        count, began = sum(map(len, tokens)), clock()
        result = read(this, tokens)
        if count:
            pace.read(count, clock() - began)
        return result

    @functools.wraps(stream)
    def stream_generate(*arguments: Any, **named: Any) -> Any:
        step, report = named.get("prefill_step_size"), named.get("prompt_progress_callback")
        if step is not None and report is not None:
            named["prefill_step_size"] = pace.piece(step, 1, FIRST_PIECE_ALONE)
            named["prompt_progress_callback"] = _measured(pace, report, clock)
        return stream(*arguments, **named)

    batch.next = advance_once
    prompts.prompt = read_piece
    server.stream_generate = stream_generate


def _measured(
    pace: Pace, report: Callable[..., Any], clock: Callable[[], float]
) -> Callable[..., Any]:
    before: tuple[int, float] | None = None

    def progress(processed: int, total: int) -> Any:
        nonlocal before
        now = clock()
        if before is not None and processed < total:
            pace.read(processed - before[0], now - before[1])
        before = processed, now
        return report(processed, total)

    return progress
