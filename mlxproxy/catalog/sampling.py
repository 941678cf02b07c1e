"""How a model is to be sampled, as its own `generation_config.json` says.

`mlx_lm.server` reads only the end tokens from that file, and decodes greedily without a
temperature; models that think then repeat themselves without end.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from mlxproxy.files import MB, Unreadable, read_object

GENERATION_CONFIG = "generation_config.json"
# A value beyond these is left out, as one in a request would be refused: a `top_k` of the
# vocabulary's size, for one, ends the backend's generation thread with the first request.
_BOUNDS: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.1, 10.0),
}
DEFAULT_TEMPERATURE = 1.0  # transformers', for models that say `do_sample` alone


def sampling(folder: str, files: Collection[str], vocab_size: int | None) -> dict[str, float]:
    """Return the fields that a request without sampling of its own is given; empty: greedy.

    Args:
        folder: the model's folder.
        files: the names of the files in it.
        vocab_size: ids that the model has; None if unknown, in which case `top_k` is left out.
    """
    if GENERATION_CONFIG not in files:
        return {}
    try:
        config = read_object(f"{folder}/{GENERATION_CONFIG}", MB)
    except Unreadable:
        return {}  # the backend does without it, too
    return chosen(config, vocab_size)


def chosen(config: Mapping[str, Any], vocab_size: int | None) -> dict[str, float]:
    """Return what of a generation config can be used."""
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
        return {}  # greedy, for which the rest means nothing
    top_k = config.get("top_k")
    if vocab_size and type(top_k) is int and 0 < top_k < vocab_size:
        found["top_k"] = top_k
    return found


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
