"""The models that the installed mlx-vlm package can load, read from its source.

Importing it would cost the proxy seconds and hundreds of megabytes.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final

# A package of `mlx_vlm.models` that reads images exports both.
_SEES = (b"VisionModel", b"LanguageModel")
_FILES = ("utils.py", "embedding_loader.py", "reranker.py", "models", "version.py")
_TABLES: Final = {  # name -> file
    "MODEL_REMAPPING": "utils.py",
    "EMBEDDING_MODEL_REMAPPING": "embedding_loader.py",
    "_RERANKER_KINDS": "reranker.py",
}
# The results of a model that embeds, and of one that writes.
_EMBEDS: Final = b"text_embeds"
_WRITES: Final = b"LanguageModelOutput"


class Package:
    """The tables of one installed mlx-vlm.

    Args:
        folder: its package folder; None: it is not installed.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._sources: dict[str, bytes] = {}

    @property
    def is_installed(self) -> bool:
        return self._folder is not None

    @property
    def fingerprint(self) -> str:
        """An identifier that changes if the tables may change; it takes only a few `stat` calls."""
        parts = [f"mlx-vlm {self._folder}"]
        for name in _FILES if self._folder else ():
            try:
                status = os.stat(os.path.join(self._folder or "", name))
            except OSError:
                parts.append("-")
            else:
                parts.append(f"{status.st_mtime_ns}.{status.st_size}")
        return ":".join(parts)

    def chats(self, kind: str) -> bool:
        """Return whether it can generate text with a model of this `model_type`."""
        return self.sees(kind) or self._mentions(self._module(kind), _WRITES)

    def sees(self, kind: str) -> bool:
        """Return whether it passes images to a model of this `model_type`."""
        source = self._source(f"{self._module(kind)}/__init__.py")
        return all(name in source for name in _SEES)

    def embeds(self, kind: str) -> bool:
        """Return whether it makes embeddings with a model of this `model_type`."""
        return self._mentions(self._embedder(kind), _EMBEDS)

    def ranks(self, kind: str) -> bool:
        """Return whether it reranks with a model of this `model_type`."""
        return kind.lower().replace("-", "_") in self._tables["_RERANKER_KINDS"]

    def _module(self, kind: str) -> str:
        kind = kind.lower()
        return str(self._tables["MODEL_REMAPPING"].get(kind, kind))

    def _embedder(self, kind: str) -> str:
        kind = kind.lower()
        return str(self._tables["EMBEDDING_MODEL_REMAPPING"].get(kind, kind))

    def _mentions(self, module: str, word: bytes) -> bool:
        return any(word in self._source(f"{module}/{file}") for file in self._files(module))

    def _files(self, module: str) -> list[str]:
        if self._folder is None or module not in self._modules:
            return []
        try:
            names = os.listdir(self._folder / "models" / module)
        except OSError:
            return []
        return [name for name in names if name.endswith(".py")]

    def _source(self, file: str) -> bytes:
        """Return a file of `mlx_vlm.models`, empty if there is none."""
        if self._folder is None or file.partition("/")[0] not in self._modules:
            return b""
        if file not in self._sources:
            try:
                self._sources[file] = (self._folder / "models" / file).read_bytes()
            except OSError:
                self._sources[file] = b""
        return self._sources[file]

    @cached_property
    def _modules(self) -> frozenset[str]:
        """The packages that there are; a config names one, so only these names are looked up."""
        try:
            return frozenset(os.listdir((self._folder or Path()) / "models"))
        except OSError:
            return frozenset()

    @cached_property
    def _tables(self) -> Mapping[str, Mapping[str, Any]]:
        return {name: self._table(file, name) for name, file in _TABLES.items()}

    def _table(self, file: str, name: str) -> Mapping[str, Any]:
        """Return a dictionary that a module defines; values that are not literals become None."""
        try:
            tree = ast.parse((self._folder or Path()).joinpath(file).read_bytes())
        except (OSError, SyntaxError, ValueError):
            return {}
        for node in tree.body:
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and node.targets[0].id == name
                and isinstance(node.value, ast.Dict)
            ):
                return {
                    str(key.value): value.value if isinstance(value, ast.Constant) else None
                    for key, value in zip(node.value.keys, node.value.values, strict=True)
                    if isinstance(key, ast.Constant)
                }
        return {}
