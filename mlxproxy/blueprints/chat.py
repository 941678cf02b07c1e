"""OpenAI's chat and text completions, streamed or whole."""

from __future__ import annotations

import json
from typing import Literal

from flask import Blueprint, Response, g

from mlxproxy import guard, relay, sse
from mlxproxy.blueprints.web import client, json_body, presence, recorder, services
from mlxproxy.controller import Lease
from mlxproxy.spec import Load

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
    checked = guard.check(body, kind, parts.guard_limits(known))
    streamed = checked.get("stream") is True
    # Its stream carries less than its whole answer: only the backend itself can give all.
    plain = not streamed and bool(checked.get("logprobs") or checked.get("top_logprobs", 0) > 0)

    def prepare(lease: Lease) -> bytes:
        final = checked
        if lease.load is not known:
            final = guard.check(body, kind, parts.guard_limits(lease.load))
        final = {**final, "model": lease.load.path, "stream": not plain}
        if not streamed and not plain:
            final["stream_options"] = {"include_usage": True}
        return json.dumps(final).encode()

    def target() -> Load | None:
        return parts.named_load(checked.get("model"))

    trace = g.trace = relay.Trace()
    exclusive = guard.is_exclusive(checked, own_seeds=controller.has("sampling"))
    lease = controller.lease(client(), presence(), target, exclusive)
    if not streamed:
        answer = relay.whole(lease, PATHS[kind], prepare, trace, plain)
        return Response(answer, mimetype="application/json")

    stream = relay.stream(lease, PATHS[kind], prepare, trace)
    next(stream)  # decides the status: returns, or raises the error
    record = recorder()
    trace.on_end = lambda ended: record(200, ended)
    return Response(stream, headers=sse.HEADERS, direct_passthrough=True)
