"""OpenAI's chat and text completions, streamed or whole, and scores: the bytes of the backend.

The reasoning alone is sent twice, in `reasoning` and in `reasoning_content`.
"""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response

from mlxproxy.blueprints.answering import ask
from mlxproxy.blueprints.hooks import json_body, streamed
from mlxproxy.blueprints.peering import elsewhere
from mlxproxy.blueprints.services import services
from mlxproxy.dialects import conversation
from mlxproxy.guard.check import Kind

blueprint = Blueprint("chat", __name__, url_prefix="/v1")


@blueprint.post("/chat/completions")
def chat() -> Response:
    """Return the loaded model's answer to a conversation."""
    given = json_body()
    if (there := elsewhere(given)) is not None:
        return there
    if "messages" in given:
        given["messages"] = conversation.repaired(given["messages"])
    return _complete(given, "chat")


@blueprint.post("/completions")
def completions() -> Response:
    """Return the loaded model's continuation of a text."""
    given = json_body()
    if (there := elsewhere(given)) is not None:
        return there
    return _complete(given, "text")


@blueprint.post("/score")
def score() -> Response:
    """Return the log probabilities of continuations of a text or a conversation."""
    given = json_body()
    if (there := elsewhere(given)) is not None:
        return there
    if "messages" in given:
        given["messages"] = conversation.repaired(given["messages"])
    return _complete(given, "score")


def _complete(given: dict[str, Any], kind: Kind) -> Response:
    asked = ask(given, kind)
    relay = services().relay
    if asked.body.fields.get("stream") is True:
        stream = relay.stream(asked.lease, asked.request, asked.stats)
        response = streamed(stream, asked.stats)
    else:
        whole = relay.whole(asked.lease, asked.request, asked.stats)
        response = Response(whole, mimetype="application/json")
    asked.warn()
    return response
