"""mlxproxy serves the MLX models of an LM Studio folder through `mlx_lm.server`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask

    from mlxproxy.services import Services

__version__ = "0.1.0"


def create_app(services: Services) -> Flask:
    """The WSGI application of one proxy.

    Args:
        services: its parts, as `mlxproxy.services.build` makes them from the settings.
    """
    from flask import Flask  # the commands import this package and need no Flask

    from mlxproxy.blueprints import chat, health, models, observe, web

    app = Flask(__name__, instance_path=str(services.settings.instance_path), static_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.config["MAX_CONTENT_LENGTH"] = services.settings.max_body
    app.url_map.merge_slashes = False  # which answers with a redirect, in HTML
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.extensions["mlxproxy"] = services
    web.install(app)
    for module in (health, models, chat, observe):
        app.register_blueprint(module.blueprint)
    return app
