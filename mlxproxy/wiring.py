"""The composition root: build the parts of one proxy from its settings, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxproxy.backend import memory
from mlxproxy.backend.lock import PortLock
from mlxproxy.backend.memory import Memory
from mlxproxy.backend.orphan import ChildRecord, Orphans
from mlxproxy.backend.process import Backend, BackendConfig
from mlxproxy.backend.protocol import Address, Engine
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.backend.standby import Standby
from mlxproxy.blueprints import shapes
from mlxproxy.blueprints.auth import Access, own_names
from mlxproxy.blueprints.budget import Budget
from mlxproxy.blueprints.services import Services
from mlxproxy.catalog import Catalog
from mlxproxy.catalog.inspector import Inspectors
from mlxproxy.catalog.lmstudio import models_folder
from mlxproxy.controller import Controller, History, Limits
from mlxproxy.controller.state import Event
from mlxproxy.dialects.responses_store import ResponsesStore
from mlxproxy.engines.mlx_lm.engine import MlxLm
from mlxproxy.engines.mlx_lm.prompt_disk import PromptDisk
from mlxproxy.engines.mlx_vlm.engine import MlxVlm
from mlxproxy.logfile import LogFile
from mlxproxy.observability.answers import Answers
from mlxproxy.observability.events import EventBus
from mlxproxy.observability.metrics import Metrics
from mlxproxy.peers.relay import Peers
from mlxproxy.preferences import EngineChoice, Preferences
from mlxproxy.relay.relay import Relay
from mlxproxy.selection import Selection, as_it_is_now
from mlxproxy.settings import Settings

BODIES = 8  # of the largest size may be in memory at the same time


@dataclass(frozen=True)
class Proxy:
    """One proxy: the services that its blueprints call, and the resources to close at its end.

    Attributes:
        log_files: those of the backends, one for each slot.
    """

    services: Services
    lock: PortLock
    log_files: tuple[LogFile, ...]

    def close(self) -> None:
        """Let answers finish, stop the backends, release the ports."""
        peers = self.services.peers
        deadline = time.monotonic() + self.services.settings.shutdown_timeout
        self.services.bus.close()
        self.services.standby.close()
        if peers is not None:
            peers.refuse()
        self.services.controller.shutdown()
        if peers is not None:
            peers.close(max(0.0, deadline - time.monotonic()))
        for log_file in self.log_files:
            log_file.close()
        self.lock.release()

    def force_stop(self) -> None:
        """Shorten a stop in progress: end the answers now."""
        self.services.controller.force_stop()
        if self.services.peers is not None:
            self.services.peers.force_stop()


def build(settings: Settings, engines: Sequence[Engine] = ()) -> Proxy:
    """Build all parts for these settings; lock the backend ports.

    Args:
        engines: the kinds of backends; empty: those of :func:`engines_of`.

    Raises:
        AlreadyRunning: another proxy holds one of the ports.
        SettingError: the key file is not acceptable.
    """
    instance = settings.instance
    engines = engines or engines_of(settings)
    preferences = Preferences(settings, engines[0].rules, [engine.name for engine in engines])
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
    standby = Standby()
    configs = [
        settings.part(
            BackendConfig,
            log_file=log_file,
            mark=record.mark,
            on_log=lambda text: bus.publish("backend_log", {"text": text}),
            standby=standby,
        )
        for log_file, record in zip(log_files, records, strict=True)
    ]

    by_name = {engine.name: engine for engine in engines}
    roots = settings.models_root or (models_folder(),)
    catalog = catalog_of(settings, roots, engines)

    def launch(slot: int, spec: ModelSpec, on_end: Callable[[str], None]) -> Backend:
        address = Address("127.0.0.1", ports[slot])
        spec = as_it_is_now(spec, catalog)
        return Backend(spec, by_name[spec.model.engine], address, configs[slot], on_end)

    def emit(event: Event) -> None:
        metrics.event(event)
        bus.publish(*shapes.event(event))

    machine = memory_of(settings)

    def available(held: int) -> int:
        return machine.available(held + standby.memory())

    def room() -> int:
        if memory.shortage() is not None:
            return -1
        return controller.budget() - sum(controller.memory().values()) - standby.memory()

    def prepare(spec: ModelSpec) -> None:
        standby.prepare(by_name[spec.model.engine], spec.path)

    limits = settings.part(
        Limits,
        swap_on_request=settings.model_selection == "requested",
        max_loaded=settings.slots,
    )
    controller = Controller(
        limits, launch, records, history, emit, available, memory.shortage, prepare
    )
    if settings.standby:
        record = ChildRecord(instance.folder, ports.start, slot=None)
        standby.watch(record, controller.is_idle, room)
    services = Services(
        settings=settings,
        roots=roots,
        catalog=catalog,
        controller=controller,
        standby=standby,
        selection=Selection(settings, by_name, catalog, controller, history, preferences),
        relay=Relay(settings.stall_timeout),
        access=access,
        bus=bus,
        metrics=metrics,
        answers=Answers(),
        bodies=Budget(BODIES * settings.max_body),
        responses=ResponsesStore(),
        chats=ResponsesStore(),
        peers=peers_of(settings),
    )
    return Proxy(services, lock, log_files)


def engines_of(settings: Settings) -> tuple[Engine, ...]:
    """Return the available kinds of backends, the preferred one first."""
    prompt_disk = PromptDisk(
        settings.instance.prompt_cache, settings.prompt_cache_disk, settings.stop_timeout
    )
    return (
        MlxLm(
            settings.mlx_server_bin,
            settings.max_tokens,
            memory_of(settings).cache_bytes,
            prompt_disk,
        ),
        MlxVlm(settings.vlm_server_bin, settings.max_tokens),
    )


def peers_of(settings: Settings) -> Peers | None:
    """Return the other machines that the settings name; None if they name none."""
    if not settings.peers:
        return None
    return Peers(settings.peers, settings.max_concurrent, settings.stall_timeout)


def memory_of(settings: Settings) -> Memory:
    """Return the machine's memory, as far as these settings allow its use."""
    return Memory(settings.memory_budget, settings.slots)


def inspector_of(settings: Settings, engines: Sequence[Engine] = ()) -> Inspectors:
    """Return the inspectors that read model folders for these engines, or those of the settings."""
    engines = engines or engines_of(settings)
    chosen = EngineChoice(settings, [engine.name for engine in engines])
    return Inspectors([engine.inspector for engine in engines], chosen)


def catalog_of(
    settings: Settings, roots: Sequence[Path], engines: Sequence[Engine] = ()
) -> Catalog:
    """Return the catalogue of these folders, with what earlier runs have read of them."""
    inspector = inspector_of(settings, engines)
    return Catalog(roots, inspector, cache_file=settings.instance.catalog)
