"""Tiny models for `mlx_vlm.server`: one that sees, an encoder for embeddings, one that reranks.

The model that sees is one of `tiny_models` with eyes: its answers are as predictable as theirs, and
an image shows in the length of the prompt. The encoders have random weights.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.support import tiny_models

VISION_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
PATCH, MERGE, WIDTH, SIDE = 16, 2, 32, 4  # pixels, patches, hidden size, positions to a side
FIRST_ID = 256  # of the vision tokens: after the bytes

# As with many models that see, the contents are lists of parts.
_MACRO = """\
{%- macro said(content) %}
    {%- if content is string %}{{- content }}{%- else %}
        {%- for part in content or [] %}
            {%- if part.type in ('image', 'image_url') %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}{{- part.text }}{%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
"""
PLAIN_TEMPLATE, CHAT_TEMPLATE = (
    _MACRO + template.replace("(message.content or '')", "said(message.content)")
    for template in (tiny_models.PLAIN_TEMPLATE, tiny_models.CHAT_TEMPLATE)
)


def build(
    folder: Path,
    *,
    says: str = "eye",
    blind: bool = False,
    thinking: bool = False,
    **options: Any,
) -> Path:
    """Write a model that sees (`qwen3_vl`), and return its folder.

    Args:
        blind: leave the weights of its eyes out, as conversions for text do.
        thinking: whether it can think; its template then takes tools, too.
        options: for `tiny_models.build`.
    """
    tiny_models.build(
        folder,
        says=says,
        thinking=thinking,
        nameless=len(VISION_TOKENS),
        **{"chat_template": CHAT_TEMPLATE if thinking else PLAIN_TEMPLATE, **options},
    )
    _name_vision_tokens(folder)
    text = json.loads((folder / "config.json").read_text())
    text |= {"model_type": "qwen3_vl_text", "rope_scaling": _ropes()}
    del text["architectures"]
    start, image, end, video = range(FIRST_ID, FIRST_ID + len(VISION_TOKENS))
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": text,
        "vision_config": _vision_config(text["hidden_size"]),
        "image_token_id": image,
        "video_token_id": video,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "vocab_size": text["vocab_size"],
        "eos_token_id": text["eos_token_id"],
        "tie_word_embeddings": False,
    }
    _write(folder / "config.json", config)
    _write(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "patch_size": PATCH,
            "merge_size": MERGE,
            "temporal_patch_size": 2,
            "min_pixels": 1024,
            "max_pixels": 65536,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
    )
    file = folder / "model.safetensors"
    weights = {f"language_model.{name}": weight for name, weight in load_file(file).items()}
    if not blind:
        weights |= _eyes(text["hidden_size"])
    save_file(weights, file, metadata={"format": "mlx"})
    return folder


def image(width: int = 64, height: int = 64, colour: str = "red", kind: str = "PNG") -> str:
    """Return the data URL of an image of one colour."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, kind)
    data = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{data}"


def _name_vision_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for number, token in enumerate(VISION_TOKENS, FIRST_ID):
        tokenizer["model"]["vocab"][token] = number
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        tokenizer["added_tokens"].append({"id": number, "content": token, "special": True, **plain})
    tokenizer["added_tokens"].sort(key=lambda added: added["id"])
    _write(path, tokenizer)


def _ropes() -> dict[str, Any]:
    return {"type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}


def _vision_config(hidden: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_vl",
        "depth": 1,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "out_hidden_size": hidden,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "num_position_embeddings": SIDE * SIDE,
        "deepstack_visual_indexes": [],
    }


def _eyes(hidden: int) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(7)
    merged = WIDTH * MERGE * MERGE
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj": (WIDTH, 2, PATCH, PATCH, 3),
        "blocks.0.attn.qkv": (3 * WIDTH, WIDTH),
        "blocks.0.attn.proj": (WIDTH, WIDTH),
        "blocks.0.mlp.linear_fc1": (2 * WIDTH, WIDTH),
        "blocks.0.mlp.linear_fc2": (WIDTH, 2 * WIDTH),
        "merger.linear_fc1": (merged, merged),
        "merger.linear_fc2": (hidden, merged),
    }
    weights = {}
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = random.normal(0, 0.05, shape).astype(np.float32)
        weights[f"{name}.bias"] = np.zeros(shape[0], np.float32)
    for name in ("blocks.0.norm1", "blocks.0.norm2", "merger.norm"):
        weights[f"{name}.weight"] = np.ones(WIDTH, np.float32)
        weights[f"{name}.bias"] = np.zeros(WIDTH, np.float32)
    weights["pos_embed.weight"] = random.normal(0, 0.05, (SIDE * SIDE, WIDTH)).astype(np.float32)
    return {f"vision_tower.{name}": weight for name, weight in weights.items()}


# -- encoders

WORDS = ("eating", "drinking", "food", "bread", "baby", "the", "a", "is", "quantum", "field")
ENCODER_WIDTH, HEADS, POSITIONS = 32, 2, 64


def build_encoder(
    folder: Path, *, reranks: bool = False, positions: int = POSITIONS, **config: Any
) -> Path:
    """Write an encoder (`bert`) and return its folder.

    Args:
        reranks: it scores pairs of texts, instead of embedding texts.
        config: further entries of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary += [*"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = list(dict.fromkeys(vocabulary))
    _write_word_pieces(folder, vocabulary, positions)
    name = "BertForSequenceClassification" if reranks else "BertModel"
    settings = {
        "architectures": [name],
        "model_type": "bert",
        "vocab_size": len(vocabulary),
        "hidden_size": ENCODER_WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "intermediate_size": 2 * ENCODER_WIDTH,
        "max_position_embeddings": positions,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    if reranks:
        settings |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    else:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        pooling = {"word_embedding_dimension": ENCODER_WIDTH, "pooling_mode_mean_tokens": True}
        _write(folder / "1_Pooling" / "config.json", pooling)
        _write(folder / "modules.json", _modules())
    _write(folder / "config.json", {**settings, **config})
    weights = _encoder_weights(len(vocabulary), positions, reranks)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _modules() -> list[Mapping[str, Any]]:
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    return [
        {
            "idx": number,
            "name": str(number),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, (path, kind) in enumerate(kinds)
    ]


def _write_word_pieces(folder: Path, vocabulary: list[str], positions: int) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    tokenizer.add_special_tokens(vocabulary[:5])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "BertTokenizer",
            "model_max_length": positions,
            "pad_token": "[PAD]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "unk_token": "[UNK]",
            "mask_token": "[MASK]",
        },
    )


def _encoder_weights(words: int, positions: int, reranks: bool) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(11)
    width = ENCODER_WIDTH
    prefix = "bert." if reranks else ""
    weights: dict[str, np.ndarray[Any, Any]] = {}

    def matrix(name: str, rows: int, columns: int, bias: bool = True) -> None:
        weights[f"{name}.weight"] = random.normal(0, 0.3, (rows, columns)).astype(np.float32)
        if bias:
            weights[f"{name}.bias"] = np.zeros(rows, np.float32)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = np.ones(width, np.float32)
        weights[f"{name}.bias"] = np.zeros(width, np.float32)

    embeddings, layer = f"{prefix}embeddings", f"{prefix}encoder.layer.0"
    matrix(f"{embeddings}.word_embeddings", words, width, bias=False)
    matrix(f"{embeddings}.position_embeddings", positions, width, bias=False)
    matrix(f"{embeddings}.token_type_embeddings", 2, width, bias=False)
    norm(f"{embeddings}.LayerNorm")
    for part in ("self.query", "self.key", "self.value", "output.dense"):
        matrix(f"{layer}.attention.{part}", width, width)
    norm(f"{layer}.attention.output.LayerNorm")
    matrix(f"{layer}.intermediate.dense", 2 * width, width)
    matrix(f"{layer}.output.dense", width, 2 * width)
    norm(f"{layer}.output.LayerNorm")
    matrix(f"{prefix}pooler.dense", width, width)
    if reranks:
        matrix("classifier", 1, width)
    return weights


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2))
