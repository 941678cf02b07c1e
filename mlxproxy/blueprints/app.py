"""The WSGI application: a blueprint a concern, and the hooks around them."""

from __future__ import annotations

from flask import Flask

from mlxproxy.blueprints import health, hooks, models, observe, openai
from mlxproxy.blueprints.services import Services


def create_app(services: Services) -> Flask:
    """The WSGI application of one proxy.

    Args:
        services: its parts, as `mlxproxy.wiring.build` makes them from the settings.
    """
    app = Flask("mlxproxy", instance_path=str(services.settings.instance_path), static_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.config["MAX_CONTENT_LENGTH"] = services.settings.max_body
    app.url_map.merge_slashes = False  # which answers with a redirect, in HTML
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.extensions["mlxproxy"] = services
    hooks.install(app)
    for module in (health, models, openai, observe):
        app.register_blueprint(module.blueprint)
    return app
