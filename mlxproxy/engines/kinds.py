"""The kind of model that a folder holds, whatever engine there is for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from mlxproxy.catalog.layout import DIFFUSERS, Folder

EMBEDDING: Final = re.compile(r"(^|[^a-z])embed(ding|dings|der)?([^a-z]|$)", re.IGNORECASE)
_RERANKER = re.compile(r"rerank", re.IGNORECASE)
_ENCODER = re.compile(r"ForMaskedLM|(?<!Head)Model\b")
_POOLING = frozenset({"modules.json", "config_sentence_transformers.json"})


def kind_of(folder: Folder, config: Mapping[str, Any], generates: bool) -> str:
    """Return the kind of the model in a folder: a value of `Model.type`.

    Args:
        generates: whether the asking engine knows its architecture as one that generates text.
    """
    architectures = str(config.get("architectures"))
    if "ForSequenceClassification" in architectures or _RERANKER.search(folder.id):
        return "reranker"
    if (
        EMBEDDING.search(folder.id.rpartition("/")[2])
        or not _POOLING.isdisjoint(folder.sizes)
        or (not generates and _ENCODER.search(architectures))
    ):
        return "embedding"
    if config.get("vision_config") or config.get("vision_tower") or config.get("mm_vision_tower"):
        return "vlm"
    return "llm" if generates or "ForCausalLM" in architectures else "unknown"


def kind_without_config(folder: Folder) -> str | None:
    """Return the kind of a folder that has no config.json; None if nothing tells."""
    if DIFFUSERS in folder.sizes:
        return "image"
    return "adapter" if "adapter_config.json" in folder.sizes else None
