"""The inspection of one model folder: whether mlx-vlm can load it, and in which of its modes.

The decision, in this order: a folder with Python of its own is refused (mlx-vlm would run it); a
classifier or reranker needs a supported type and a single score; an embedding model needs a type
and a pooling that mlx-vlm has; a model sees if its config, its weights and mlx-vlm all know of
images; whatever else mlx-vlm has a language model for can write.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from mlxproxy.catalog.layout import CONFIG, INDEX, Folder
from mlxproxy.catalog.model import Capabilities, Model
from mlxproxy.catalog.sampling import sampling
from mlxproxy.catalog.weights import Weights, read_headers
from mlxproxy.engines.kinds import kind_of
from mlxproxy.engines.mlx_lm.capabilities import TokenizerFiles, capabilities
from mlxproxy.engines.mlx_lm.inspection import CONTEXT, quantization_of, sentence, text_part
from mlxproxy.engines.mlx_lm.kvcache import kv_cache, number
from mlxproxy.engines.mlx_vlm.package import Package
from mlxproxy.engines.mlx_vlm.program import INSTALL, NAME
from mlxproxy.files import MB, Unreadable, read_object

log = logging.getLogger("mlxproxy.engines.mlx_vlm")

KINDS: Final = frozenset({"vlm", "embedding", "reranker"})
MOST_TOKENS: Final = 8192  # of one text to embed or to rank: mlx-vlm's own limit
_WHAT: Final = {
    "vlm": "Its images need mlx-vlm",
    "embedding": "It is an embedding model, which needs mlx-vlm",
    "reranker": "It is a reranker, which needs mlx-vlm",
}
_EYES: Final = ("vision", "visual", "multi_modal_projector", "mm_projector", "img_processor")
_POOLINGS: Final = frozenset(
    f"pooling_mode_{mode}" for mode in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
)
# In the table of positions of these, the first places are not for tokens (`pad_token_id` + 1).
_OFFSET: Final = frozenset({"xlm-roberta", "xlm_roberta"})


class Inspector:
    """A reader of model folders for one mlx-vlm.

    Args:
        package: what is installed, if anything is.
    """

    kinds = KINDS

    def __init__(self, package: Package) -> None:
        self._package = package

    @property
    def fingerprint(self) -> str:
        """An identifier that changes if another mlx-vlm may judge differently."""
        return self._package.fingerprint

    def __call__(self, folder: Folder) -> Model:
        """Return the model in a folder; its `reason` says what is wrong with it, if anything is."""
        publisher, slash, _ = folder.id.partition("/")
        model = Model(
            id=folder.id,
            path=Path(folder.path),
            publisher=publisher if slash else "",
            created=folder.changed // 1_000_000_000,
            engine=NAME,
            compatibility_type="mlx" if folder.named(".safetensors") else "unknown",
            size_bytes=sum(folder.sizes[name] or 0 for name in folder.named(".safetensors")),
        )
        try:
            config = read_object(f"{folder.path}/{CONFIG}", 4 * MB)
            return _Reading(model, folder, config, self._package).model()
        except Unreadable as error:
            return replace(model, reason=sentence(str(error)))
        except Exception:  # an unforeseen folder must not hide all others
            log.exception("%s could not be inspected", folder.path)
            return replace(
                model, reason="Its files could not be inspected; the log has the details."
            )


class _Reading:
    """A model with a config, read part by part."""

    def __init__(
        self, model: Model, folder: Folder, config: dict[str, Any], package: Package
    ) -> None:
        self._model = model
        self._folder = folder
        self._config = config
        self._text = text_part(config)
        self._package = package
        self._type = str(config.get("model_type", ""))
        self._kind = kind_of(folder, config, package.chats(self._type))

    def model(self) -> Model:
        if not self._package.is_installed:
            what = _WHAT.get(self._kind, "mlx-vlm could perhaps load it")
            return replace(self._model, type=self._kind, reason=f"{what}. {INSTALL}")
        packing, quantization, bad_packing = quantization_of(self._config)
        weights = read_headers(
            self._folder.path,
            self._shards(),
            packing,
            left_out=(),
            indexed=INDEX in self._folder.sizes,
        )
        sees = self._kind == "vlm" and self._sees(weights)
        capable, bad_tokenizer = self._capabilities(sees)
        faults = [*self._unsupported(), *self._missing(), *weights.faults, bad_packing]
        reason = next(filter(None, [*faults, bad_tokenizer]), None)
        vocab_size = number(self._text, "vocab_size")
        return replace(
            self._model,
            type=self._kind,
            loadable=reason is None,
            reason=sentence(reason) if reason else None,
            architecture=self._type[:80] or None,
            quantization=quantization,
            parameters=weights.parameters or None,
            weights_bytes=weights.memory,
            kv_cache=kv_cache(self._text, self._type, windowed=True) if self._writes else None,
            max_context_length=self._context(),
            vocab_size=vocab_size,
            capabilities=capable,
            sampling=sampling(self._folder.path, self._folder.sizes, vocab_size)
            if self._writes
            else {},
        )

    @property
    def _writes(self) -> bool:
        return self._kind not in ("embedding", "reranker")

    def _sees(self, weights: Weights) -> bool:
        """Return whether the model sees; a conversion for text keeps the config of its eyes."""
        return self._package.sees(self._type) and any(
            part in name for name in weights.tensors for part in _EYES
        )

    def _shards(self) -> list[str]:
        names = self._folder.named(".safetensors")
        return [name for name in names if not name.endswith("consolidated.safetensors")]

    def _missing(self) -> Iterator[str]:
        if not self._shards():
            yield "it has no weights (*.safetensors): the download is incomplete"

    def _unsupported(self) -> Iterator[str]:
        if not self._type:
            yield "config.json names no model_type"
        elif self._config.get("model_file") is not None:
            yield "it comes with its own Python code (model_file), which mlxproxy does not run"
        elif self._kind == "reranker":
            yield from self._bad_reranker()
        elif self._kind == "embedding":
            yield from self._bad_embedder()
        elif not self._package.chats(self._type):
            yield f"the installed mlx-vlm does not support the architecture {self._type[:80]!r}"

    def _bad_reranker(self) -> Iterator[str]:
        if not self._package.ranks(self._type):
            yield (
                "the installed mlx-vlm does not support rerankers of the architecture "
                f"{self._type[:80]!r}"
            )
        labels = self._config.get("num_labels")
        if labels is None and isinstance(self._config.get("id2label"), dict):
            labels = len(self._config["id2label"])
        classifies = "ForSequenceClassification" in str(self._config.get("architectures"))
        if classifies and labels not in (None, 1):
            yield "it is a classifier of several labels; a reranker has a single score"

    def _bad_embedder(self) -> Iterator[str]:
        if not self._package.embeds(self._type):
            yield (
                "the installed mlx-vlm does not support embedding models of the architecture "
                f"{self._type[:80]!r}"
            )
        try:
            pooling = read_object(f"{self._folder.path}/1_Pooling/{CONFIG}", 1 * MB)
        except Unreadable:
            return  # most have none; mlx-vlm then takes what is usual for the type
        modes = {mode for mode, on in pooling.items() if mode.startswith("pooling_mode_") and on}
        if len(modes) > 1 or not modes <= _POOLINGS:
            named = ", ".join(sorted(mode.removeprefix("pooling_mode_") for mode in modes))
            yield f"the installed mlx-vlm does not support its pooling ({named[:80]})"

    def _context(self) -> int | None:
        context = number(self._text, *CONTEXT)
        if self._writes:
            return context
        limits = [MOST_TOKENS, context, self._tokenizer_limit()]
        if context and self._type in _OFFSET:
            limits.append(context - 1 - (number(self._config, "pad_token_id") or 1))
        return min(limit for limit in limits if limit)

    def _tokenizer_limit(self) -> int | None:
        try:
            config = read_object(f"{self._folder.path}/tokenizer_config.json", 16 * MB)
        except Unreadable:
            return None
        return number(config, "model_max_length")

    def _capabilities(self, sees: bool) -> tuple[Capabilities, str | None]:
        try:
            tokenizer = TokenizerFiles.read(self._folder.path, self._folder.sizes)
        except Unreadable as error:
            return Capabilities(vision=sees), str(error)
        if not self._writes:
            return Capabilities(), None
        defaults: Mapping[str, Any] = {}
        return capabilities(tokenizer, defaults, vision=sees), None
