"""Sample without compiling anew for each value, and with a seed of a request's own.

mlx-lm compiles its samplers with `temperature`, `top_p` and `min_p` as constants: each new value is
compiled into a new kernel, for a second on a CPU, while all streams stand still. Given as arrays,
they are inputs of one kernel.

A `seed` in mlx-lm is the seed of the one generator that all share, so the request must wait until
it is alone. With a key of its own the request joins the others, and its text does not depend on
them. (The text differs from what the plain server gives for the same seed.)
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
    """Patch `mlx_lm.server`, whose samplers are made of `mlx_lm.sample_utils`.

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
        if asked.xtc_probability > 0:
            special = tokenizer.encode("\n") + list(tokenizer.eos_token_ids)
            filters.append(
                lambda x: utils.apply_xtc(x, asked.xtc_probability, asked.xtc_threshold, special)
            )
        if asked.top_k > 0:
            filters.append(lambda x: utils.apply_top_k(x, asked.top_k))
        draw = _seeded(mx, args.seed) if _joins(args) else utils.categorical_sampling

        def sampler(logprobs: Any) -> Any:
            for apply in filters:
                logprobs = apply(logprobs)
            return draw(logprobs, temperature)

        return sampler

    @functools.wraps(is_batchable)
    def _is_batchable(self: Any, args: Any) -> Any:
        seed = args.seed
        try:
            if _joins(args):
                args.seed = None
            return is_batchable(self, args)
        finally:
            args.seed = seed

    server._make_sampler = make_sampler
    server.ResponseGenerator._is_batchable = _is_batchable


def _joins(args: Any) -> bool:
    """Whether a seeded request needs no generator but its own (XTC draws from the shared one)."""
    return args.seed is not None and not args.sampling.xtc_probability > 0


def _seeded(mx: Any, seed: int) -> Callable[[Any, Any], Any]:
    key = mx.random.key(seed % (1 << KEY_BITS))

    def draw(logprobs: Any, temperature: Any) -> Any:
        nonlocal key
        key, now = mx.random.split(key)
        return mx.random.categorical(logprobs * (1.0 / temperature), key=now)

    return draw


def _min_p(mx: Any) -> Callable[[Any, Any], Any]:
    def apply(logprobs: Any, log_min_p: Any) -> Any:
        lowest = mx.max(logprobs, axis=-1, keepdims=True) + log_min_p
        return mx.where(logprobs < lowest, -float("inf"), logprobs)

    return apply
