"""The models that the installed mlx-lm package can load, read from its source.

Importing it would cost the proxy two seconds and hundreds of megabytes.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

ENFORCER = "../llguidance"  # the package that inside/grammar.py uses


@dataclass(frozen=True)
class Architecture:
    """The facts that the source of one module of ``mlx_lm.models`` reveals.

    Attributes:
        name: the module's name.
        windowed: it knows caches that keep no more than the window of a sliding layer.
        makes_cache: it defines itself what its layers keep; otherwise each keeps everything.
        recurrent: it knows caches of a state that cannot be taken back to an earlier token.
        own_cache: it has a cache of its own making.
        defaults: its values for entries that a config.json leaves out.
        tokenizer: its settings for tokenizers that have none of their own.
    """

    name: str
    windowed: bool = False
    makes_cache: bool = True
    recurrent: bool = False
    own_cache: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)


class Package:
    """The tables of one installed mlx-lm.

    Args:
        folder: its package folder; None for the one that this Python would import.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or _installed()
        self._architectures: dict[str, Architecture | None] = {}
        # Folders are scanned at the same time, and Python 3.11 may fail with a SystemError ("AST
        # constructor recursion depth mismatch") if two threads parse at the same time.
        self._parsing = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """An identifier that changes if the tables may change; it takes only a few `stat` calls."""
        return self._identify("utils.py", "models", "processors", "_version.py", ENFORCER)

    @property
    def installation(self) -> str:
        """An identifier that changes if mlx-lm, or any package beside it, is installed anew."""
        return self._identify("_version.py", "server.py", os.pardir)

    def _identify(self, *names: str) -> str:
        parts = [str(self._folder)]
        for name in names:
            try:
                status = os.stat(os.path.join(self._folder or "", name))
            except OSError:
                parts.append("-")
            else:
                parts.append(f"{status.st_mtime_ns}.{status.st_size}")
        return ":".join(parts)

    @property
    def keeps_to_schemas(self) -> bool:
        """Whether what makes answers keep to a schema is installed beside it."""
        return self._folder is not None and (self._folder / ENFORCER).is_dir()

    def architecture(self, config: Mapping[str, Any]) -> Architecture | None:
        """Return the module with which mlx-lm would load a config; None if it has none.

        Without tables (if no mlx-lm is found), every architecture counts as known: the backend
        decides.
        """
        kind = config.get("model_type")
        if not isinstance(kind, str):
            return None
        name = self._module(kind, config.get("architectures"))
        if self._modules is None:
            return Architecture(name)
        if name not in self._modules:
            return None
        if name not in self._architectures:
            self._architectures[name] = self._read(name)
        return self._architectures[name]

    def text_architecture(
        self, architecture: Architecture, text: Mapping[str, Any]
    ) -> Architecture:
        """Return the module for the text part of a model with several parts, else the model's own.

        Args:
            text: the part of the config that describes the text model.
        """
        return (
            self.architecture(text)
            or self.architecture({"model_type": architecture.name + "_text"})
            or architecture
        )

    def sees_images(self, config: Mapping[str, Any], architecture: Architecture) -> bool:
        """Return whether the backend passes images to a model with this config."""
        name = config.get("processor_type", architecture.name)
        return bool(config.get("vision_config")) and str(name) in self._processors

    def _module(self, kind: str, architectures: object) -> str:
        names = [architectures] if isinstance(architectures, str) else architectures
        for name in names if isinstance(names, list) else []:
            if isinstance(name, str) and (kind, name) in self._pairs:
                return str(self._pairs[kind, name])
        return str(self._aliases.get(kind, kind))

    @cached_property
    def restores_caches(self) -> bool:
        """Whether a cache can be made from its own state alone, as from mlx-lm 0.32 on."""
        functions = (
            node
            for node in ast.walk(self._tree("models/cache.py"))
            if isinstance(node, ast.FunctionDef) and node.name == "from_state"
        )
        return all(len(function.args.args) == 2 for function in functions)

    @cached_property
    def _modules(self) -> frozenset[str] | None:
        if self._folder is None:
            return None
        try:
            names = os.listdir(self._folder / "models")
        except OSError:
            return None
        return frozenset(name[:-3] for name in names if name.endswith(".py"))

    @cached_property
    def _constants(self) -> dict[str, Any]:
        return _constants(self._tree("utils.py"))

    @property
    def _aliases(self) -> Mapping[str, Any]:
        return _mapping(self._constants.get("MODEL_REMAPPING"))

    @property
    def _pairs(self) -> Mapping[Any, Any]:
        return _mapping(self._constants.get("MODEL_ARCHITECTURE_REMAPPING"))

    @cached_property
    def _processors(self) -> frozenset[str]:
        for name, value in _assignments(self._tree("processors/__init__.py")):
            if name == "PROCESSORS" and isinstance(value, ast.Dict):
                keys = (key.value for key in value.keys if isinstance(key, ast.Constant))
                return frozenset(str(key) for key in keys)
        return frozenset()

    def _tree(self, file: str) -> ast.Module:
        try:
            source = (self._folder or Path()).joinpath(file).read_bytes()
            with self._parsing:
                return ast.parse(source)
        except (OSError, SyntaxError, ValueError):
            return ast.Module(body=[], type_ignores=[])

    def _read(self, name: str) -> Architecture | None:
        tree = self._tree(f"models/{name}.py")
        names = _defined(tree)
        if "Model" not in names:  # a helper, such as cache.py
            return None
        methods = getattr(names["Model"], "body", None)
        return Architecture(
            name,
            windowed=not names.keys().isdisjoint({"RotatingKVCache", "ChunkedKVCache"}),
            makes_cache=methods is None
            or any(isinstance(it, ast.FunctionDef) and it.name == "make_cache" for it in methods),
            recurrent=not names.keys().isdisjoint({"ArraysCache", "MambaCache"}),
            own_cache=any(
                isinstance(node, ast.ClassDef) and name.endswith("Cache")
                for name, node in names.items()
            ),
            defaults=_defaults(tree),
            tokenizer=_mapping(_constants(tree).get("TOKENIZER_DEFAULTS")),
        )


def _installed() -> Path | None:
    spec = importlib.util.find_spec("mlx_lm")
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None


def _mapping(value: object) -> Mapping[Any, Any]:
    return value if isinstance(value, dict) else {}


def _defined(tree: ast.Module) -> dict[str, ast.stmt]:
    """Return a module's classes, and the import statements of what it imports by name."""
    names: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            names |= dict.fromkeys((alias.asname or alias.name for alias in node.names), node)
    return names


def _assignments(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Return the module's values that are written as literals."""
    constants = {}
    for name, value in _assignments(tree):
        try:
            constants[name] = ast.literal_eval(value)
        except (ValueError, TypeError):
            continue
    return constants


def _defaults(tree: ast.Module) -> dict[str, Any]:
    """Return the defaults of the classes that take the config; those of the text part win."""
    classes = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and node.name.endswith(("Args", "Config"))
        and not node.name.startswith(("Vision", "Audio"))
    ]
    classes.sort(key=lambda node: node.name.startswith("Text"))
    defaults = {}
    for statement in (statement for node in classes for statement in node.body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(statement.value, ast.Constant)
            and statement.value.value is not None
        ):
            defaults[statement.target.id] = statement.value.value
    return defaults
