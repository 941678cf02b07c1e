"""The memory that mlx-lm's key-value cache takes per token, according to a model's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mlxproxy.catalog.model import KVCache

Kind = Literal["full", "window", "none"]

# Modules that keep full keys and values although their attention has a compressed form.
_UNCOMPRESSED = frozenset({"deepseek_v2", "minicpm3", "youtu_llm"})
_MAX_LAYERS = 10_000


def kv_cache(config: Mapping[str, Any], module: str, *, windowed: bool) -> KVCache | None:
    """Return the cache that mlx-lm keeps for a model; None if the config does not tell.

    The fixed state of recurrent layers is left out: it is small compared with the weights.

    Args:
        config: the part of the config that describes the text model.
        module: the module of ``mlx_lm.models`` that runs it.
        windowed: that module keeps no more than the window of a sliding layer.
    """
    layers = number(config, "num_hidden_layers", "num_layers", "n_layers", "n_layer")
    heads = number(config, "num_attention_heads", "n_heads", "n_head")
    if layers is None or heads is None or layers > _MAX_LAYERS:
        return None
    width = number(config, "hidden_size", "n_embd", "d_model")
    head = number(config, "head_dim") or (width // heads if width else None)
    kv_heads = number(config, "num_key_value_heads", "num_kv_heads", "n_kv_heads") or heads
    kinds = _kinds(config, layers)
    kinds = kinds[: layers - (number(config, "num_kv_shared_layers") or 0)]

    full = _compressed(config, heads, module)
    if full is None:
        if head is None:
            return None
        k_equals_v = config.get("attention_k_eq_v") is True
        global_heads = number(config, "num_global_key_value_heads") if k_equals_v else None
        global_head = number(config, "global_head_dim") or head
        value = number(config, "v_head_dim") or global_head
        full = (global_heads or kv_heads) * (global_head + value)
    sliding_head = number(config, "swa_head_dim") or head or 0
    sliding_value = number(config, "swa_v_head_dim", "v_head_dim") or sliding_head
    sliding = (number(config, "swa_num_key_value_heads") or kv_heads) * (
        sliding_head + sliding_value
    )
    item = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
    window = number(
        config,
        "sliding_window",
        "sliding_window_size",
        "attention_chunk_size",
        "attention_window_size",
        "window_size",
    )
    if window is None or not windowed:
        kinds = ["full" if kind == "window" else kind for kind in kinds]
    return KVCache(
        per_token=kinds.count("full") * full * item,
        windowed_per_token=kinds.count("window") * sliding * item,
        window=window or 0,
    )


def _compressed(config: Mapping[str, Any], heads: int, module: str) -> int | None:
    """Return how many numbers multi-head latent attention keeps per token; None without it."""
    rank = number(config, "kv_lora_rank")
    if rank is None:
        return None
    rope = number(config, "qk_rope_head_dim") or 0
    if module in _UNCOMPRESSED:
        nope = number(config, "qk_nope_head_dim") or 0
        return heads * (nope + rope + (number(config, "v_head_dim") or nope))
    index = 2 * (number(config, "index_head_dim") or 0)
    attentions = 2 if module.startswith("longcat_flash") else 1  # in each layer
    return attentions * (rank + rope) + index


def _kinds(config: Mapping[str, Any], layers: int) -> list[Kind]:
    """Return what each layer keeps. Every model family declares it in its own way."""
    every = range(layers)
    types = config.get("layer_types")
    if not isinstance(types, list) or len(types) < layers:
        types = config.get("hybrid_override_pattern")  # a letter for each layer
    if isinstance(types, list | str) and len(types) >= layers:
        return [_kind(types[i]) for i in every]
    if interval := number(config, "full_attention_interval"):
        return ["none" if (i + 1) % interval else "full" for i in every]
    if period := number(config, "attn_layer_period"):
        offset = config.get("attn_layer_offset") or 0
        return ["full" if i % period == offset else "none" for i in every]
    if group := number(config, "layer_group_size"):
        last = layers // group * group
        return ["none" if (i + 1) % group and i < last else "full" for i in every]
    if isinstance(indices := config.get("full_attn_idxs"), list):
        return ["full" if i in indices else "none" for i in every]
    linear = config.get("linear_attn_config")
    if isinstance(linear, dict) and isinstance(linear.get("full_attn_layers"), list):
        return ["full" if i + 1 in linear["full_attn_layers"] else "none" for i in every]
    pattern = config.get("sliding_window_pattern")
    if isinstance(pattern, str) and pattern:  # such as LLLG
        return ["full" if pattern[i % len(pattern)] == "G" else "window" for i in every]
    if pattern := number(config, "sliding_window_pattern"):
        return ["window" if (i + 1) % pattern else "full" for i in every]
    if number(config, "attention_chunk_size"):
        return ["window" if (i + 1) % 4 else "full" for i in every]
    return ["full"] * layers


def _kind(name: object) -> Kind:
    if name in ("full_attention", "attention", "hybrid", "*"):
        return "full"
    return "window" if name in ("sliding_attention", "chunked_attention") else "none"


def number(config: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of these entries that is an integer above 0, of a sane size."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**40:
            return value
    return None
