"""OpenAI's chat and text completions, streamed or whole."""

from __future__ import annotations

from flask import Blueprint, Response, g

from mlxproxy.blueprints.hooks import client, disconnect, json_body, streamed
from mlxproxy.blueprints.services import services
from mlxproxy.guard.check import Kind
from mlxproxy.relay.body import RequestBody
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
    controller, relay, selection = parts.controller, parts.relay, parts.selection
    body = RequestBody(given, kind, selection.expected(given.get("model")), selection.terms)
    fields = body.fields
    stats = g.stats = AnswerStats()
    exclusive = selection.engine.is_exclusive(fields, controller.has)
    lease = controller.lease(
        client(), disconnect(), lambda: selection.named_spec(fields.get("model")), exclusive
    )
    request = Request(PATHS[kind], body)
    if fields.get("stream") is True:
        return streamed(relay.stream(lease, request, stats), stats)
    return Response(relay.whole(lease, request, stats), mimetype="application/json")
