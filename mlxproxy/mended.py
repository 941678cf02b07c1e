"""Runs `mlx_lm.server` with one defect of its prompt cache mended.

A prompt that is in the cache to its last token (a text continued exactly where its answer was cut)
leaves the backend nothing to compute: its generation thread dies of it, and with it every answer
in flight. No look at a request can tell, as the cache's keys are tokens. Reported as
https://github.com/ml-explore/mlx-lm/issues/1215, and still so in mlx-lm 0.32.2; once it is mended
there, nothing here is ever called upon, and this file can go.

Started by :mod:`mlxproxy.backend` with the backend's own Python, which need not have mlxproxy:
`python mended.py <mlx_lm.server> <its arguments>`.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any


def mend() -> None:
    """Makes the cache leave at least the prompt's last token to compute."""
    try:
        from mlx_lm.models import cache

        nearest = cache.LRUPromptCache.fetch_nearest_cache
    except (ImportError, AttributeError):  # another mlx-lm, with another cache
        return

    def fetch_nearest_cache(self: Any, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        found, rest = nearest(self, model, tokens)
        if rest or not tokens:
            return found, rest
        if not cache.can_trim_prompt_cache(found):  # one that only grows: computed anew
            return None, tokens
        cache.trim_prompt_cache(found, 1)
        return found, tokens[-1:]

    cache.LRUPromptCache.fetch_nearest_cache = fetch_nearest_cache  # type: ignore[method-assign]


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = os.path.dirname(sys.argv[0])  # as if the program had been started by itself
    mend()
    runpy.run_path(sys.argv[0], run_name="__main__")
