"""Two corrections of the prompt cache in memory.

At least one token of a prompt is left to compute. A prompt that is in the prompt cache up to its
last token (a text continued exactly where its answer was cut off) leaves the backend nothing to
compute. That crashes its generation thread, and with it every answer in flight. It cannot be
detected from the request, as the cache's keys are tokens. This was reported as
https://github.com/ml-explore/mlx-lm/issues/1215 and is not fixed in mlx-lm 0.32.2; once it is, this
code has no effect any more.

What is put into the cache is computed at once. mlx-lm puts arrays into it that are still to be cut
out of those of the whole batch, and keep them in memory: an entry then takes a multiple of what it
counts. Besides, only the generation thread can compute them, while others may read them afterwards.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from . import gate

NAMES: gate.Names = {
    "LRUPromptCache.fetch_nearest_cache": ("self", "model", "tokens"),
    "LRUPromptCache.insert_cache": ("self", "model", "tokens", "prompt_cache"),
    "can_trim_prompt_cache": (),
    "trim_prompt_cache": (),
}


def arm(cache: Any) -> None:
    """Patch `mlx_lm.models.cache`.

    Raises:
        Unexpected: its cache is different.
    """
    gate.require(cache, NAMES)
    nearest, insert = cache.LRUPromptCache.fetch_nearest_cache, cache.LRUPromptCache.insert_cache

    @functools.wraps(nearest)
    def fetch_nearest_cache(self: Any, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        found, rest = nearest(self, model, tokens)
        if rest or not tokens:
            return found, rest
        if not cache.can_trim_prompt_cache(found):  # a cache that can only grow: compute it again
            return None, tokens
        cache.trim_prompt_cache(found, 1)
        return found, tokens[-1:]

    @functools.wraps(insert)
    def insert_cache(
        self: Any, model: Any, tokens: list[int], prompt_cache: list[Any], **named: Any
    ) -> None:
        with contextlib.suppress(Exception):  # then they are computed when they are needed
            settle(cache.mx, prompt_cache)
        insert(self, model, tokens, prompt_cache, **named)

    cache.LRUPromptCache.fetch_nearest_cache = fetch_nearest_cache
    cache.LRUPromptCache.insert_cache = insert_cache


def settle(mx: Any, prompt_cache: list[Any]) -> None:
    """Compute all arrays of a prompt's caches, each in memory of its own."""
    for cache in flat(prompt_cache):
        if getattr(cache, "caches", None) is None:
            cache.state = _each(cache.state, mx.contiguous, mx.array)
    mx.eval([cache.state for cache in prompt_cache])


def flat(prompt_cache: Iterable[Any]) -> Iterator[Any]:
    """Yield all caches, those inside others included."""
    for cache in prompt_cache:
        yield cache
        yield from flat(getattr(cache, "caches", None) or ())


def _each(state: Any, change: Callable[[Any], Any], array: type) -> Any:
    if isinstance(state, array):
        return change(state)
    if isinstance(state, (list, tuple)):
        return type(state)(_each(item, change, array) for item in state)
    return state
