"""A guarantee that at least one token of a prompt is left to compute.

A prompt that is in the prompt cache up to its last token (a text continued exactly where its answer
was cut off) leaves the backend nothing to compute. That crashes its generation thread, and with it
every answer in flight. It cannot be detected from the request, as the cache's keys are tokens. This
was reported as https://github.com/ml-explore/mlx-lm/issues/1215 and is not fixed in mlx-lm 0.32.2;
once it is, this code has no effect any more.
"""

from __future__ import annotations

import functools
from typing import Any

from . import gate

NAMES: gate.Names = {
    "LRUPromptCache.fetch_nearest_cache": ("self", "model", "tokens"),
    "can_trim_prompt_cache": (),
    "trim_prompt_cache": (),
}


def arm(cache: Any) -> None:
    """Patch `mlx_lm.models.cache`.

    Raises:
        Unexpected: its cache is different.
    """
    gate.require(cache, NAMES)
    nearest = cache.LRUPromptCache.fetch_nearest_cache

    @functools.wraps(nearest)
    def fetch_nearest_cache(self: Any, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        found, rest = nearest(self, model, tokens)
        if rest or not tokens:
            return found, rest
        if not cache.can_trim_prompt_cache(found):  # a cache that can only grow: compute it again
            return None, tokens
        cache.trim_prompt_cache(found, 1)
        return found, tokens[-1:]

    cache.LRUPromptCache.fetch_nearest_cache = fetch_nearest_cache
