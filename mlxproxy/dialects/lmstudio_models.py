"""Model lists in LM Studio's form, made from the entries of `/v1/models`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from mlxproxy.dialects.form import Json

Entry = Mapping[str, Any]

_TYPES_V0: Final = {"embedding": "embeddings"}


def v0(entries: Iterable[Entry], contexts: Mapping[str, int]) -> Json:
    """Return the answer to `/api/v0/models`.

    Args:
        contexts: how many tokens each loaded model can take, by its id.
    """
    return {"object": "list", "data": [one_v0(entry, contexts) for entry in entries]}


def one_v0(entry: Entry, contexts: Mapping[str, int]) -> Json:
    """Return the answer to `/api/v0/models/{id}`. Args: see :func:`v0`."""
    identity = entry["id"]
    told: Json = {
        "id": identity,
        "object": "model",
        "type": _TYPES_V0.get(entry["type"], entry["type"]),
        "publisher": entry["publisher"],
        "arch": entry["architecture"] or "unknown",
        "compatibility_type": entry["compatibility_type"],
        "quantization": (entry["quantization"] or {}).get("name") or "unknown",
        "state": "loaded" if identity in contexts else "not-loaded",
        "max_context_length": entry["max_context_length"] or 0,
    }
    if identity in contexts:
        told["loaded_context_length"] = contexts[identity]
    if entry["capabilities"].get("tools"):
        told["capabilities"] = ["tool_use"]
    return told


def v1(entries: Iterable[Entry], contexts: Mapping[str, int]) -> Json:
    """Return the answer to `/api/v1/models`. Args: see :func:`v0`."""
    return {"models": [_one_v1(entry, contexts) for entry in entries]}


def _one_v1(entry: Entry, contexts: Mapping[str, int]) -> Json:
    identity, can = entry["id"], entry["capabilities"]
    quantization = entry["quantization"]
    is_embedding = entry["type"] == "embedding"
    loaded = []
    if identity in contexts:
        loaded = [{"id": identity, "config": {"context_length": contexts[identity]}}]
    told: Json = {
        "type": "embedding" if is_embedding else "llm",
        "publisher": entry["publisher"],
        "key": identity,
        "display_name": identity.rpartition("/")[2],
        "architecture": entry["architecture"],
        "quantization": quantization
        and {"name": quantization.get("name"), "bits_per_weight": quantization.get("bits")},
        "size_bytes": entry["size_bytes"],
        "params_string": _short(entry["parameters"]),
        "loaded_instances": loaded,
        "max_context_length": entry["max_context_length"] or 0,
        "format": "mlx" if entry["compatibility_type"] == "mlx" else None,
        "description": None,
    }
    if not is_embedding:
        told["capabilities"] = {
            "vision": bool(can.get("vision")),
            "trained_for_tool_use": bool(can.get("tools")),
        }
        if can.get("thinking"):
            options = ["off", "on"] if can.get("thinking_switch") else ["on"]
            default = "off" if can.get("thinking_default") is False else "on"
            reasoning = {"allowed_options": options, "default": default}
            told["capabilities"]["reasoning"] = reasoning
    return told


def _short(parameters: int | None) -> str | None:
    if parameters is None:
        return None
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"
