"""The inspection of one model folder: what its files say, and whether mlx-lm can load it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxproxy.catalog.layout import CONFIG, INDEX, MODELOPT, Folder
from mlxproxy.catalog.model import Capabilities, KVCache, Model
from mlxproxy.catalog.sampling import sampling
from mlxproxy.catalog.weights import Quantization, read_headers
from mlxproxy.engines.kinds import EMBEDDING, kind_of, kind_without_config
from mlxproxy.engines.mlx_lm.capabilities import TokenizerFiles, capabilities
from mlxproxy.engines.mlx_lm.kvcache import kv_cache, number
from mlxproxy.engines.mlx_lm.package import Architecture, Package
from mlxproxy.engines.mlx_lm.program import NAME
from mlxproxy.files import MB, Unreadable, read_object

log = logging.getLogger("mlxproxy.engines.mlx_lm")

_OTHER_TYPES = {
    "embedding": "It is an embedding model",
    "reranker": "It is a reranker or classifier",
    "image": "It generates images",
    "adapter": "It is an adapter for another model",
}
PYTORCH = (".bin", ".pt", ".pth")
CONTEXT = (
    "max_position_embeddings",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_positions",
    "n_ctx",
    "model_max_length",
)

# Parts of multi-modal and multi-token models that mlx-lm drops before it loads any tensor.
LEFT_OUT = (
    "vision_tower.",
    "vision_model.",
    "vision_embedder.",
    "visual.",
    "multi_modal_projector.",
    "mm_projector.",
    "patch_merge_mlp.",
    "audio_tower.",
    "embed_audio.",
    "embed_vision.",
    "mtp.",
)


class Inspector:
    """A reader of model folders for one mlx-lm.

    Args:
        package: what is installed.
    """

    def __init__(self, package: Package) -> None:
        self._package = package

    kinds = frozenset({"llm"})

    @property
    def fingerprint(self) -> str:
        """An identifier that changes if another mlx-lm may judge differently."""
        return self._package.fingerprint

    def __call__(self, folder: Folder) -> Model:
        """Return the model in a folder; its `reason` says what is wrong with it, if anything is."""
        publisher, slash, _ = folder.id.partition("/")
        weights = folder.named(".safetensors", ".gguf", *PYTORCH)
        model = Model(
            id=folder.id,
            path=Path(folder.path),
            publisher=publisher if slash else "",
            created=folder.changed // 1_000_000_000,
            engine=NAME,
            size_bytes=sum(folder.sizes[name] or 0 for name in weights),
        )
        try:
            return self._inspect(model, folder)
        except Exception:  # an unforeseen folder must not hide all others
            log.exception("%s could not be inspected", folder.path)
            return replace(
                model, reason="Its files could not be inspected; the log has the details."
            )

    def _inspect(self, model: Model, folder: Folder) -> Model:
        if not folder.named(".safetensors") and folder.named(".gguf"):
            return replace(
                model,
                type="embedding" if EMBEDDING.search(folder.id) else "llm",
                compatibility_type="gguf",
                reason="It is in GGUF format, for llama.cpp; mlx-lm needs an MLX version of it.",
            )
        if folder.named(".safetensors"):
            model = replace(model, compatibility_type="mlx")
        if CONFIG not in folder.sizes and (kind := kind_without_config(folder)):
            return replace(
                model, type=kind, reason=f"{_OTHER_TYPES[kind]}; mlx-lm only generates text."
            )
        try:
            config = read_object(f"{folder.path}/{CONFIG}", 4 * MB)
        except Unreadable as error:
            return replace(model, reason=sentence(str(error)))
        return _Reading(model, folder, config, self._package).model()


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
        self._known = package.architecture(config)
        self._architecture = self._known or Architecture(str(config.get("model_type")))
        self._vision = package.sees_images(config, self._architecture)

    def model(self) -> Model:
        kind = kind_of(self._folder, self._config, self._known is not None)
        packing, quantization, bad_packing = quantization_of(self._quantized_config())
        capable, bad_tokenizer = self._capabilities()
        weights = read_headers(
            self._folder.path,
            self._shards(),
            packing,
            left_out=LEFT_OUT if not self._vision and self._has_more_than_text() else (),
            indexed=INDEX in self._folder.sizes,
        )
        foreign = packing.method in ("awq", "gptq") and any(
            name.endswith(".g_idx") for name in weights.tensors
        )
        faults = [
            f"{_OTHER_TYPES[kind]}; mlx-lm only generates text" if kind in _OTHER_TYPES else None,
            *self._unsupported(),
            *self._missing(),
            *weights.faults,
            bad_packing or ("its GPTQ weights are reordered (g_idx)" if foreign else None),
            bad_tokenizer,
        ]
        reason = next(filter(None, faults), None)
        text = self._package.text_architecture(self._architecture, self._text)
        values = {**self._architecture.defaults, **text.defaults, **self._text}
        windowed = self._architecture.makes_cache and (self._architecture.windowed or text.windowed)
        cache = kv_cache(values, text.name, windowed=windowed)
        capable = replace(capable, prompt_cache_disk=self._kept(text, cache))
        architecture = self._config.get("model_type")
        vocab_size = number(values, "vocab_size")
        return replace(
            self._model,
            type=kind,
            loadable=reason is None,
            reason=sentence(reason) if reason else None,
            architecture=architecture[:80] if isinstance(architecture, str) else None,
            quantization=quantization,
            parameters=weights.parameters or None,
            weights_bytes=weights.memory,
            kv_cache=cache,
            max_context_length=number(self._text, *CONTEXT),
            vocab_size=vocab_size,
            capabilities=capable,
            sampling=sampling(self._folder.path, self._folder.sizes, vocab_size),
        )

    def _kept(self, text: Architecture, cache: KVCache | None) -> str | None:
        """Return `Capabilities.prompt_cache_disk`."""
        known = [self._known, text]
        if self._known is None or not self._package.restores_caches:
            return None
        if any(it.own_cache for it in known if it):
            return None
        if not self._known.makes_cache:
            return "prefix"
        if any(it.recurrent for it in known if it):
            return "whole"
        return "window" if cache is not None and cache.windowed_per_token else "prefix"

    def _has_more_than_text(self) -> bool:
        parts = ("text_config", "vision_config", "audio_config")
        ahead = number(self._text, "num_nextn_predict_layers", "mtp_num_hidden_layers")
        return ahead is not None or any(self._config.get(part) for part in parts)

    def _shards(self) -> list[str]:
        return [name for name in self._folder.named(".safetensors") if name.startswith("model")]

    def _missing(self) -> Iterator[str]:
        if self._shards():
            return
        if self._folder.named(".safetensors"):
            yield "its weights are not named model*.safetensors, the only name mlx-lm reads"
        elif self._folder.named(*PYTORCH):
            yield "its weights are in PyTorch format; mlx_lm.convert converts them to safetensors"
        else:
            yield "it has no weights (model*.safetensors): the download is incomplete"

    def _unsupported(self) -> Iterator[str]:
        kind = self._config.get("model_type")
        if not isinstance(kind, str):
            yield "config.json names no model_type"
        elif self._config.get("model_file") is not None:
            yield "it comes with its own Python code (model_file), which mlxproxy does not run"
        elif self._known is None:
            yield f"the installed mlx-lm does not support the architecture {kind[:80]!r}"

    def _capabilities(self) -> tuple[Capabilities, str | None]:
        try:
            tokenizer = TokenizerFiles.read(self._folder.path, self._folder.sizes)
        except Unreadable as error:
            return Capabilities(vision=self._vision), str(error)
        found = capabilities(tokenizer, self._architecture.tokenizer, vision=self._vision)
        schemas = self._package.keeps_to_schemas and tokenizer.is_byte_pair()
        return replace(found, schemas=schemas), None

    def _quantized_config(self) -> Mapping[str, Any]:
        """Return the config with its quantization in the place where mlx-lm looks for it."""
        if "quantization" in self._config or "quantization_config" in self._config:
            return self._config
        if "quantization_config" in self._text:
            return {"quantization_config": self._text["quantization_config"]}
        if MODELOPT in self._folder.sizes:
            try:
                path = f"{self._folder.path}/{MODELOPT}"
                return {"quantization_config": read_object(path, 4 * MB)}
            except Unreadable:
                return {}
        return {}


def quantization_of(
    config: Mapping[str, Any],
) -> tuple[Quantization, dict[str, Any] | None, str | None]:
    """Return how the weights are packed, according to a config.

    Returns:
        The packing for counting; the packing for the listing; and why mlx-lm would reject it, or
        None.
    """
    own = config.get("quantization")
    if own is not None:
        bits = number(own, "bits") if isinstance(own, dict) else None
        group = number(own, "group_size") if isinstance(own, dict) else None
        if bits is None or group is None:
            return Quantization(), None, "config.json has an invalid quantization"
        return _own_quantization(own, bits, group)
    other = config.get("quantization_config")
    if not other:
        return Quantization(), None, None
    method = other.get("quant_method") if isinstance(other, dict) else None
    if not isinstance(method, str):
        return Quantization(), None, "config.json has an invalid quantization"
    return _other_quantization(other, method)


def _own_quantization(
    own: Mapping[str, Any], bits: int, group: int
) -> tuple[Quantization, dict[str, Any], None]:
    single = {path: value for path, value in own.items() if isinstance(value, dict)}
    groups = {path: size for path, it in single.items() if (size := number(it, "group_size"))}
    occurring = {bits} | {size for it in single.values() if (size := number(it, "bits"))}
    mode = own.get("mode", "affine")
    listing: dict[str, Any] = {
        "name": f"{bits}-bit" if mode == "affine" else str(mode)[:80],
        "bits": bits,
        "group_size": group,
    }
    if len(occurring) > 1:
        listing["mixed"] = sorted(occurring)
        listing["name"] = f"mixed {'/'.join(map(str, sorted(occurring)))}-bit"
    return Quantization("mlx", bits, group, groups), listing, None


def _other_quantization(
    other: Mapping[str, Any], method: str
) -> tuple[Quantization, dict[str, Any], str | None]:
    nested = other.get("quantization")
    settings = nested if isinstance(nested, dict) else other
    form, algorithm = other.get("format"), settings.get("quant_algo")
    bits, group, fault = number(settings, "bits") or 0, number(settings, "group_size") or 0, None
    if method in ("mxfp4", "mxfp8", "fp8"):
        bits, group = (4 if method == "mxfp4" else 8), group or 32
    elif method == "bitnet":
        bits = 2
    elif method == "compressed-tensors":
        bits = 4
        group = 16 if form == "nvfp4-pack-quantized" else 32
        if form not in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "pack-quantized"):
            fault = f"the installed mlx-lm does not support the quantization {str(form)[:80]!r}"
    elif method == "modelopt":
        bits, group = 4, group or 16
        if algorithm != "NVFP4":
            fault = (
                f"the installed mlx-lm does not support the quantization {str(algorithm)[:80]!r}"
            )
    elif method in ("awq", "gptq"):
        bits, group = bits or 4, group or 128
        if bits != 4:
            fault = f"its {method.upper()} weights have {bits} bits; mlx-lm supports only 4"
    else:
        fault = f"the installed mlx-lm does not support the quantization {method[:80]!r}"
    listing = {"name": method[:80], "bits": bits or None, "group_size": group or None}
    return Quantization(method, bits, group), listing, fault


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of the text model, completed with the entries of the whole config."""
    for name in ("text_config", "llm_config", "language_config"):
        part = config.get(name)
        if isinstance(part, dict):
            return {**config, **part}
    return config


def sentence(phrase: str) -> str:
    """Return a phrase as a sentence: with a capital and a full stop."""
    first, rest = phrase[:1], phrase[1:]
    named = first.islower() and "." in phrase.partition(" ")[0]  # a file name keeps its case
    return f"{first if named else first.upper()}{rest}."
