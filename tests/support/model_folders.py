"""Minimal model folders: the files that the catalogue reads, without a byte of weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from mlxproxy.catalog import Catalog
from mlxproxy.engines.mlx_lm.inspection import Inspector
from mlxproxy.engines.mlx_lm.package import Package

Tensors = Mapping[str, tuple[str, Sequence[int]]]

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
}
TENSORS: Tensors = {"model.embed_tokens.weight": ("BF16", [100, 64])}
BITS = {"U8": 8, "BF16": 16, "F16": 16, "F32": 32, "U32": 32, "I32": 32, "F8_E4M3": 8}


def model(
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    tensors: Tensors = TENSORS,
    template: str | None = None,
    tokens: Sequence[str] = (),
    shards: int = 1,
) -> Path:
    """Create a folder that looks loadable, and return it.

    Args:
        config: entries in addition to the usual ones; a value of None removes an entry.
        tensors: the type and the shape of each tensor, by name.
        template: its chat template.
        tokens: added to its vocabulary.
        shards: the number of files, which all contain the same tensors under different names.
    """
    folder.mkdir(parents=True)
    values = {**CONFIG, **(config or {})}
    write(folder / "config.json", {k: v for k, v in values.items() if v is not None})
    write(folder / "tokenizer.json", {"added_tokens": [{"content": token} for token in tokens]})
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    for number in range(1, shards + 1):
        shard = f"model-{number:05}-of-{shards:05}" if shards > 1 else "model"
        weights(folder / f"{shard}.safetensors", tensors)
    return folder


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def weights(path: Path, tensors: Tensors = TENSORS) -> Path:
    """Write a safetensors file whose data is a hole, and return it."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return raw_weights(path, json.dumps(header).encode(), data=end)


def raw_weights(path: Path, header: bytes, *, data: int = 0, length: int | None = None) -> Path:
    """Write a file with any header, which may give a wrong length, and return it."""
    start = (len(header) if length is None else length).to_bytes(8, "little") + header
    path.write_bytes(start)
    os.truncate(path, len(start) + data)
    return path


def hub_model(cache: Path, repository: str, revision: str = "abc123", **options: Any) -> Path:
    """Create a model as huggingface_hub stores it: links to blobs, under a revision."""
    home = cache / f"models--{repository.replace('/', '--')}"
    snapshot = model(home / "snapshots" / revision, **options)
    for file in list(snapshot.iterdir()):
        blob = home / "blobs" / f"{revision}-{file.name}"
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, snapshot))
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(revision)
    return snapshot


def catalog_of(roots: Iterable[Path], mlx_lm: Path | None = None, **options: Any) -> Catalog:
    """Return a catalogue of these folders, for the installed mlx-lm or for that of a package."""
    return Catalog(list(roots), Inspector(Package(mlx_lm)), **options)
