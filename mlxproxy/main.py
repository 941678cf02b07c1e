"""The main job: build the parts, announce what is available, serve until a signal."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlxproxy import banner
from mlxproxy.backend.lock import AlreadyRunning, PortLock
from mlxproxy.backend.protocol import Engine
from mlxproxy.blueprints.app import create_app
from mlxproxy.blueprints.auth import is_loopback
from mlxproxy.blueprints.services import Services
from mlxproxy.catalog.lmstudio import models_folder
from mlxproxy.logfile import LogFile
from mlxproxy.observability import logs
from mlxproxy.server import allocator
from mlxproxy.server.server import CannotListen, Server, listen
from mlxproxy.server.waitress_check import UnsuitableWaitress, require_suitable
from mlxproxy.settings import Settings
from mlxproxy.text import harmless, wrapped
from mlxproxy.wiring import Proxy, build, catalog_of

log = logging.getLogger("mlxproxy")


class CannotServe(Exception):
    """The proxy cannot start; the message is the sentence for the user."""


def serve(settings: Settings, engines: Sequence[Engine] = ()) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        engines: the kinds of backends; empty: all available ones.

    Raises:
        CannotServe: the address or the backend port is taken, the instance folder is unusable, or
            the installed waitress is unsuitable.
        SettingError: the key file is not acceptable.
    """
    allocator.return_what_is_free()
    with logs.unwaited():
        _serve(settings, engines)


def _serve(settings: Settings, engines: Sequence[Engine]) -> None:
    logs.to_terminal(settings.log_level)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the server has its own handler
    with contextlib.ExitStack() as stack:
        listener, others = _sockets(settings, stack)
        settings = with_models(settings)
        proxy = _proxy(settings, engines)
        services = proxy.services
        proxy_log = LogFile(settings.instance.log("proxy"))
        app = create_app(services)
        try:
            server = Server(app, settings, listener, proxy.close, proxy.force_stop, others=others)
        except CannotListen as error:
            proxy.close()
            raise CannotServe(str(error)) from None
        logs.to_followers(proxy_log, services.bus)
        try:
            _announce(services)
            selection = services.selection
            for sentence in selection.strangers():
                log.warning("%s", sentence)
            selection.preload(lambda: services.bus.closed)
            if services.peers is not None:
                services.peers.start()
            server.run()
        finally:
            proxy_log.close()
    log.info("stopped")


def _sockets(
    settings: Settings, stack: contextlib.ExitStack
) -> tuple[socket.socket, dict[str, socket.socket]]:
    """Return the socket to listen on, and others by the settings of their ports.

    Whatever prevents the proxy from starting is found here, before a model is downloaded for it.

    Raises:
        CannotServe: as for :func:`serve`.
        SettingError: as for :func:`serve`.
    """
    try:
        require_suitable()
        _ = settings.keys
        PortLock(settings.instance_path, settings.backend_ports).require_alone()
        listener = stack.enter_context(listen(settings.proxy_host, settings.proxy_port))
        others = {}
        if settings.ollama_port is not None:
            bound = listen(settings.proxy_host, settings.ollama_port, "OLLAMA_PORT")
            others["OLLAMA_PORT"] = stack.enter_context(bound)
        return listener, others
    except (UnsuitableWaitress, AlreadyRunning, CannotListen) as error:
        raise CannotServe(str(error)) from None
    except OSError as error:
        raise _unusable(settings, error) from None


def _proxy(settings: Settings, engines: Sequence[Engine]) -> Proxy:
    try:
        return build(settings, engines)
    except AlreadyRunning as error:
        raise CannotServe(str(error)) from None
    except OSError as error:
        raise _unusable(settings, error) from None


def _unusable(settings: Settings, error: OSError) -> CannotServe:
    return CannotServe(f"INSTANCE_PATH = {settings.instance_path} cannot be used: {error}.")


def with_models(settings: Settings) -> Settings:
    """Return the settings with a models folder: LM Studio's, the demo model's, or both.

    The demo model is provided only if no folder is set and LM Studio has no MLX model here. If LM
    Studio's folder is missing and outside the home folder, its disk is not mounted yet.
    """
    if settings.models_root:
        return settings
    folder = models_folder()
    there = folder.is_dir()
    unplugged = not there and not folder.is_relative_to(Path.home())
    if unplugged or (there and _may_have_models(folder, settings)):
        return replace(settings, models_root=(folder,))
    from mlxproxy.demo import (
        provide,  # imports rich for its bars: needed on the first start at most
    )

    own = settings.instance.models
    try:
        provide.ensure(own)
    except provide.DemoUnavailable as error:
        log.warning("%s", error)
        return replace(settings, models_root=(folder,))
    return replace(settings, models_root=(folder, own) if there else (own,))


def _may_have_models(folder: Path, settings: Settings) -> bool:
    """Return whether the folder has an MLX model, or is too slow or full to tell right away."""
    catalog = catalog_of(settings, (folder,))
    found = any(model.compatibility_type == "mlx" for model in catalog.models())
    return found or not catalog.known


def _announce(services: Services) -> None:
    missing = services.catalog.missing_roots()  # the catalogue has warned of them
    said = banner.lines(
        services.settings,
        [root for root in services.roots if root not in missing],
        sum(model.loadable for model in services.catalog.models()),
        services.catalog.known,
        services.settings.keys,
        is_loopback(services.settings.proxy_host),
    )
    for line in said:
        command = line.startswith(" ")
        print(harmless(line if command else wrapped(line, sys.stdout)))
    sys.stdout.flush()
