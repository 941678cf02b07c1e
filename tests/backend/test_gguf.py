"""Nothing is lost when a GGUF file is converted."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Tokenizer

from mlxproxy.demo import gguf
from tests.support.gguf_file import (
    EPSILON,
    FEED_FORWARD,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    METADATA,
    PIECES,
    ROPE_BASE,
    gguf_bytes,
    logits,
    tensors,
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "tiny.gguf").write_bytes(gguf_bytes(METADATA, tensors()))
    gguf.convert(folder / "tiny.gguf", folder / "tiny")
    return folder / "tiny"


def test_the_converted_model_computes_what_the_gguf_file_says(converted: Path) -> None:
    from mlx_lm import load

    model, *_ = load(str(converted))
    ids = [1, 70, 80, 90, 5, 261, 262, 2]
    computed = np.array(model(mx.array([ids]))[0])
    np.testing.assert_allclose(computed, logits(tensors(), ids), atol=1e-3)


def test_the_rows_of_each_attention_head_return_to_the_order_that_mlx_expects() -> None:
    heads, size = 3, 8
    rows = mx.arange(heads * size * 2).reshape(heads * size, 2)
    order = [
        head * size + row
        for head in range(heads)
        for row in [*range(0, size, 2), *range(1, size, 2)]
    ]
    assert gguf.unpermute(rows, heads).tolist() == [rows[row].tolist() for row in order]


def test_the_configuration_is_that_of_the_gguf_file(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    quantization = {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    }
    expected = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 512,
        "rms_norm_eps": pytest.approx(EPSILON),
        "rope_theta": ROPE_BASE,
        "vocab_size": len(PIECES),
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "quantization": quantization,
    }
    assert {key: config.get(key) for key in expected} == expected
    generation = json.loads((converted / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2


def test_an_untied_output_layer_is_kept() -> None:
    array = mx.zeros((4, 2))
    weights = gguf.llama_weights({"output.weight": array, "output.scales": array}, METADATA)
    assert set(weights) == {"lm_head.weight", "lm_head.scales"}
    assert gguf.layout(weights)["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("the the", ["t", "he", "Ġthe"]),
        ("12 the", ["1", "2", "Ġthe"]),  # the merge of 1 and 2 never applies
        ("  the\n", ["Ġ", "Ġthe", "Ċ"]),
        ("é½", ["Ã", "©", "Â", "½"]),
        ("<|im_start|>he<|im_end|>", ["<|im_start|>", "he", "<|im_end|>"]),
        ("<|im_end", ["<", "|", "i", "m", "_", "e", "n", "d"]),
    ],
)
def test_the_converted_tokenizer_splits_text_as_the_model_was_trained(
    converted: Path, text: str, pieces: list[str]
) -> None:
    from transformers import AutoTokenizer

    written = Tokenizer.from_file(str(converted / "tokenizer.json"))
    assert written.encode(text).tokens == pieces
    assert written.decode(written.encode(text).ids, skip_special_tokens=False) == text
    # What mlx-lm uses must not put rules of its own in place of the file's.
    assert AutoTokenizer.from_pretrained(converted).tokenize(text) == pieces


def test_the_chat_template_is_converted_too(converted: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n"
    assert tokenizer.eos_token_id == 2


@pytest.mark.parametrize("key", ["general.architecture", "tokenizer.ggml.pre"])
def test_a_gguf_file_of_another_architecture_or_tokenizer_is_rejected(
    tmp_path: Path, key: str
) -> None:
    source = tmp_path / "other.gguf"
    source.write_bytes(gguf_bytes({**METADATA, key: "other"}, tensors()))
    with pytest.raises(ValueError, match=f"{key} is 'other'"):
        gguf.convert(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()
