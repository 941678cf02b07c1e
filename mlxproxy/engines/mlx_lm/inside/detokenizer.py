"""Treatment of a token that has no text as an empty text.

If the model has more token ids than the tokenizer has texts (gaps, padding), a high temperature or
a `logit_bias` can select an id without a text. Then the streaming detokenizer raises: `list index
out of range`, `can only concatenate str (not "NoneType")`. That crashes the generation thread, and
with it every answer in flight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from . import gate

CLASSES = ("NaiveStreamingDetokenizer", "SPMStreamingDetokenizer", "BPEStreamingDetokenizer")
NO_TEXT = (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError)


def arm(utils: Any) -> None:
    """Patch `mlx_lm.tokenizer_utils`.

    Raises:
        Unexpected: its detokenizers are different.
    """
    for name in CLASSES:
        gate.require(
            utils,
            {f"{name}.add_token": ("self", "token"), f"{name}.finalize": ("self",)},
        )
    gate.require(utils, {"StreamingDetokenizer.last_segment": ()})
    for name in CLASSES:
        kind = getattr(utils, name)
        for method in ("add_token", "finalize"):
            setattr(kind, method, _without_raising(getattr(kind, method)))
    segment = utils.StreamingDetokenizer.last_segment.fget
    utils.StreamingDetokenizer.last_segment = property(
        lambda self: _without_raising(segment)(self) or ""
    )


def _without_raising(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(*arguments: Any) -> Any:
        try:
            return method(*arguments)
        except NO_TEXT:
            return None

    return wrapped
