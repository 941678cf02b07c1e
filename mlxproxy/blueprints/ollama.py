"""Ollama's API: chat, generate and its models."""

from __future__ import annotations

import math
import time
from typing import Any

from flask import Blueprint, Response

from mlxproxy.blueprints.answering import (
    answered,
    ask,
    dialect_body,
    entries,
    entry,
    nothing,
    unload,
)
from mlxproxy.blueprints.peering import elsewhere, offer_of
from mlxproxy.blueprints.services import services
from mlxproxy.blueprints.vectors import Found, as_json, embedded
from mlxproxy.dialects import fields, ollama_models, ollama_request
from mlxproxy.dialects.form import Translated

blueprint = Blueprint("ollama", __name__, url_prefix="/api")


@blueprint.post("/chat")
def chat() -> Response:
    """Return the model's next message."""
    body = dialect_body()
    if (there := elsewhere(body)) is not None:
        return there
    return _answered(body, ollama_request.translate_chat(body))


@blueprint.post("/generate")
def generate() -> Response:
    """Return the model's answer to a prompt."""
    body = dialect_body()
    if (there := elsewhere(body)) is not None:
        return there
    return _answered(body, ollama_request.translate_generate(body))


def _answered(body: dict[str, Any], translated: Translated) -> Response:
    seconds = ollama_request.keep_alive(body)
    if translated.chat is None and seconds == 0:
        unload(services().selection.path_of(translated.answer.model))
        return nothing(translated.answer)
    return answered(translated, ollama_request.ttl(body))


@blueprint.get("/tags")
def tags() -> dict[str, Any]:
    """Return the models that can be loaded."""
    return ollama_models.tags(entries())


@blueprint.get("/ps")
def running() -> dict[str, Any]:
    """Return the models that are loaded."""
    slots = [slot for slot in services().controller.describe().slots if slot.spec is not None]
    told = []
    for slot in slots:
        assert slot.spec is not None
        model, left = slot.spec.model, slot.idle_unload_in
        size = slot.memory or slot.spec.needed_bytes
        context = slot.spec.max_context or 0
        told.append((model.to_dict(), math.inf if left is None else left, size, context))
    return ollama_models.running(told, time.time())


@blueprint.get("/version")
def version() -> dict[str, Any]:
    """Return the version of Ollama whose answers these ones imitate."""
    return {"version": ollama_models.VERSION}


@blueprint.post("/show")
def show() -> dict[str, Any]:
    """Return one model."""
    return ollama_models.shown(entry(_name(dialect_body())))


@blueprint.post("/pull")
def pull() -> dict[str, Any]:
    """Report success for a model that is on disk; nothing is ever downloaded."""
    name = _name(dialect_body())
    if offer_of(name) is None:
        model, _ = services().selection.find(name)
        model.require_loadable()
    return {"status": "success"}


@blueprint.post("/embed")
def embed() -> Response:
    """Return a vector for each text."""
    body = dialect_body()
    if (there := elsewhere(body)) is not None:
        return there
    found, nanoseconds = _embedded(body, body.get("input"))
    return as_json(
        {
            "model": found.model,
            "embeddings": found.values,
            "total_duration": nanoseconds,
            "load_duration": 0,
            "prompt_eval_count": found.tokens,
        }
    )


@blueprint.post("/embeddings")
def embeddings() -> Response:
    """Return the vector of one text: Ollama's older call."""
    body = dialect_body()
    if (there := elsewhere(body)) is not None:
        return there
    found, _ = _embedded(body, fields.a_text(body.get("prompt"), "prompt"))
    return as_json({"embedding": found.values[0]})


def _embedded(body: dict[str, Any], texts: Any) -> tuple[Found, int]:
    """Return the vectors of texts, and how long that took, in nanoseconds.

    Ollama cuts texts that are too long, unless told otherwise.
    """
    started = time.monotonic_ns()
    given = {
        "model": _name(body),
        "input": texts,
        "dimensions": body.get("dimensions"),
        "truncate": body.get("truncate", True),
    }
    asked = ask(given, "embed", ttl=ollama_request.ttl(body))
    found = embedded(asked, truncate=asked.body.fields.get("truncate", True))
    return found, time.monotonic_ns() - started


def _name(body: dict[str, Any]) -> str:
    """Return the name of the model in the body.

    Raises:
        InvalidRequest: the body names none.
    """
    name = fields.a_text(body.get("model") or body.get("name"), "model")
    return name.removesuffix(ollama_request.LATEST)
