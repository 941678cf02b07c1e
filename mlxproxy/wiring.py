"""The parts of one proxy, put together: what the blueprints call and what a stop ends."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxproxy.backend import memory
from mlxproxy.backend.lock import PortLock
from mlxproxy.backend.orphan import ChildRecord, Orphans
from mlxproxy.backend.process import Backend, BackendConfig, server_program
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.blueprints import shapes
from mlxproxy.blueprints.auth import Access, own_names
from mlxproxy.blueprints.budget import Budget
from mlxproxy.catalog import Catalog, Model
from mlxproxy.catalog.lmstudio import models_folder
from mlxproxy.catalog.scanning import Fingerprint, fingerprint
from mlxproxy.controller import Controller, History, Limits
from mlxproxy.controller.state import Event
from mlxproxy.errors import (
    LoadFailed,
    ModelNotFound,
    ModelsRootUnavailable,
    ProxyError,
)
from mlxproxy.guard import check
from mlxproxy.logfile import LogFile
from mlxproxy.observability.events import EventBus
from mlxproxy.observability.metrics import Metrics
from mlxproxy.settings import Settings

log = logging.getLogger("mlxproxy")

BODIES = 8  # of the largest size may be in memory at once
PRELOAD_RETRY = 2.0  # seconds between looks for a model whose disk is not there yet


@dataclass
class Services:
    """One proxy's parts; made once, held by the application (``app.extensions``)."""

    settings: Settings
    roots: tuple[Path, ...]
    catalog: Catalog
    controller: Controller
    history: History
    access: Access
    bus: EventBus
    metrics: Metrics
    lock: PortLock
    log_files: tuple[LogFile, ...]  # of the backends, one for each slot
    bodies: Budget  # bytes of requests in memory

    def close(self) -> None:
        """Lets answers finish, stops the backends, gives the ports up."""
        self.bus.close()
        self.controller.shutdown()
        for log_file in self.log_files:
            log_file.close()
        self.lock.release()

    def spec_for(self, name: str, fresh: bool = True, **options: Any) -> ModelSpec:
        """The load of a model by its name, with the settings' defaults.

        Args:
            fresh: look at the disk, so that a model that has changed there is loaded again. A chat
                that names a known model does without: it costs each of them too much.

        Raises:
            ProxyError: no such model, several, or one that cannot be loaded.
        """
        model = self.catalog.find(name, fresh=fresh)
        model.require_loadable()
        files = files_of(model) if fresh else None
        spec = ModelSpec(model, enable_thinking=self.settings.enable_thinking, files=files)
        return replace(spec, **options)

    def named_spec(self, name: object) -> ModelSpec | None:
        """What a chat request names, if it is a model we have; the name may be anything.

        Raises:
            ProxyError: the name fits several models, or one that cannot be loaded.
        """
        if not isinstance(name, str) or not name:
            return None
        current = self.controller.current()
        if current is not None and name in (current.path, current.model_id):
            return current
        try:
            return self.spec_for(name, fresh=False)
        except (ModelNotFound, ModelsRootUnavailable):
            return None

    def guard_limits(self, spec: ModelSpec | None) -> check.Limits:
        """What a request may say to this load; None: to any, as far as it is known."""
        names = frozenset(self.settings.template_kwargs)
        if spec is None:
            return check.Limits(template_kwargs=names)
        return check.Limits(
            template_kwargs=names,
            adapters=spec.adapters,
            draft_models=spec.draft_models,
            vocab_size=spec.model.vocab_size or 0,
            max_context=spec.model.max_context_length,
            images=spec.model.capabilities.vision,
        )

    def preload(self) -> None:
        """Loads what PRELOAD says, in the background, waiting for a disk that is mounted late."""
        name = self.settings.preload
        options: dict[str, Any] = {}
        if name == "last":
            last = self.history.last()
            if last is None:
                return
            options = dict(last)
            name = options.pop("model_id")
        if name is not None:
            threading.Thread(
                target=self._preload, args=(name, options), name="preload", daemon=True
            ).start()

    def _preload(self, name: str, options: dict[str, Any]) -> None:
        waited = threading.Event()
        told = False
        while not self.bus.closed and self.controller.never_asked():
            try:
                self.controller.load(self.spec_for(name, **options))
                return
            except ModelNotFound as error:
                if not told and not self.catalog.missing_roots():
                    log.warning("PRELOAD: %s Waiting for it to appear.", error.message)
                    told = True
            except ProxyError as error:
                if not told:
                    log.warning("PRELOAD: %s", error.message)
                    told = True
            waited.wait(PRELOAD_RETRY)


def build(settings: Settings) -> Services:
    """All parts for these settings; takes the backend ports.

    Raises:
        AlreadyRunning: another proxy has one of the ports.
        SettingError: the key file is not as it should be.
    """
    instance = settings.instance
    access = Access(
        keys=settings.keys,
        origins=frozenset(it.lower().rstrip("/") for it in settings.allowed_origins),
        hosts=frozenset(name.lower() for name in settings.trusted_hosts),
        names=own_names(),
    )
    ports = settings.backend_ports
    lock = PortLock(instance.folder, ports)
    lock.acquire()
    Orphans(instance.folder, ports, settings.stop_timeout).reclaim()
    bus, metrics = EventBus(), Metrics()
    history = History(instance.history)
    log_files = tuple(LogFile(instance.backend_log(port, ports.start)) for port in ports)
    records = [ChildRecord(instance.folder, ports.start, slot) for slot in range(len(ports))]
    configs = [
        BackendConfig(
            server_bin=settings.mlx_server_bin,
            port=port,
            max_tokens=settings.max_tokens,
            load_timeout=settings.load_timeout,
            stop_timeout=settings.stop_timeout,
            log_file=log_file,
            mark=record.mark,
            on_log=lambda text: bus.publish("backend_log", {"text": text}),
        )
        for port, log_file, record in zip(ports, log_files, records, strict=True)
    ]

    roots = settings.models_root or (models_folder(),)
    catalog = catalog_of(settings, roots)

    def launch(slot: int, spec: ModelSpec, on_end: Callable[[str], None]) -> Backend:
        return Backend(as_it_is_now(spec, catalog), configs[slot], on_end)

    def emit(event: Event) -> None:
        metrics.event(event)
        bus.publish(*shapes.event(event))

    limits = Limits(
        drain_timeout=settings.drain_timeout,
        shutdown_timeout=settings.shutdown_timeout,
        stall_timeout=settings.stall_timeout,
        stop_timeout=settings.stop_timeout,
        idle_ttl=settings.idle_ttl,
        max_concurrent=settings.max_concurrent,
        max_queue=settings.max_queue,
        swap_on_request=settings.model_selection == "requested",
    )
    return Services(
        settings=settings,
        roots=roots,
        catalog=catalog,
        controller=Controller(limits, launch, records, history, emit, memory.available),
        history=history,
        access=access,
        bus=bus,
        metrics=metrics,
        lock=lock,
        log_files=log_files,
        bodies=Budget(BODIES * settings.max_body),
    )


def catalog_of(settings: Settings, roots: Sequence[Path]) -> Catalog:
    """The catalogue of these folders, with what earlier starts have read of them."""
    return Catalog(
        roots,
        cache_file=settings.instance.catalog,
        mlx_lm=mlx_lm_package(settings.mlx_server_bin),
    )


def as_it_is_now(spec: ModelSpec, catalog: Catalog) -> ModelSpec:
    """Return the load of what is at its path now: it may have changed since it was asked for.

    What has gone is left to the backend, which says what is wrong with it.
    """
    try:
        model = catalog.find(spec.path)
    except ProxyError:
        model = spec.model
    return replace(spec, model=model, files=files_of(model))


def files_of(model: Model) -> Fingerprint | None:
    """Return what tells the model's files from those of another day; None where its disk is silent,
    on which a look might hang."""
    if model.stale:
        return None
    try:
        return fingerprint(str(model.path))
    except OSError:
        return None


def mlx_lm_package(server_bin: Path | None) -> Path | None:
    """The mlx_lm package that belongs to the server program; None where it is not beside it."""
    try:
        program = server_program(server_bin)
    except LoadFailed:
        return None
    found = sorted(program.resolve().parent.parent.glob("lib/python3*/site-packages/mlx_lm"))
    return found[-1] if found else None
