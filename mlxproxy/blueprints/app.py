"""The WSGI application: one blueprint per concern, and the hooks around them."""

from __future__ import annotations

from flask import Flask

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
)
from mlxproxy.blueprints.services import Services


def create_app(services: Services) -> Flask:
    """Return the WSGI application of one proxy.

    Args:
        services: its parts, as `mlxproxy.wiring.build` makes them from the settings.
    """
    app = Flask("mlxproxy", instance_path=str(services.settings.instance_path), static_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.config["MAX_CONTENT_LENGTH"] = services.settings.max_body
    app.url_map.merge_slashes = False  # merging answers with a redirect, in HTML
    app.url_map.strict_slashes = False  # so does this; a slash at the end means nothing
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.extensions["mlxproxy"] = services
    hooks.install(app)
    house = (front, page, health, models, openai, observe)
    for module in (*house, anthropic, responses, ollama, lmstudio):
        app.register_blueprint(module.blueprint)
    # For clients whose base URL lacks the /v1.
    app.register_blueprint(openai.blueprint, name="chat_without_v1", url_prefix="/")
    app.register_blueprint(models.blueprint, name="models_without_v1", url_prefix="/models")
    return app
