"""A load: a model and the options it is loaded with."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxproxy.catalog.model import Model
from mlxproxy.catalog.scanning import Fingerprint


@dataclass(frozen=True)
class Tuning:
    """Options of a backend process that are set for a model; None: the engine's own.

    Attributes:
        context: tokens of prompt and answer together, at most.
        draft_model: path of a small model for speculative decoding.
        adapter: path of an adapter that is fused in.
        kv_bits: bits of a quantized key-value cache.
        prompt_cache_bytes: memory for the prompts of earlier requests.
        decode_concurrency: answers that are generated at the same time.
    """

    context: int | None = None
    draft_model: str | None = None
    adapter: str | None = None
    kv_bits: int | None = None
    prompt_cache_bytes: int | None = None
    decode_concurrency: int | None = None


@dataclass(frozen=True)
class ModelSpec:
    """A model and the options it is loaded with; equal loads share one process.

    Attributes:
        ttl: seconds without a request until it is unloaded; None: the setting.
        force: load it even if, by the estimate, it does not fit into memory.
        pin: never evict it for another model.
        adapters: adapter folders that requests may name.
        draft_models: draft models that requests may name.
        draft: the draft model of `tuning`, which is in memory with the model.
        files: what was on disk at its path; None: not checked, anything will do.
    """

    model: Model = field(compare=False)
    enable_thinking: bool = False
    ttl: float | None = field(default=None, compare=False)
    adapters: frozenset[str] = frozenset()
    draft_models: frozenset[str] = frozenset()
    tuning: Tuning = Tuning()
    draft: Model | None = field(default=None, compare=False)
    files: Fingerprint | None = field(default=None, compare=False, repr=False)
    force: bool = field(default=False, compare=False)
    pin: bool = field(default=False, compare=False)
    path: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.model.path))

    @property
    def model_id(self) -> str:
        return self.model.id

    @property
    def needed_bytes(self) -> int:
        """The memory that it needs, estimated."""
        return self.model.needed_bytes + (self.draft.needed_bytes if self.draft else 0)

    @property
    def max_context(self) -> int | None:
        """The limit of tokens in prompt and answer together; None if there is none."""
        limits = (self.model.max_context_length, self.tuning.context)
        return min((limit for limit in limits if limit), default=None)

    def is_met_by(self, loaded: ModelSpec) -> bool:
        """Return whether a process that was started for `loaded` is what this load requests."""
        return self == loaded and (self.files is None or self.files == loaded.files)

    def options(self) -> dict[str, object]:
        """Return the options that a client chose, as JSON."""
        return {
            "enable_thinking": self.enable_thinking,
            "ttl": self.ttl,
            "pin": self.pin,
            "adapters": sorted(self.adapters),
            "draft_models": sorted(self.draft_models),
        }
