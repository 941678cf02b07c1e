"""BERT in 64-bit numpy, from its paper: the reference for embeddings and rankings."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]


def embed(folder: Path, texts: Sequence[str]) -> tuple[Array, int]:
    """Return the mean of the last states of each text, of length 1, and the number of tokens."""
    model = _Bert(folder)
    found, count = [], 0
    for text in texts:
        states, tokens = model.states(text)
        mean = states.mean(0)
        found.append(mean / np.linalg.norm(mean))
        count += tokens
    return np.array(found), count


def rank(folder: Path, query: str, documents: Sequence[str]) -> list[float]:
    """Return the score of each document for a query: the sigmoid of the classifier's output."""
    model = _Bert(folder)
    found = []
    for document in documents:
        states, _ = model.states(query, document)
        pooled = np.tanh(model.linear("pooler.dense", states[0]))
        (logit,) = model.linear("classifier", pooled)
        found.append(1 / (1 + math.exp(-logit)))
    return found


class _Bert:
    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        self.weights = {
            name.removeprefix("bert."): weight.astype(np.float64)
            for name, weight in weights.items()
            if weight.dtype.kind == "f"
        }
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def linear(self, name: str, x: Array) -> Array:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Array) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["layer_norm_eps"])
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def states(self, *texts: str) -> tuple[Array, int]:
        encoding = self.tokenizer.encode(*texts)
        ids, types = encoding.ids, encoding.type_ids
        embeddings = {
            name: self.weights[f"embeddings.{name}_embeddings.weight"]
            for name in ("word", "position", "token_type")
        }
        x = embeddings["word"][ids] + embeddings["position"][: len(ids)]
        x = self.norm("embeddings.LayerNorm", x + embeddings["token_type"][types])
        for number in range(self.config["num_hidden_layers"]):
            x = self._layer(f"encoder.layer.{number}", x)
        return x, len(ids)

    def _layer(self, layer: str, x: Array) -> Array:
        heads = self.config["num_attention_heads"]
        q, k, v = (
            self.linear(f"{layer}.attention.self.{part}", x)
            .reshape(len(x), heads, -1)
            .transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = (shares @ v).transpose(1, 0, 2).reshape(len(x), -1)
        mixed = self.linear(f"{layer}.attention.output.dense", mixed)
        x = self.norm(f"{layer}.attention.output.LayerNorm", x + mixed)
        inner = self.linear(f"{layer}.intermediate.dense", x)
        erf = np.vectorize(math.erf)
        inner = inner * 0.5 * (1 + erf(inner / math.sqrt(2)))
        inner = self.linear(f"{layer}.output.dense", inner)
        return self.norm(f"{layer}.output.LayerNorm", x + inner)
