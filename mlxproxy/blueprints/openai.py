"""OpenAI's chat and text completions, streamed or whole."""

from __future__ import annotations

import json
from typing import Literal

from flask import Blueprint, Response, g

from mlxproxy import sse
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.blueprints.hooks import client, disconnect, json_body, recorder
from mlxproxy.blueprints.services import services
from mlxproxy.controller import Lease
from mlxproxy.guard import check
from mlxproxy.relay import relay

blueprint = Blueprint("chat", __name__, url_prefix="/v1")

Kind = Literal["chat", "text"]
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
    body = json_body()
    parts = services()
    controller = parts.controller
    known = controller.current()
    checked = check.check(body, kind, parts.selection.limits(known))
    streamed = checked.get("stream") is True
    # Its stream carries less than its whole answer: only the backend itself can give all.
    plain = not streamed and bool(checked.get("logprobs") or checked.get("top_logprobs", 0) > 0)

    def prepare(lease: Lease) -> bytes:
        final = checked
        if lease.spec is not known:
            final = check.check(body, kind, parts.selection.limits(lease.spec))
        final = {**final, "model": lease.spec.path, "stream": not plain}
        if not streamed and not plain:
            final["stream_options"] = {"include_usage": True}
        return json.dumps(final).encode()

    def target() -> ModelSpec | None:
        return parts.selection.named_spec(checked.get("model"))

    stats = g.stats = relay.AnswerStats()
    exclusive = check.is_exclusive(checked, own_seeds=controller.has("sampling"))
    lease = controller.lease(client(), disconnect(), target, exclusive)
    if not streamed:
        answer = relay.whole(lease, PATHS[kind], prepare, stats, plain)
        return Response(answer, mimetype="application/json")

    stream = relay.stream(lease, PATHS[kind], prepare, stats)
    next(stream)  # decides the status: returns, or raises the error
    record = recorder()
    stats.on_end = lambda ended: record(200, ended)
    return Response(stream, headers=sse.HEADERS, direct_passthrough=True)
