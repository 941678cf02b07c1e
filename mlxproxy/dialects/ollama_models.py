"""Model lists in Ollama's form, made from the entries of `/v1/models`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from mlxproxy.dialects.form import Json
from mlxproxy.dialects.ollama_answer import timestamp

VERSION: Final = "0.32.0"
"""The version of Ollama that these answers are like: clients refuse old ones, and read digits."""
UNKNOWN: Final = "unknown"
LONG_SECONDS: Final = 10 * 365 * 86400  # "forever", as a date that every client can parse

Entry = Mapping[str, Any]


def tags(entries: Iterable[Entry]) -> Json:
    """Return the answer to `/api/tags`."""
    return {"models": [_tag(entry) for entry in entries]}


def running(entries: Iterable[tuple[Entry, float, float, int]], now: float) -> Json:
    """Return the answer to `/api/ps`.

    Args:
        entries: each with the seconds until it is unloaded (infinity: never), the bytes that it
            takes in memory, and the tokens of its context.
        now: seconds since 1970.
    """
    models = []
    for entry, left, size, context in entries:
        until = now + (LONG_SECONDS if math.isinf(left) else left)
        told = {key: value for key, value in _tag(entry).items() if key != "modified_at"}
        live = {"expires_at": timestamp(until), "size_vram": int(size), "context_length": context}
        models.append({**told, "size": int(size), **live})
    return {"models": models}


def shown(entry: Entry, template: str = "") -> Json:
    """Return the answer to `/api/show`.

    Args:
        template: the model's chat template.
    """
    architecture = entry["architecture"] or UNKNOWN
    info: Json = {
        "general.architecture": architecture,
        "general.basename": entry["id"].rpartition("/")[2],
    }
    if entry["parameters"] is not None:
        info["general.parameter_count"] = entry["parameters"]
    if entry["max_context_length"] is not None:
        info[f"{architecture}.context_length"] = entry["max_context_length"]
    return {
        "license": "",
        "modelfile": "",
        "parameters": "",
        "template": template,
        "details": _details(entry),
        "model_info": info,
        "capabilities": _capabilities(entry),
        "modified_at": timestamp(entry["created"]),
    }


def _tag(entry: Entry) -> Json:
    identity = entry["id"]
    version = f"{identity}\n{entry['created']}\n{entry['size_bytes']}"
    return {
        "name": identity,
        "model": identity,
        "modified_at": timestamp(entry["created"]),
        "size": entry["size_bytes"],
        "digest": hashlib.sha256(version.encode("utf-8", "surrogatepass")).hexdigest(),
        "details": _details(entry),
        "capabilities": _capabilities(entry),
    }


def _details(entry: Entry) -> Json:
    """Return the details, each of which is a string: Zed cannot read null."""
    family = entry["architecture"] or UNKNOWN
    quantization = entry["quantization"] or {}
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": _short(entry["parameters"]),
        "quantization_level": quantization.get("name") or UNKNOWN,
    }


def _capabilities(entry: Entry) -> list[str]:
    if entry["type"] == "embedding":
        return ["embedding"]
    can = entry["capabilities"]
    return ["completion", *(name for name in ("tools", "vision", "thinking") if can.get(name))]


def _short(parameters: int | None) -> str:
    if parameters is None:
        return UNKNOWN
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.1f}{unit}"
    return str(parameters)
