"""`GET /`: a page for people who open the address, and a sign of life for programs (`HEAD /`)."""

from __future__ import annotations

import json

from flask import Blueprint, Response, request
from markupsafe import Markup

from mlxproxy import __version__
from mlxproxy.blueprints.services import services
from mlxproxy.text import harmless

blueprint = Blueprint("front", __name__)

# Paths to look at: the page links to them, and programs call them.
LINKS = {
    "/v1/models": "the models on disk",
    "/v1/models/loaded": "what is loaded",
    "/health": "whether all is well",
}
OLLAMA = "Ollama is running"  # its clients look for these words
_KINDS = ("text/plain", "text/html", "application/json")  # the first for clients that accept any
# The page has no style: the security headers allow it nothing but its text.
_PAGE = Markup(
    '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width">\n'
    '<meta name="color-scheme" content="light dark">\n<title>mlxproxy</title>\n'
    "<h1>mlxproxy is running</h1>\n<p>{summary}</p>\n"
    "<p>The base URL for clients is this address with <code>/v1</code>.</p>\n<ul>\n{links}</ul>\n"
)
_LINK = Markup('<li><a href="{path}">{path}</a>: {what}\n')
_TEXT = (
    "mlxproxy is running. {summary}\nThe base URL for clients is this address with /v1.\n{links}"
)


@blueprint.get("/")
def front() -> Response:
    """Describe what runs here, as a page, as text or as JSON; on Ollama's port, as Ollama does."""
    if request.environ.get("SERVER_PORT") == str(services().settings.ollama_port):
        return Response(OLLAMA, mimetype="text/plain")
    catalog = services().catalog
    count = sum(model.loadable for model in catalog.models())
    spec = services().controller.current()
    kind = request.accept_mimetypes.best_match(_KINDS, _KINDS[0])
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
    if kind == "text/html":
        items = Markup("").join(_LINK.format(path=path, what=what) for path, what in LINKS.items())
        return Response(_PAGE.format(summary=summary, links=items), mimetype=kind)
    lines = "".join(f"  {path}  {what}\n" for path, what in LINKS.items())
    return Response(_TEXT.format(summary=summary, links=lines), mimetype=kind)
