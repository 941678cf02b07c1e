"""One model on disk: what the catalogue knows of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from mlxproxy.errors import ModelsRootUnavailable, ModelUnusable

DEFAULT_CONTEXT = 8192  # tokens: a conversation, where nobody says how long it will be


@dataclass(frozen=True)
class Capabilities:
    """What a client can ask of a model.

    Attributes:
        tools: the backend tells tool calls apart from text.
        vision: the backend gives the model images.
        thinking: the model thinks, or can.
        thinking_default: whether its template has it think when nothing is said; None if that
            cannot be told, or it never thinks.
        thinking_switch: `enable_thinking` changes that.
    """

    tools: bool = False
    vision: bool = False
    thinking: bool = False
    thinking_default: bool | None = None
    thinking_switch: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of a model's listing."""
        return vars(self).copy()


@dataclass(frozen=True)
class KVCache:
    """The growth of a cache, in bytes.

    Attributes:
        per_token: of the layers that remember everything.
        windowed_per_token: of the layers that remember the last `window` tokens.
        window: in tokens.
    """

    per_token: int
    windowed_per_token: int = 0
    window: int = 0

    def bytes(self, context: int) -> int:
        """The size for a context of that many tokens."""
        return self.per_token * context + self.windowed_per_token * min(context, self.window)


@dataclass(frozen=True)
class Model:
    """A model folder.

    Attributes:
        id: the path relative to its root, or ``org/name`` in a Hugging Face cache.
        path: the folder, as the backend is given it.
        publisher: the first part of the id; empty where it has one part only.
        type: ``llm``, ``vlm``, ``embedding``, ``reranker``, ``image``, ``adapter`` or ``unknown``.
        compatibility_type: ``mlx``, ``gguf`` or ``unknown``.
        created: when its config last changed, in Unix seconds.
        engine: the name of the engine that serves it, or that says why it cannot.
        loadable: that engine can load it, as far as its files tell.
        reason: if it cannot, why, as a sentence.
        architecture: the config's ``model_type``.
        quantization: ``name``, ``bits`` and ``group_size``; with ``mixed`` the bits that occur.
        parameters: counted from the weights' headers.
        size_bytes: the weights on disk.
        weights_bytes: the weights in memory.
        kv_cache: what the context takes in memory.
        max_context_length: in tokens.
        vocab_size: token ids that exist.
        sampling: fields of a request that has none of its own; empty: greedy.
        stale: its disk has not answered; this is what was known before.
        missing_root: the models folder it stands in, if that is not there now.
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
        """About how many bytes it takes with a context of that many tokens.

        Its weights and its key-value cache. The working memory of a prefill is left out, as is a
        cache whose size the config does not tell: a refusal should be certain, a permission need
        not be.
        """
        if self.max_context_length is not None:
            context = min(context, self.max_context_length)
        cache = self.kv_cache.bytes(context) if self.kv_cache else 0
        return self.weights_bytes + cache

    @cached_property
    def needed_bytes(self) -> int:
        """The same with a conversation's context; looked at for each model at each listing."""
        return self.memory_bytes()

    @cached_property
    def encoded(self) -> str:
        """:meth:`to_dict` as JSON. Encoded anew each time, thousands of models take long."""
        return json.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The item of ``/v1/models``, but for what depends on the moment.

        OpenAI's SDK reads it, and Anthropic's (`display_name`, `created_at`).
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
        """Returns if the backend can be asked to load it.

        Raises:
            ModelUnusable: it is on disk, but cannot be loaded.
            ModelsRootUnavailable: the disk it was on is not there.
        """
        if self.missing_root is not None:
            raise ModelsRootUnavailable(
                f"The model '{self.id}' is in '{self.missing_root}', which is currently missing. "
                "Connect its disk and try again."
            )
        if not self.loadable:
            raise ModelUnusable(f"The model '{self.id}' cannot be loaded: {self.reason}")

    def to_json(self) -> dict[str, Any]:
        """Everything that is kept across starts, in JSON's types."""
        values = asdict(self)
        del values["stale"], values["missing_root"]
        return {**values, "path": str(self.path)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Model:
        """The inverse of :meth:`to_json`.

        Raises:
            KeyError, TypeError: it was written by something else.
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
