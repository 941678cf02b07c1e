"""OpenAI's chat and text completions, streamed or whole."""

from __future__ import annotations

from flask import Blueprint, Response, g

from mlxproxy.blueprints.hooks import client, disconnect, json_body, streamed, warn
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
    known = selection.expected(given.get("model"))
    body = RequestBody(given, kind, known, selection.terms)
    fields = body.fields
    stats = g.stats = AnswerStats()
    exclusive = selection.engine_of(known).is_exclusive(fields, controller.has)
    lease = controller.lease(
        client(), disconnect(), lambda: selection.named_spec(fields.get("model")), exclusive
    )
    request = Request(PATHS[kind], body)
    if fields.get("stream") is True:
        response = streamed(relay.stream(lease, request, stats), stats)
    else:
        response = Response(relay.whole(lease, request, stats), mimetype="application/json")
    backend = lease.backend  # not there yet, where the wait for it is long
    if (spec := backend.spec if backend else lease.target or known) is not None:
        has = backend.has if backend else lambda _: True
        warn(selection.engine_of(spec).unmet(fields, spec, has))
    return response
