"""LM Studio's REST API, v0 and v1: its answers and its models."""

from __future__ import annotations

import time
from typing import Any

from flask import Blueprint, Response

from mlxproxy.backend.spec import ModelSpec
from mlxproxy.blueprints.answering import (
    answered,
    contexts,
    dialect_body,
    entries,
    entry,
    load,
    unload,
)
from mlxproxy.blueprints.peering import elsewhere
from mlxproxy.blueprints.services import services
from mlxproxy.dialects import fields, lmstudio_models, lmstudio_request
from mlxproxy.dialects.lmstudio_answer import LMStudioV0Answer
from mlxproxy.guard.check import Written

blueprint = Blueprint("lmstudio", __name__, url_prefix="/api")


@blueprint.post("/v0/chat/completions")
def chat_v0() -> Response:
    """Answer as OpenAI's chat completions do, with statistics of the answer."""
    return _answered_v0("chat")


@blueprint.post("/v0/completions")
def completions_v0() -> Response:
    """Answer as OpenAI's text completions do, with statistics of the answer."""
    return _answered_v0("text")


def _answered_v0(kind: Written) -> Response:
    body = dialect_body()
    if (there := elsewhere(body)) is not None:
        return there
    translated = lmstudio_request.translate_v0(body, kind)
    answer = translated.answer
    assert isinstance(answer, LMStudioV0Answer)

    def about(spec: ModelSpec) -> None:
        told = lmstudio_models.one_v0(spec.model.to_dict(), {})
        answer.about = {
            "model_info": {
                "arch": told["arch"],
                "quant": told["quantization"],
                "format": told["compatibility_type"],
                "context_length": told["max_context_length"],
            },
            "runtime": {"name": "mlxproxy", "supported_formats": ["mlx"]},
        }

    return answered(translated, lmstudio_request.ttl(body), about)


@blueprint.get("/v0/models")
def models_v0() -> dict[str, Any]:
    """Return the models that can be loaded."""
    return lmstudio_models.v0(entries(), contexts())


@blueprint.get("/v0/models/<path:name>")
def model_v0(name: str) -> dict[str, Any]:
    """Return one model."""
    return lmstudio_models.one_v0(entry(name), contexts())


@blueprint.post("/v1/chat")
def chat_v1() -> Response:
    """Return the model's answer, with statistics."""
    body = dialect_body()
    if (there := elsewhere(body)) is not None:
        return there
    translated = lmstudio_request.translate_v1(body, services().chats)
    return answered(translated, lmstudio_request.ttl(body))


@blueprint.get("/v1/models")
def models_v1() -> dict[str, Any]:
    """Return the models that can be loaded."""
    return lmstudio_models.v1(entries(), contexts())


@blueprint.post("/v1/models/load")
def load_v1() -> Response | dict[str, Any]:
    """Load a model; answer when it is ready."""
    body = dialect_body()
    if (there := elsewhere(body, manages=True)) is not None:
        return there
    begun = time.monotonic()
    spec = services().selection.spec_for(fields.a_text(body.get("model"), "model"))
    load(spec)
    told: dict[str, Any] = {
        "type": "llm",
        "instance_id": spec.model_id,
        "load_time_seconds": round(time.monotonic() - begun, 3),
        "status": "loaded",
    }
    if fields.flag(body, "echo_load_config", False):
        told["load_config"] = {"context_length": spec.max_context or 0}
    return told


@blueprint.post("/v1/models/unload")
def unload_v1() -> Response | dict[str, Any]:
    """Unload a model."""
    body = dialect_body()
    if (there := elsewhere(body, "instance_id", manages=True)) is not None:
        return there
    name = fields.a_text(body.get("instance_id"), "instance_id")
    unload(services().selection.path_of(name))
    return {"instance_id": name}
