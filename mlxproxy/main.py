"""The main job: put the parts together, say what is there, serve until told to stop."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlxproxy.backend.lock import AlreadyRunning
from mlxproxy.backend.protocol import Engine
from mlxproxy.blueprints.app import create_app
from mlxproxy.blueprints.auth import is_loopback
from mlxproxy.blueprints.services import Services
from mlxproxy.catalog.lmstudio import models_folder
from mlxproxy.logfile import LogFile
from mlxproxy.observability import logs
from mlxproxy.server import allocator
from mlxproxy.server.server import CannotListen, Server
from mlxproxy.server.waitress_check import UnsuitableWaitress, require_suitable
from mlxproxy.settings import Settings
from mlxproxy.text import harmless
from mlxproxy.wiring import build, catalog_of

log = logging.getLogger("mlxproxy")


class CannotServe(Exception):
    """Why the proxy does not start, in a sentence for the user."""


def serve(settings: Settings, engines: Sequence[Engine] = ()) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        engines: the kinds of backends; none: those that there are.

    Raises:
        CannotServe: the address or the backend port is taken, the instance folder is unusable, or
            the installed waitress does not suit.
        SettingError: the key file is not as it should be.
    """
    allocator.return_what_is_free()
    with logs.unwaited():
        _serve(settings, engines)


def _serve(settings: Settings, engines: Sequence[Engine]) -> None:
    logs.to_terminal(settings.log_level)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the server has its own handler
    try:
        require_suitable()
    except UnsuitableWaitress as error:
        raise CannotServe(str(error)) from None
    settings = with_models(settings)
    try:
        proxy = build(settings, engines)
    except AlreadyRunning as error:
        raise CannotServe(str(error)) from None
    except OSError as error:
        raise CannotServe(
            f"INSTANCE_PATH = {settings.instance_path} cannot be used: {error}."
        ) from None
    proxy_log = LogFile(settings.instance.log("proxy"))
    try:
        app = create_app(proxy.services)
        server = Server(app, settings, proxy.close, proxy.services.controller.force_stop)
    except CannotListen as error:
        proxy.close()
        raise CannotServe(str(error)) from None
    logs.to_followers(proxy_log, proxy.services.bus)
    try:
        _announce(proxy.services, server.address)
        proxy.services.selection.preload(lambda: proxy.services.bus.closed)
        server.run()
    finally:
        proxy_log.close()
    log.info("stopped")


def with_models(settings: Settings) -> Settings:
    """The settings with a models folder that has a model: LM Studio's, or the demo's besides.

    The demo model comes only where no folder is set and LM Studio has no MLX model here. A folder
    of LM Studio's that is missing outside the home folder is a disk that is not mounted yet.
    """
    if settings.models_root:
        return settings
    folder = models_folder()
    there = folder.is_dir()
    unplugged = not there and not folder.is_relative_to(Path.home())
    if unplugged or (there and _may_have_models(folder, settings)):
        return replace(settings, models_root=(folder,))
    from mlxproxy.demo import provide  # rich and its bars, on the first start at most

    own = settings.instance.models
    try:
        provide.ensure(own)
    except provide.DemoUnavailable as error:
        log.warning("%s", error)
        return replace(settings, models_root=(folder,))
    return replace(settings, models_root=(folder, own) if there else (own,))


def _may_have_models(folder: Path, settings: Settings) -> bool:
    """Whether it has an MLX model, or is so slow or so full that it cannot be told at once."""
    catalog = catalog_of(settings, (folder,))
    found = any(model.compatibility_type == "mlx" for model in catalog.models())
    return found or not catalog.known


def _announce(parts: Services, address: tuple[str, int]) -> None:
    """Where it listens, what it found, what to try next."""
    host, port = address
    local = f"http://localhost:{port}"
    models = [model for model in parts.catalog.models() if model.loadable]
    print(f"mlxproxy listens on http://{host}:{port}")
    for root in parts.roots:
        print(harmless(f"models folder: {root}"))
    for root in parts.catalog.missing_roots():
        log.warning("%s does not exist (yet): its models will appear when it is mounted", root)
    more = "" if parts.catalog.known else " (a folder is still being read)"
    print(f"models found: {len(models)}{more}")
    if not parts.access.keys and not is_loopback(host):
        print(
            "no API_KEY is set: anyone on your network can list, load and use the models "
            "(PROXY_HOST=127.0.0.1 restricts it to this machine)"
        )
    name = models[0].id if models else "publisher/name"
    key = ' -H "Authorization: Bearer $KEY"' if parts.access.keys else ""
    print("try next:")
    print(f"  curl {local}/v1/models{key}")
    print(harmless(f'  curl {local}/v1/models/load{key} -d \'{{"model_id": "{name}"}}\''))
    print(
        f"  curl -N {local}/v1/chat/completions{key} -d "
        '\'{"stream": true, "messages": [{"role": "user", "content": "Hello!"}]}\'',
        flush=True,
    )
