"""OpenAI's Responses API: answers, streamed or whole, and the stored ones."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, abort

from mlxproxy.blueprints.answering import answered, dialect_body
from mlxproxy.blueprints.peering import elsewhere
from mlxproxy.blueprints.services import services
from mlxproxy.dialects import responses_request

blueprint = Blueprint("responses", __name__, url_prefix="/v1/responses")


@blueprint.post("")
def create() -> Response:
    """Return the model's answer to the items of a conversation."""
    body = dialect_body()
    if (there := elsewhere(body)) is not None:
        return there
    return answered(responses_request.translate(body, services().responses))


@blueprint.get("/<path:identity>")
def one(identity: str) -> Response:
    """Return a stored answer."""
    return Response(services().responses.response(identity), mimetype="application/json")


@blueprint.delete("/<path:identity>")
def delete(identity: str) -> dict[str, Any]:
    """Delete a stored answer."""
    return services().responses.delete(identity)


@blueprint.get("/<path:identity>/input_items")
def input_items(identity: str) -> dict[str, Any]:
    """Return the input items of a stored answer."""
    return services().responses.input_items(identity)


@blueprint.route("/<path:path>", methods=["PATCH", "POST", "PUT"])
def unknown(path: str) -> Response:
    """Reject what this server does not have, such as `compact`: clients look for a status of 404.

    Raises:
        NotFound: always. Without this, it would be 405, for the path could be a stored answer's.
    """
    abort(404)
