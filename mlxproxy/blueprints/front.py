"""`GET /`: the page for a browser, and a sign of life for programs (`HEAD /`)."""

from __future__ import annotations

import json

from flask import Blueprint, Response, request

from mlxproxy import __version__
from mlxproxy.blueprints import page
from mlxproxy.blueprints.services import services
from mlxproxy.text import harmless

blueprint = Blueprint("front", __name__)

# Paths to look at.
LINKS = {
    "/v1/models": "the models on disk",
    "/v1/models/loaded": "what is loaded",
    "/health": "whether all is well",
}
OLLAMA = "Ollama is running"  # its clients look for these words
_TEXT = (
    "mlxproxy is running. {summary}\nThe base URL for clients is this address with /v1.\n{links}"
)


@blueprint.get("/")
def front() -> Response:
    """Return the page, or describe what runs here as text, as JSON or, on its port, as Ollama."""
    if request.environ.get("SERVER_PORT") == str(services().settings.ollama_port):
        return Response(OLLAMA, mimetype="text/plain")
    kind = page.kind(request)
    if kind == "text/html":
        return page.index()
    catalog = services().catalog
    count = sum(model.loadable for model in catalog.models())
    spec = services().controller.current()
    if kind == "application/json":
        facts = {
            "name": "mlxproxy",
            "version": __version__,
            "models": count,
            "loaded": spec.model_id if spec else None,
            "links": list(LINKS),
        }
        return Response(json.dumps(facts), mimetype=kind)
    models = "1 model" if count == 1 else f"{count} models"
    loaded = f"{spec.model_id} is loaded" if spec else "no model is loaded"
    reading = "" if catalog.is_complete() else " so far (a folder is still being read)"
    summary = harmless(f"{models} can be loaded{reading}; {loaded}.")
    lines = "".join(f"  {path}  {what}\n" for path, what in LINKS.items())
    return Response(_TEXT.format(summary=summary, links=lines), mimetype=kind)
