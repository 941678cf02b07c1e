"""Anthropic's Messages API, streamed or whole, and its token counts."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, g

from mlxproxy.blueprints.answering import answered, counted, dialect_body
from mlxproxy.blueprints.peering import elsewhere
from mlxproxy.dialects import anthropic_request
from mlxproxy.dialects.anthropic_answer import AnthropicAnswer

blueprint = Blueprint("anthropic", __name__, url_prefix="/v1/messages")


@blueprint.post("")
def messages() -> Response:
    """Return the model's next message."""
    body = dialect_body()
    if (there := elsewhere(body)) is not None:
        return there
    translated = anthropic_request.translate(body)
    assert isinstance(translated.answer, AnthropicAnswer)
    translated.answer.request_id = g.request_id
    return answered(translated)


@blueprint.post("/count_tokens")
def count_tokens() -> Response | dict[str, Any]:
    """Return how many tokens the prompt of these messages has: an estimate if it must be."""
    body = dialect_body()
    if (there := elsewhere(body)) is not None:
        return there
    translated = anthropic_request.translate(body)
    assert translated.chat is not None
    tokens = counted(translated)
    if tokens is None:
        tokens = anthropic_request.estimated_tokens(translated.chat)
    return anthropic_request.counted(tokens)
