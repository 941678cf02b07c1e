"""The WSGI application: one blueprint per concern, and the hooks around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import Flask, Request
from werkzeug.routing import MapAdapter

from mlxproxy.blueprints import (
    anthropic,
    front,
    health,
    hooks,
    lmstudio,
    models,
    observe,
    ollama,
    openai,
    page,
    responses,
    vectors,
)
from mlxproxy.blueprints.services import Services


class App(Flask):
    """Flask without two things that no view needs here, and for which each answer would pay."""

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """Return the adapter that finds the view: by path and method, whatever the host is."""
        if request is None:
            return None
        return self.url_map.bind("", path_info=request.path, default_method=request.method)

    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function itself: no view or hook here is a coroutine."""
        return func


def create_app(services: Services) -> Flask:
    """Return the WSGI application of one proxy.

    Args:
        services: its parts, as `mlxproxy.wiring.build` makes them from the settings.
    """
    app = App("mlxproxy", instance_path=str(services.settings.instance_path), static_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.config["MAX_CONTENT_LENGTH"] = services.settings.max_body
    app.url_map.merge_slashes = False  # merging answers with a redirect, in HTML
    app.url_map.strict_slashes = False  # so does this; a slash at the end means nothing
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.extensions["mlxproxy"] = services
    hooks.install(app)
    house = (front, page, health, models, openai, observe)
    for module in (*house, vectors, anthropic, responses, ollama, lmstudio):
        app.register_blueprint(module.blueprint)
    # For clients whose base URL lacks the /v1.
    app.register_blueprint(openai.blueprint, name="chat_without_v1", url_prefix="/")
    app.register_blueprint(vectors.blueprint, name="vectors_without_v1", url_prefix="/")
    app.add_url_rule("/v2/rerank", view_func=vectors.rerank, methods=["POST"])  # Cohere's clients
    app.register_blueprint(models.blueprint, name="models_without_v1", url_prefix="/models")
    return app
