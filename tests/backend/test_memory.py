"""The estimate of a context is what mlx-lm really takes for it."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest

from mlxproxy.catalog.layout import Folder
from mlxproxy.engines.mlx_lm.inspection import Inspector
from mlxproxy.engines.mlx_lm.package import Package
from tests.support.model_folders import model

BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 100,
    "rope_theta": 1e4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}

WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 32}

COMPRESSED = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "rope_scaling": None,
    "num_key_value_heads": 4,
}

LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": BASE,
    "llama": {**BASE, **WINDOWS},
    "gemma2": {
        **BASE,
        "sliding_window": 32,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        **BASE,
        "sliding_window": 32,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 16,
    },
    "gemma4_text": {
        **BASE,
        **WINDOWS,
        "global_head_dim": 32,
        "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 100,
    },
    "gpt_oss": {**BASE, **WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "exaone4": {**BASE, "sliding_window": 32, "sliding_window_pattern": "LG", "rope_scaling": None},
    "deepseek_v3": {**BASE, **COMPRESSED},
    "deepseek_v2": {
        **BASE,
        **COMPRESSED,
        "rope_scaling": {"factor": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
    },
    "qwen3_5": {"text_config": {**BASE, **LINEAR, "model_type": "qwen3_5_text"}},
    "lfm2": {
        **BASE,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 64,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "mistral3": {
        "text_config": {
            **BASE,
            **WINDOWS,
            "model_type": "ministral3",
            "rope_parameters": {
                "rope_theta": 1e4,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 4096,
            },
        }
    },
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_estimate_of_a_context_is_what_mlx_lm_allocates(tmp_path: Path, kind: str) -> None:
    mx = importlib.import_module("mlx.core")
    prompt_cache = importlib.import_module("mlx_lm.models.cache").make_prompt_cache
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    config = {"model_type": kind, **CONFIGS[kind]}
    network = module.Model(module.ModelArgs.from_dict(copy.deepcopy(config)))
    cache = prompt_cache(network)
    tokens = 256  # what mlx-lm's caches grow by
    for _ in range(tokens // 32 - 1):
        mx.eval(network(mx.array([list(range(32))]), cache=cache))
    for _ in range(32):  # a window is only kept to while tokens come singly
        mx.eval(network(mx.array([[1]]), cache=cache))
    used = sum(it.nbytes for it in cache if "KVCache" in type(it).__name__)

    folder = model(tmp_path / "model", config=config)
    sizes = {it.name: it.stat().st_size for it in folder.iterdir()}
    estimated = Inspector(Package())(Folder(str(folder), "a/b", sizes, 0)).kv_cache
    assert estimated is not None
    assert estimated.bytes(tokens) == used
