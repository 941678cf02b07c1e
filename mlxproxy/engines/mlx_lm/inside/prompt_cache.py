"""Leave at least one token of a prompt to compute.

A prompt that is in the prompt cache to its last token (a text continued exactly where its answer
was cut) leaves the backend nothing to compute: its generation thread dies of it, and with it every
answer in flight. No look at a request can tell, as the cache's keys are tokens. Reported as
https://github.com/ml-explore/mlx-lm/issues/1215, and still so in mlx-lm 0.32.2; once it is mended
there, nothing here is ever called upon.
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
        Unexpected: its cache is another one.
    """
    gate.require(cache, NAMES)
    nearest = cache.LRUPromptCache.fetch_nearest_cache

    @functools.wraps(nearest)
    def fetch_nearest_cache(self: Any, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        found, rest = nearest(self, model, tokens)
        if rest or not tokens:
            return found, rest
        if not cache.can_trim_prompt_cache(found):  # one that only grows: computed anew
            return None, tokens
        cache.trim_prompt_cache(found, 1)
        return found, tokens[-1:]

    cache.LRUPromptCache.fetch_nearest_cache = fetch_nearest_cache
