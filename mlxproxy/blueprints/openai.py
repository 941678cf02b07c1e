"""OpenAI's chat and text completions, streamed or whole."""

from __future__ import annotations

from flask import Blueprint, Response, g

from mlxproxy.blueprints.hooks import client, disconnect, json_body, streamed
from mlxproxy.blueprints.services import services
from mlxproxy.guard.body import RequestBody
from mlxproxy.guard.check import Kind, is_exclusive
from mlxproxy.relay.open import Request
from mlxproxy.relay.statistics import AnswerStats

blueprint = Blueprint("chat", __name__, url_prefix="/v1")

PATHS: dict[Kind, str] = {"chat": "/v1/chat/completions", "text": "/v1/completions"}


@blueprint.post("/chat/completions")
def chat() -> Response:
    """The loaded model's answer to a conversation."""
    return _complete("chat")


@blueprint.post("/completions")
def completions() -> Response:
    """The loaded model's continuation of a text."""
    return _complete("text")


def _complete(kind: Kind) -> Response:
    given = json_body()
    parts = services()
    controller, relay = parts.controller, parts.relay
    body = RequestBody(given, kind, controller.current(), parts.selection.limits)
    fields = body.fields
    stats = g.stats = AnswerStats()
    exclusive = is_exclusive(fields, own_seeds=controller.has("sampling"))
    lease = controller.lease(
        client(), disconnect(), lambda: parts.selection.named_spec(fields.get("model")), exclusive
    )
    request = Request(PATHS[kind], body)
    if fields.get("stream") is True:
        return streamed(relay.stream(lease, request, stats), stats)
    return Response(relay.whole(lease, request, stats), mimetype="application/json")
