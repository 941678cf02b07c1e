"""Convert SmolLM2's GGUF file into a folder that mlx-lm loads, without any loss.

mlx reads GGUF itself: a block of 32 weights arrives as one MLX quantisation group. What remains
to be converted is what llama.cpp and mlx-lm name or order differently.

Run it as ``python -m mlxproxy.demo.gguf SOURCE TARGET``. It imports mlx, which the proxy's own
process must never do, so nothing but a child process and the tests imports it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# The metadata for which the rules below hold; any other file would become a model that talks
# nonsense.
_EXPECTED = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
}
_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GROUP_SIZE = 32  # weights in a block of every GGUF type that mlx keeps quantised
_CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL


def convert(source: Path, target: Path) -> None:
    """Write the model in the GGUF file `source` as the new folder `target`.

    Raises:
        ValueError: if the file is not of the one kind that this module knows.
        KeyError: if the file lacks metadata or has a tensor without a counterpart.
    """
    loaded = mx.load(str(source), format="gguf", return_metadata=True)
    arrays, raw = cast("tuple[dict[str, mx.array], dict[str, Any]]", loaded)
    metadata = {key: _plain(value) for key, value in raw.items()}
    for key, expected in _EXPECTED.items():
        if metadata.get(key) != expected:
            raise ValueError(f"{source.name}: {key} is {metadata.get(key)!r}, not {expected!r}")

    weights = llama_weights(arrays, metadata)
    target.mkdir()
    mx.save_safetensors(str(target / "model.safetensors"), weights, metadata={"format": "mlx"})
    build_tokenizer(metadata).save(str(target / "tokenizer.json"))
    for name, content in {
        "config.json": llama_config(metadata) | layout(weights),
        "generation_config.json": _token_ids(metadata),
        "tokenizer_config.json": tokenizer_config(metadata),
    }.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (target / name).write_text(text, encoding="utf-8")


def llama_weights(
    arrays: Mapping[str, mx.array], metadata: Mapping[str, Any]
) -> dict[str, mx.array]:
    """Return the tensors under mlx-lm's names, in the row order of its rotary embedding."""
    permuted = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    weights = {}
    for name, array in arrays.items():
        *block, module, part = name.split(".")  # ("blk", "0", "attn_q", "scales")
        if module in permuted:
            array = unpermute(array, permuted[module])
        if mx.issubdtype(array.dtype, mx.floating):
            # Scales and biases are float16, norms float32. One type for all saves a conversion
            # in every product. float32 is exact, and the only type that is fast on a CPU:
            # measured on x86, float16 takes forty times as long.
            array = array.astype(mx.float32)
        path = f"model.layers.{block[1]}.{_BLOCK_MODULES[module]}" if block else _MODULES[module]
        weights[f"{path}.{part}"] = array
    return weights


def unpermute(rows: mx.array, heads: int) -> mx.array:
    """Undo llama.cpp's reordering of the rows of q and k (or of their scales and biases).

    Its rotary embedding rotates neighbouring rows as pairs; that of mlx-lm pairs row i with row
    i + half of the same head. So llama.cpp's converter interleaves the halves of each head.
    """
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def llama_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of config.json that comes from the GGUF's metadata."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "vocab_size": metadata["llama.vocab_size"],
        **_token_ids(metadata),
    }


def layout(weights: Mapping[str, mx.array]) -> dict[str, Any]:
    """Return the part of config.json that comes from the tensors: quantisation and tying."""
    bits = {
        name.removesuffix(".scales"): (
            weights[name.removesuffix("scales") + "weight"].shape[-1] // scales.shape[-1]
        )  # uint32 words in a group of 32 weights
        for name, scales in weights.items()
        if name.endswith(".scales")
    }
    default, _ = Counter(bits.values()).most_common(1)[0]
    exceptions = {
        module: {"group_size": _GROUP_SIZE, "bits": count}
        for module, count in bits.items()
        if count != default
    }
    quantization = {"group_size": _GROUP_SIZE, "bits": default, **exceptions}
    return {
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "torch_dtype": "float32",
        "quantization": quantization,
        # The name that transformers and LM Studio look for.
        "quantization_config": quantization,
    }


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer in the GGUF: byte-level BPE, with each digit a piece of its own."""
    pieces: list[str] = metadata["tokenizer.ggml.tokens"]
    merges: list[str] = metadata["tokenizer.ggml.merges"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[(left, right) for left, right in (merge.split(" ") for merge in merges)],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(
                add_prefix_space=metadata["tokenizer.ggml.add_space_prefix"], use_regex=True
            ),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds: list[int] = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(piece, special=True, normalized=False)
            for piece, kind in zip(pieces, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    return tokenizer


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json: the chat template, and which token has which role."""
    pieces: list[str] = metadata["tokenizer.ggml.tokens"]
    return {
        # Not GPT2Tokenizer, which transformers 5 builds with a pre-tokenizer of its own, so
        # that numbers would no longer be split into digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": pieces[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": pieces[metadata["tokenizer.ggml.eos_token_id"]],
        "pad_token": pieces[metadata["tokenizer.ggml.padding_token_id"]],
        "unk_token": pieces[metadata["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _plain(value: Any) -> Any:
    """Return metadata as Python values: mlx returns numbers, and lists of them, as arrays."""
    return value.tolist() if isinstance(value, mx.array) else value


def main() -> None:
    source, target = sys.argv[1:]
    # Reordering rows needs no GPU, and must work on machines without one.
    mx.set_default_device(mx.Device(mx.cpu))
    convert(Path(source), Path(target))


if __name__ == "__main__":
    main()
