"""Tiny real models with random weights, one for each kind of prompt cache that mlx-lm has.

The answers of `tiny_models` depend on the last token only. Those of these models depend on every
token before, so that they show whether a cache holds what it should. They need mlx to be built.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from tests.support import tiny_models

WINDOW = 512  # tokens
SLOW = -7.0  # the logarithm of the rate at which a recurrent state forgets
SPREAD = 4.0  # of the weights, compared with mlx's own: attention must matter

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, "tie_word_embeddings": False},
    "gemma3_text": {**_SIZES, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    "mamba2": {
        "num_heads": 4,
        "head_dim": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "state_size": 16,
        "num_hidden_layers": 2,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": False,
        "time_step_limit": [0.001, 100.0],
        "time_step_rank": "auto",
        "max_position_embeddings": 8192,
    },
    "qwen3_next": {
        **_SIZES,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [],
        "moe_intermediate_size": 64,
        "partial_rotary_factor": 0.5,
        "norm_topk_prob": True,
        "full_attention_interval": 2,
    },
    "llama4": {
        "text_config": {
            **_SIZES,
            "model_type": "llama4_text",
            "attention_bias": False,
            "attention_chunk_size": WINDOW,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 128,
            "num_experts_per_tok": 1,
            "num_local_experts": 2,
            "rope_scaling": None,
            "use_qk_norm": True,
        }
    },
}


def build(folder: Path, arch: str, seed: int = 1) -> Path:
    """Write a model folder and return it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    tiny_models.build(folder, thinking=False, words=50)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = {"model_type": arch, "architectures": ["Random"], **CONFIGS[arch]}
    part = config.get("text_config", config)
    part["vocab_size"] = config["vocab_size"] = vocabulary
    config["eos_token_id"] = vocabulary + 7  # never: an answer has as many tokens as asked for
    module = importlib.import_module(f"mlx_lm.models.{arch}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    for name, weight in tree_flatten(model.parameters()):
        if name.endswith("A_log"):
            weight[:] = SLOW
    weights = {
        name: (weight * SPREAD if weight.ndim > 1 else weight).astype(mx.float32)
        for name, weight in tree_flatten(model.parameters())
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
