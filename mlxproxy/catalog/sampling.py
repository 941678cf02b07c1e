"""A model's own sampling parameters, from its `generation_config.json`.

`mlx_lm.server` reads only the end tokens from that file, and decodes greedily if a request has no
temperature; models that think then repeat themselves endlessly.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from mlxproxy.catalog.layout import GENERATION_CONFIG
from mlxproxy.files import MB, Unreadable, read_object

# A value outside these bounds is left out; in a request it would be rejected. A `top_k` of the
# vocabulary's size, for example, crashes the backend's generation thread at the first request.
_BOUNDS: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.1, 10.0),
}
DEFAULT_TEMPERATURE = 1.0  # transformers' default, for models that only say `do_sample`


def sampling(folder: str, files: Collection[str], vocab_size: int | None) -> dict[str, float]:
    """Return the fields for a request without sampling fields of its own; empty: greedy.

    Args:
        folder: the model's folder.
        files: the names of the files in it.
        vocab_size: the number of token ids; None if unknown, in which case `top_k` is left out.
    """
    if GENERATION_CONFIG not in files:
        return {}
    try:
        config = read_object(f"{folder}/{GENERATION_CONFIG}", MB)
    except Unreadable:
        return {}  # the backend ignores such a file, too
    return chosen(config, vocab_size)


def chosen(config: Mapping[str, Any], vocab_size: int | None) -> dict[str, float]:
    """Return the usable sampling fields of a generation config."""
    if config.get("do_sample") is False:
        return {}
    given = {name: config[name] for name in _BOUNDS if _is_number(config.get(name))}
    found = {
        name: float(value)
        for name, value in given.items()
        if _BOUNDS[name][0] <= value <= _BOUNDS[name][1]
    }
    if "temperature" not in found and config.get("do_sample") is True:
        found["temperature"] = DEFAULT_TEMPERATURE
    if not found.get("temperature"):
        return {}  # greedy: the other fields have no effect
    top_k = config.get("top_k")
    if vocab_size and type(top_k) is int and 0 < top_k < vocab_size:
        found["top_k"] = top_k
    return found


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
