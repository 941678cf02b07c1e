"""A GGUF file of a few kilobytes, as llama.cpp writes it, and llama.cpp's results for it."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from tokenizers import pre_tokenizers

Array = np.ndarray[Any, Any]

HIDDEN, FEED_FORWARD, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
EPSILON, ROPE_BASE = 1e-3, 5000.0
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "Ġ t", "Ġt he", "1 2")
PIECES = (
    *SPECIAL,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": FEED_FORWARD,
    "llama.block_count": LAYERS,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": EPSILON,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.rope.freq_base": ROPE_BASE,
    "llama.context_length": 512,
    "llama.vocab_size": len(PIECES),
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": list(PIECES),
    "tokenizer.ggml.merges": list(MERGES),
    "tokenizer.ggml.token_type": [3 if piece in SPECIAL else 1 for piece in PIECES],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.chat_template": TEMPLATE,
}


class Tensor(NamedTuple):
    """A tensor of a GGUF file: its bytes, and the values they represent."""

    kind: int
    data: bytes
    values: Array


def f32(generator: np.random.Generator, *shape: int) -> Tensor:
    values = generator.normal(1, 0.1, shape).astype(np.float32)
    return Tensor(0, values.tobytes(), values)


def q4_1(generator: np.random.Generator, rows: int, columns: int) -> Tensor:
    """Return blocks of 32: scale, minimum, 16 bytes; the low halves come before the high ones."""
    blocks = rows * columns // 32
    scale = generator.uniform(0.005, 0.02, (blocks, 1)).astype(np.float16)
    minimum = generator.uniform(-0.2, -0.1, (blocks, 1)).astype(np.float16)
    packed = generator.integers(0, 256, (blocks, 16), np.uint8)
    steps = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
    values = steps * scale.astype(np.float32) + minimum.astype(np.float32)
    data = np.concatenate([scale.view(np.uint8), minimum.view(np.uint8), packed], axis=1)
    return Tensor(3, data.tobytes(), values.reshape(rows, columns))


def q8_0(generator: np.random.Generator, rows: int, columns: int) -> Tensor:
    """Return blocks of 32: scale, 32 signed bytes."""
    blocks = rows * columns // 32
    scale = generator.uniform(0.005, 0.01, (blocks, 1)).astype(np.float16)
    steps = generator.integers(-127, 128, (blocks, 32), np.int8)
    values = steps.astype(np.float32) * scale.astype(np.float32)
    data = np.concatenate([scale.view(np.uint8), steps.view(np.uint8)], axis=1)
    return Tensor(8, data.tobytes(), values.reshape(rows, columns))


def tensors() -> dict[str, Tensor]:
    """Return the tensors of a llama model of two layers with random weights."""
    generator = np.random.default_rng(7)
    found = {
        "token_embd.weight": q8_0(generator, len(PIECES), HIDDEN),
        "output_norm.weight": f32(generator, HIDDEN),
    }
    shapes = {
        "attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_gate": (FEED_FORWARD, HIDDEN),
        "ffn_up": (FEED_FORWARD, HIDDEN),
        "ffn_down": (HIDDEN, FEED_FORWARD),
    }
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            found[f"blk.{layer}.{norm}.weight"] = f32(generator, HIDDEN)
        for name, shape in shapes.items():
            found[f"blk.{layer}.{name}.weight"] = q4_1(generator, *shape)
    return found


def gguf_bytes(metadata: Mapping[str, Any], content: Mapping[str, Tensor]) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def typed(value: Any) -> tuple[int, bytes]:
        if isinstance(value, bool):
            return 7, struct.pack("<?", value)
        if isinstance(value, int):
            return 4, struct.pack("<I", value)
        if isinstance(value, float):
            return 6, struct.pack("<f", value)
        if isinstance(value, str):
            return 8, text(value)
        kind = typed(value[0])[0]
        items = b"".join(typed(item)[1] for item in value)
        return 9, struct.pack("<IQ", kind, len(value)) + items

    head = b"GGUF" + struct.pack("<IQQ", 3, len(content), len(metadata))
    for key, value in metadata.items():
        kind, data = typed(value)
        head += text(key) + struct.pack("<I", kind) + data
    body = b""
    for name, tensor in content.items():
        shape = tensor.values.shape[::-1]
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", tensor.kind, len(body))
        body += tensor.data + bytes(-len(tensor.data) % 32)
    return head + bytes(-len(head) % 32) + body


def logits(content: Mapping[str, Tensor], ids: list[int]) -> Array:
    """Compute in numpy what llama.cpp does: its rotary embedding rotates adjacent rows as pairs."""
    weights = {name.removesuffix(".weight"): tensor.values for name, tensor in content.items()}
    length = len(ids)
    angles = np.arange(length)[:, None] * ROPE_BASE ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def norm(x: Array, name: str) -> Array:
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON)
        return np.asarray(x / scale * weights[name])

    def heads(x: Array, name: str, count: int) -> Array:
        return np.asarray(x @ weights[name].T).reshape(length, count, HEAD_DIM)

    def rotated(x: Array) -> Array:
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = np.empty_like(x)
        turned[..., 0::2] = even * cosine - odd * sine
        turned[..., 1::2] = even * sine + odd * cosine
        return turned

    x = weights["token_embd"][ids].astype(np.float64)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        h = norm(x, block + "attn_norm")
        q = rotated(heads(h, block + "attn_q", HEADS))
        k = rotated(heads(h, block + "attn_k", KV_HEADS)).repeat(HEADS // KV_HEADS, 1)
        v = heads(h, block + "attn_v", KV_HEADS).repeat(HEADS // KV_HEADS, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(HEAD_DIM)
        scores = np.exp(scores + np.triu(np.full((length, length), -np.inf), 1))
        mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(length, -1) @ weights[block + "attn_output"].T
        h = norm(x, block + "ffn_norm")
        gate = h @ weights[block + "ffn_gate"].T
        up = h @ weights[block + "ffn_up"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[block + "ffn_down"].T
    return np.asarray(norm(x, "output_norm") @ weights["token_embd"].T)
