"""The layout of a model folder: the names of its files, and the folder as a scan found it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CONFIG = "config.json"
MODELOPT = "hf_quant_config.json"
DIFFUSERS = "model_index.json"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
TEMPLATE = "chat_template.jinja"
# A scan only finds files with these names (and weights, tokenizers and the like).
NAMES = (
    CONFIG,
    MODELOPT,
    DIFFUSERS,
    INDEX,
    TOKENIZER,
    TOKENIZER_CONFIG,
    GENERATION_CONFIG,
    TEMPLATE,
)


@dataclass(frozen=True)
class Folder:
    """A model folder as the scan found it.

    Attributes:
        path: without a trailing slash.
        id: the id that the model gets.
        sizes: bytes of each of its relevant files, by name; None if the size is unknown.
        changed: when its config or the folder last changed, in nanoseconds.
    """

    path: str
    id: str
    sizes: Mapping[str, int | None]
    changed: int

    def named(self, *endings: str) -> list[str]:
        """Return the names of the files that end with one of these endings, sorted."""
        return sorted(name for name in self.sizes if name.endswith(endings))
