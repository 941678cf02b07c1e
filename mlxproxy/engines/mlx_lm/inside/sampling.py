"""Sampling without recompilation for each value, and with a separate seed for each request.

mlx-lm compiles its samplers with `temperature`, `top_p` and `min_p` as constants. Each new value is
compiled into a new kernel, which takes a second on a CPU, while all streams stall. Passed as
arrays, they are inputs of one kernel.

In mlx-lm, a `seed` seeds the one generator that all requests share, so the request must wait until
it is alone. With a key of its own, the request joins the batch, and its text does not depend on the
others. (The text differs from what the plain server returns for the same seed.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from . import gate

KEY_BITS = 64

Sampler = Callable[[Any], Any]


def arm(server: Any, utils: Any, mx: Any) -> None:
    """Patch `mlx_lm.server`, whose samplers are built from `mlx_lm.sample_utils`.

    Raises:
        Unexpected: it samples in another way.
    """
    gate.require(
        server,
        {
            "_make_sampler": ("args", "tokenizer"),
            "SamplingArguments": (
                "temperature", "top_p", "top_k", "min_p", "xtc_probability", "xtc_threshold",
            ),
            "ResponseGenerator._is_batchable": ("self", "args"),
        },
    )  # fmt: skip
    for name in ("apply_top_p", "apply_top_k", "apply_xtc", "categorical_sampling"):
        gate.require(utils, {name: ()})
    is_batchable = server.ResponseGenerator._is_batchable
    min_p_filter = mx.compile(_min_p(mx))

    make = server._make_sampler

    @functools.wraps(make)
    def make_sampler(args: Any, tokenizer: Any) -> Sampler:
        asked = args.sampling
        if asked.temperature == 0:  # always the likeliest token
            greedy: Sampler = make(args, tokenizer)
            return greedy
        temperature = mx.array(asked.temperature)
        filters: list[Sampler] = []
        if 0 < asked.top_p < 1:
            top_p = mx.array(asked.top_p)
            filters.append(lambda x: utils.apply_top_p(x, top_p))
        if asked.min_p:
            log_min_p = mx.array(math.log(asked.min_p))
            filters.append(lambda x: min_p_filter(x, log_min_p))
        draws = None if args.seed is None else Draws(mx, args.seed)
        if asked.xtc_probability > 0:
            special = tokenizer.encode("\n") + list(tokenizer.eos_token_ids)
            filters.append(
                (lambda x: utils.apply_xtc(x, asked.xtc_probability, asked.xtc_threshold, special))
                if draws is None
                else lambda x: _seeded_xtc(mx, utils, draws, x, asked, special)
            )
        if asked.top_k > 0:
            filters.append(lambda x: utils.apply_top_k(x, asked.top_k))
        draw = utils.categorical_sampling if draws is None else draws.token

        def sampler(logprobs: Any) -> Any:
            for apply in filters:
                logprobs = apply(logprobs)
            return draw(logprobs, temperature)

        return sampler

    @functools.wraps(is_batchable)
    def _is_batchable(self: Any, args: Any) -> Any:
        seed = args.seed
        try:
            args.seed = None
            return is_batchable(self, args)
        finally:
            args.seed = seed

    server._make_sampler = make_sampler
    server.ResponseGenerator._is_batchable = _is_batchable


class Draws:
    """The random draws of one request, which depend only on its seed."""

    def __init__(self, mx: Any, seed: int) -> None:
        self._mx = mx
        self._key = mx.random.key(seed % (1 << KEY_BITS))

    def _next(self) -> Any:
        self._key, now = self._mx.random.split(self._key)
        return now

    def token(self, logprobs: Any, temperature: Any) -> Any:
        """Draw a token, as mlx-lm's `categorical_sampling` does."""
        return self._mx.random.categorical(logprobs * (1.0 / temperature), key=self._next())

    def uniform(self) -> Any:
        """Draw a number from 0 to 1."""
        return self._mx.random.uniform(0, 1, key=self._next())


def _seeded_xtc(mx: Any, utils: Any, draws: Draws, logits: Any, asked: Any, special: Any) -> Any:
    """Apply mlx-lm's XTC or not, depending on the request's own draw."""
    applied = utils.apply_xtc(logits, 1.0, asked.xtc_threshold, special)
    return mx.where(draws.uniform() > asked.xtc_probability, logits, applied)


def _min_p(mx: Any) -> Callable[[Any, Any], Any]:
    def apply(logprobs: Any, log_min_p: Any) -> Any:
        lowest = mx.max(logprobs, axis=-1, keepdims=True) + log_min_p
        return mx.where(logprobs < lowest, -float("inf"), logprobs)

    return apply
