"""Tiny real models: folders that mlx-lm loads in two seconds and whose answers are known.

The weights are made so that every token has one successor, which makes an answer predictable to
the letter, at any temperature up to 1: a model built with ``says="ada"`` answers
``ada0 ada1 ada2 …`` without an end, so that a test sees which model answered and whether a token
is missing. With thinking on it first thinks ``thought0 … thought7``. With tools it calls
:data:`TOOL_CALL`. The matrices of the layers are random and cost time, but add nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Array = np.ndarray[Any, Any]

THOUGHTS = 8
TOOL_CALL = {"name": "get_weather", "arguments": {"city": "Paris"}}
CALL_TEXT = json.dumps(TOOL_CALL)
CALL_PIECES = tuple(CALL_TEXT[start : start + 5] for start in range(0, len(CALL_TEXT), 5))

END = "<|im_end|>"
CALL = "<|call|>"  # the last token of a prompt that offers tools
SPECIAL = ("<|endoftext|>", "<|im_start|>", END, CALL)
TOOL_MARKERS = ("<tool_call>", "</tool_call>")  # kept in decoded text, as Qwen's are
THINK_MARKERS = ("<think>", "</think>")
NAMELESS = "\0"  # prefix of an id's name that the tokenizer must not have

CERTAINTY = 60.0  # the logit of a token's successor; the others stay below two thirds of it
HEAD = 16  # entries of an attention head; few, since attention over a long prompt is slow on a CPU
GROUP = 64  # weights that share a scale when quantized

CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\nTools:\\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {%- set tool_call = call.function or call %}
        {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
        {{- tool_call.arguments | tojson + '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
    {%- if tools and messages[-1].role != 'tool' %}{{- '<|call|>' }}{%- endif %}
{%- endif %}
"""

PLAIN_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def build(
    folder: Path,
    *,
    says: str = "w",
    words: int = 1000,
    length: int | None = None,
    thinking: bool = True,
    chat_template: str | None = None,
    arch: str = "qwen3",
    layers: int = 1,
    hidden: int = 64,
    heads: int = 1,
    max_context: int = 32768,
    quantize: int | None = None,
    shards: int = 1,
    seed: int = 0,
    certainty: float = CERTAINTY,
    call: Sequence[str] = CALL_PIECES,
    nameless: int = 0,
    config: Mapping[str, object] | None = None,
) -> Path:
    """Write a model folder and return it.

    Args:
        says: the word that its answers repeat, with numbers.
        words: how many numbers there are before they start again at 0.
        length: the number of words after which it ends its answer itself; None: never.
        thinking: whether its template has `enable_thinking`, and the model thinks.
        chat_template: a template in place of the built-in one.
        arch: ``qwen3`` or ``llama``.
        layers, hidden, heads: its size; a multiple of 64 for `hidden`, one of the number of
            machines for `heads`.
        quantize: 4 for 4-bit weights, None for 32-bit floats (the fastest on a CPU).
        shards: the number of files for the weights; more than one come with an index.
        certainty: the logit of a token's successor; 0 makes every token equally likely.
        call: the tokens of its tool call, all different.
        nameless: the number of token ids, from 256 on, that the tokenizer has no text for.
        config: further entries of config.json, which override the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, successor = _chain(says, words, length, thinking, call, nameless)
    if chat_template is None:
        chat_template = CHAT_TEMPLATE if thinking else PLAIN_TEMPLATE
    _write_tokenizer(folder, vocabulary, max_context, chat_template)

    settings: dict[str, object] = {
        "architectures": [{"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[arch]],
        "model_type": arch,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": HEAD,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": max_context,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": vocabulary.index(END),
    }
    weights = _weights(
        successor,
        arch=arch,
        layers=layers,
        hidden=hidden,
        heads=heads,
        seed=seed,
        certainty=certainty,
    )
    if quantize is not None:
        settings["quantization"] = {"group_size": GROUP, "bits": quantize}
        weights = _quantize(weights, quantize)
    _write_json(folder / "config.json", {**settings, **(config or {})})
    _write_weights(folder, weights, shards)
    return folder


def build_slow(folder: Path, **options: Any) -> Path:
    """Build a model of many layers: about 25 tokens/s on two cores."""
    return build(folder, **{"layers": 24, **options})


def long_prompt(tokens: int) -> str:
    """Return a text of that many tokens (one per byte), which takes long to read.

    The time grows with the square of the length and with the layers but one (a model of one layer
    reads immediately). On two cores, 6000 tokens take a model with ``layers=2`` about 4 s, in three
    steps with a keepalive each; 1000 tokens take the slow model just as long, in one silent step.
    """
    return ("The quick brown fox jumps over the lazy dog. " * (tokens // 45 + 1))[:tokens]


def answer(says: str, tokens: int, first: int = 0) -> str:
    """Return the answer of a model without thinking, limited to `tokens` (below `words`)."""
    return "".join(f"{says}{number} " for number in range(first, first + tokens))


def thoughts() -> str:
    """Return all thoughts of a thinking model; they take two more tokens, for their two ends."""
    return answer("thought", THOUGHTS)


# -- broken models


def break_model(folder: Path, how: str) -> Path:
    """Apply one of the :data:`DEFECTS` to a built model."""
    DEFECTS[how](folder)
    return folder


def _weights_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[-1]


def _truncate(folder: Path) -> None:
    file = _weights_file(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _lfs_pointer(folder: Path) -> None:
    _weights_file(folder).write_text(
        "version https://git-lfs.github.com/spec/v1\n"
        "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
        "size 123456789\n"
    )


def _drop_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()


def _truncate_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    text = file.read_text()
    file.write_text(text[: len(text) // 2])


def _drop_shard(folder: Path) -> None:
    if not (folder / "model.safetensors.index.json").exists():
        raise ValueError("build the model with shards=2: without an index no shard can be missed")
    _weights_file(folder).unlink()


def _drop(*names: str) -> Callable[[Path], None]:
    def drop(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return drop


def _set(file: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        _write_json(path, {**json.loads(path.read_text()), **values})

    return change


DEFECTS: Mapping[str, Callable[[Path], object]] = {
    "missing_config": _drop("config.json"),
    "truncated_weights": _truncate,
    "empty_weights": lambda folder: _weights_file(folder).write_bytes(b""),
    "lfs_pointer": _lfs_pointer,
    "missing_weights": _drop_weights,
    "missing_shard": _drop_shard,
    "unknown_architecture": _set("config.json", model_type="nonesuch"),
    "shape_mismatch": _set("config.json", intermediate_size=320),
    "bad_tokenizer": _truncate_tokenizer,
    "missing_tokenizer": _drop("tokenizer.json"),
    "no_tokenizer_files": _drop("tokenizer.json", "tokenizer_config.json"),
    "raising_template": _set(
        "tokenizer_config.json", chat_template="{{ raise_exception('roles must alternate') }}"
    ),
    "unparsable_template": _set("tokenizer_config.json", chat_template="{% if %}"),
}


# -- internals


def _chain(
    says: str, words: int, length: int | None, thinking: bool, call: Sequence[str], nameless: int
) -> tuple[list[str], list[int]]:
    """Return the vocabulary, and each token's successor by index.

    Words are vocabulary entries that no merge rule reaches: the model can say them in one token,
    while any prompt is read byte by byte.
    """
    byte_level = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline, space = "Ċ", "Ġ"
    said = [f"{says}{number}{space}" for number in range(words)]
    thought = [f"thought{number}{space}" for number in range(THOUGHTS)]
    pieces = [piece.replace(" ", space) for piece in call]
    # "\n\n" is the end of an empty block of thoughts, "\n" the end of any other prompt.
    gap = [f"{NAMELESS}{number}" for number in range(nameless)]
    vocabulary = [*byte_level, *gap, newline * 2, *said, *thought, *pieces, *SPECIAL, *TOOL_MARKERS]
    if thinking:
        vocabulary += THINK_MARKERS
    index = {token: number for number, token in enumerate(vocabulary)}
    if len(index) < len(vocabulary):
        raise ValueError(f"says={says!r} makes a token that the vocabulary has already")

    successor = [index[said[0]]] * len(vocabulary)

    def follow(*tokens: str) -> None:
        for token, following in pairwise(tokens):
            successor[index[token]] = index[following]

    follow(*said, said[0])
    if length is not None:
        follow(said[length - 1], END)
    if thinking:
        follow(newline, "<think>", *thought, "</think>", said[0])
    follow(CALL, "<tool_call>", *pieces, "</tool_call>", END)
    return vocabulary, successor


def _write_tokenizer(
    folder: Path, vocabulary: list[str], max_context: int, chat_template: str
) -> None:
    markers = [token for token in vocabulary if token in (*TOOL_MARKERS, *THINK_MARKERS)]
    plain = {
        token: number for number, token in enumerate(vocabulary) if not token.startswith(NAMELESS)
    }
    tokenizer = Tokenizer(models.BPE(vocab=plain, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in markers])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": "<|endoftext|>",
            "model_max_length": max_context,
            "clean_up_tokenization_spaces": False,
            "chat_template": chat_template,
        },
    )


def _weights(
    successor: list[int],
    *,
    arch: str,
    layers: int,
    hidden: int,
    heads: int,
    seed: int,
    certainty: float,
) -> dict[str, Array]:
    """Return weights that embed a token as its successor's direction, which `lm_head` reads.

    All directions have the entries 1 and -1, which the final normalisation leaves as they are;
    the layers add nothing because the matrices at their ends are zero.
    """
    random = np.random.default_rng(seed)
    real = np.float32

    def matrix(rows: int, columns: int) -> Array:
        return random.normal(0, columns**-0.5, (rows, columns)).astype(real)

    directions = random.choice(np.array([-1, 1], real), (len(successor), hidden))
    weights = {
        "model.embed_tokens.weight": directions[successor],
        "lm_head.weight": (directions * (certainty / hidden)).astype(real),
        "model.norm.weight": np.ones(hidden, real),
    }
    inner = heads * HEAD
    for number in range(layers):
        layer = {
            "input_layernorm": np.ones(hidden, real),
            "post_attention_layernorm": np.ones(hidden, real),
            "self_attn.q_proj": matrix(inner, hidden),
            "self_attn.k_proj": matrix(inner, hidden),
            "self_attn.v_proj": matrix(inner, hidden),
            "self_attn.o_proj": np.zeros((hidden, inner), real),
            "mlp.gate_proj": matrix(2 * hidden, hidden),
            "mlp.up_proj": matrix(2 * hidden, hidden),
            "mlp.down_proj": np.zeros((hidden, 2 * hidden), real),
        }
        if arch == "qwen3":
            layer |= {"self_attn.q_norm": np.ones(HEAD, real)}
            layer |= {"self_attn.k_norm": np.ones(HEAD, real)}
        weights |= {f"model.layers.{number}.{name}.weight": w for name, w in layer.items()}
    return weights


def _quantize(weights: Mapping[str, Array], bits: int) -> dict[str, Array]:
    """Quantize as mlx does, affinely: w = scale * q + bias per group, packed into 32-bit words."""
    levels, per_word = 2**bits - 1, 32 // bits
    packed: dict[str, Array] = {}
    for name, weight in weights.items():
        if weight.shape[-1] % GROUP or weight.ndim == 1:  # mlx-lm leaves these alone, too
            packed[name] = weight
            continue
        groups = weight.astype(np.float32).reshape(weight.shape[0], -1, GROUP)
        low = groups.min(-1, keepdims=True)
        scale = np.maximum((groups.max(-1, keepdims=True) - low) / levels, 1e-6)
        q = np.rint((groups - low) / scale).astype(np.uint32)
        q = q.reshape(weight.shape[0], -1, per_word) << np.arange(0, 32, bits, dtype=np.uint32)
        packed[name] = np.bitwise_or.reduce(q, -1)
        packed[name.replace(".weight", ".scales")] = scale[..., 0].astype(np.float32)
        packed[name.replace(".weight", ".biases")] = low[..., 0].astype(np.float32)
    return packed


def _write_weights(folder: Path, weights: dict[str, Array], shards: int) -> None:
    weights = {name: np.ascontiguousarray(weight) for name, weight in weights.items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "mlx"})
        return
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in sorted(weights)[number::shards]}
        save_file(part, folder / file, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2))
