"""One model on disk: what the catalogue knows about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from mlxproxy.errors import ModelsRootUnavailable, ModelUnusable

DEFAULT_CONTEXT = 8192  # tokens: assumed for a conversation of unknown length


@dataclass(frozen=True)
class Capabilities:
    """The features that a client can use with a model.

    Attributes:
        tools: the backend can tell tool calls from text.
        vision: the backend passes images to the model.
        thinking: the model thinks, or can.
        thinking_default: whether its template makes it think if a request does not say; None if
            that cannot be determined, or if it never thinks.
        thinking_switch: `enable_thinking` changes that.
        prompt_cache_disk: what an earlier prompt that is kept on disk spares a later one:
            ``prefix`` (whatever both begin with), ``window`` (the same while the earlier one fits
            into the model's window, else as `whole`), ``whole`` (all of it if the later one begins
            with all of it); None: nothing is kept, or that is unknown.
        schemas: answers can be made to keep to a schema.
    """

    tools: bool = False
    vision: bool = False
    thinking: bool = False
    thinking_default: bool | None = None
    thinking_switch: bool = False
    prompt_cache_disk: str | None = None
    schemas: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object for a model's listing."""
        return vars(self).copy()


@dataclass(frozen=True)
class KVCache:
    """The growth of a key-value cache, in bytes per token.

    Attributes:
        per_token: for the layers that keep everything.
        windowed_per_token: for the layers that keep the last `window` tokens.
        window: in tokens.
    """

    per_token: int
    windowed_per_token: int = 0
    window: int = 0

    def bytes(self, context: int) -> int:
        """Return the size for a context of that many tokens."""
        return self.per_token * context + self.windowed_per_token * min(context, self.window)


@dataclass(frozen=True)
class Model:
    """A model folder.

    Attributes:
        id: the path relative to its root, or ``org/name`` in a Hugging Face cache.
        path: the folder, as it is passed to the backend.
        publisher: the first part of the id; empty if the id has only one part.
        type: ``llm``, ``vlm``, ``embedding``, ``reranker``, ``image``, ``adapter`` or ``unknown``.
        compatibility_type: ``mlx``, ``gguf`` or ``unknown``.
        created: when its config last changed, in Unix seconds.
        engine: the name of the engine that serves it, or that says why it cannot.
        loadable: that engine can load it, as far as its files show.
        reason: why it cannot be loaded, as a sentence; None if it can.
        lacking: why the engine that would do more with it (read images) cannot load it, as a
            sentence; None if there is no such engine, or it serves the model.
        architecture: the config's ``model_type``.
        quantization: ``name``, ``bits`` and ``group_size``; with ``mixed`` the bits that occur.
        parameters: counted from the weights' headers.
        size_bytes: the weights on disk.
        weights_bytes: the weights in memory.
        kv_cache: how much memory the context takes.
        max_context_length: in tokens.
        vocab_size: the number of token ids that exist.
        sampling: sampling fields for a request that has none of its own; empty: greedy.
        stale: its disk has not answered; this is what was known before.
        missing_root: the models folder that holds it, if that folder is missing now.
    """

    id: str
    path: Path
    publisher: str = ""
    type: str = "unknown"
    compatibility_type: str = "unknown"
    created: int = 0
    engine: str = ""
    loadable: bool = False
    reason: str | None = None
    lacking: str | None = None
    architecture: str | None = None
    quantization: dict[str, Any] | None = None
    parameters: int | None = None
    size_bytes: int = 0
    weights_bytes: int = 0
    kv_cache: KVCache | None = None
    max_context_length: int | None = None
    vocab_size: int | None = None
    capabilities: Capabilities = field(default_factory=Capabilities)
    sampling: dict[str, float] = field(default_factory=dict)
    stale: bool = False
    missing_root: Path | None = None

    def memory_bytes(self, context: int = DEFAULT_CONTEXT) -> int:
        """Return about how many bytes it takes with a context of that many tokens.

        Its weights and its key-value cache count. The working memory of a prefill does not, nor
        does a cache whose size the config does not tell: a refusal must be certain, a permission
        need not be.
        """
        if self.max_context_length is not None:
            context = min(context, self.max_context_length)
        cache = self.kv_cache.bytes(context) if self.kv_cache else 0
        return self.weights_bytes + cache

    @property
    def writes(self) -> bool:
        """Whether it generates text, instead of vectors or scores."""
        return self.type not in ("embedding", "reranker")

    @cached_property
    def needed_bytes(self) -> int:
        """The same for DEFAULT_CONTEXT; every listing reads it for every model."""
        return self.memory_bytes()

    @cached_property
    def encoded(self) -> str:
        """:meth:`to_dict` as JSON, cached: encoding thousands of models each time takes long."""
        return json.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the item of ``/v1/models``, except for what depends on the moment.

        The SDKs of OpenAI and of Anthropic (`display_name`, `created_at`) can both read it.
        """
        return {
            "id": self.id,
            "object": "model",
            "path": str(self.path),
            "created": self.created,
            "created_at": datetime.fromtimestamp(self.created, timezone.utc).isoformat(),
            "display_name": self.id.rpartition("/")[2],
            "owned_by": self.publisher or "unknown",
            "publisher": self.publisher,
            "type": self.type,
            "compatibility_type": self.compatibility_type,
            "loadable": self.loadable,
            "reason": self.reason,
            "lacking": self.lacking,
            "engine": self.engine,
            "architecture": self.architecture,
            "quantization": self.quantization,
            "parameters": self.parameters,
            "size_bytes": self.size_bytes,
            "max_context_length": self.max_context_length,
            "vocab_size": self.vocab_size,
            "capabilities": self.capabilities.to_dict(),
            "sampling": self.sampling,
            "stale": self.stale,
            "memory_bytes": self.needed_bytes,
        }

    def require_loadable(self) -> None:
        """Raise an error unless the backend can be asked to load it.

        Raises:
            ModelUnusable: it is on disk, but cannot be loaded.
            ModelsRootUnavailable: the disk that held it is missing.
        """
        if self.missing_root is not None:
            raise ModelsRootUnavailable(
                f"The model '{self.id}' is in '{self.missing_root}', which is currently missing. "
                "Connect its disk and try again."
            )
        if not self.loadable:
            raise ModelUnusable(f"The model '{self.id}' cannot be loaded: {self.reason}")

    def to_json(self) -> dict[str, Any]:
        """Return everything that is kept across starts, in JSON's types."""
        values = asdict(self)
        del values["stale"], values["missing_root"]
        return {**values, "path": str(self.path)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Model:
        """Return the model that :meth:`to_json` wrote.

        Raises:
            KeyError, TypeError: something else wrote the values.
        """
        kv_cache = values["kv_cache"]
        return cls(
            **{
                **values,
                "path": Path(values["path"]),
                "capabilities": Capabilities(**values["capabilities"]),
                "kv_cache": KVCache(**kv_cache) if kv_cache else None,
            }
        )
