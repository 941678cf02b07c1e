"""A backend without a process, for tests of the controller only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlxproxy.backend.orphan import ChildRecord
from mlxproxy.backend.protocol import Address, Fields
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.blueprints import shapes
from mlxproxy.controller import Controller, History, Lease, Limits
from mlxproxy.disconnect import Disconnect
from mlxproxy.engines.mlx_lm.wire import MlxLmWire
from mlxproxy.errors import LoadCancelled, LoadFailed, ProxyError


def model_spec(name: str, **options: Any) -> ModelSpec:
    """Return the load of a model that does not exist on disk."""
    needed = 2000 if name == "big" else 1000
    path = Path("/models") / name
    model: Any = SimpleNamespace(
        path=path,
        id=name,
        size_bytes=1000,
        needed_bytes=needed,
        weights_bytes=900,
        writes=name != "encoder",
    )
    return ModelSpec(model, **options)


class FakeBackend:
    """A backend that behaves as the world says: it loads (now or later), fails, or exits."""

    def __init__(
        self, world: World, spec: ModelSpec, on_end: Callable[[str], None], slot: int = 0
    ) -> None:
        self.world, self.spec, self._on_end, self.slot = world, spec, on_end, slot
        self.ended: str | None = None
        self.hung = False
        self.deaf = False
        self.features: set[str] = set()
        self.wire = MlxLmWire(lambda _: False)
        self.hangs: str | None = None  # the reason, as the process itself reports it
        self.last_byte_at = time.monotonic()
        self.address = Address("127.0.0.1", 1 + slot)
        self.pid = 1
        self.held = 0  # bytes
        self.running = False

    def command(self) -> list[str]:
        return ["fake", self.spec.path]

    def start(self) -> None:
        with self.world.lock:
            self.running = True
            self.world.running.append(self)
            self.world.most = max(self.world.most, len(self.world.running))
            self.world.starts.append(self.spec.model_id)

    def wait_ready(self, cancelled: threading.Event, on_phase: Callable[[str], None]) -> None:
        on_phase("loading")
        while not self.world.may_load.wait(0.005):
            if cancelled.is_set():
                raise LoadCancelled("cancelled")
            if self.ended:
                raise LoadFailed(self.ended)
        if self.spec.model_id in self.world.broken:
            raise LoadFailed(f"{self.spec.model_id} is broken")
        if self.ended:
            raise LoadFailed(self.ended)

    def stop(self) -> None:
        with self.world.lock:
            if self.running:
                self.running = False
                self.world.running.remove(self)

    def die(self, reason: str = "killed") -> None:
        self.ended = reason
        self._on_end(reason)

    def check(self) -> str | None:
        return self.ended

    def has(self, feature: str) -> bool:
        return feature in self.features

    def hang(self, waiting_since: float, stall_timeout: float) -> str | None:
        return self.hangs

    def count_tokens(self, fields: Fields) -> int | None:
        return None

    def answers_probe(self, patience: float) -> bool:
        return not self.deaf

    def declare_hung(self, reason: str) -> None:
        self.hung = True
        self.die(reason)

    def last_words(self) -> list[str]:
        return ["the last line"]

    def bytes_read(self) -> None:
        return None

    def memory(self) -> int:
        return self.held


class World:
    """A controller with fake backends, and a record of their events."""

    def __init__(
        self,
        folder: Path,
        available: Callable[[int], int] | None = None,
        slots: int = 1,
        shortage: Callable[[], str | None] = lambda: None,
        **limits: Any,
    ) -> None:
        self.lock = threading.Lock()
        self.running: list[FakeBackend] = []
        self.starts: list[str] = []
        self.most = 0
        self.broken: set[str] = set()
        self.may_load = threading.Event()
        self.may_load.set()
        self.events: list[tuple[str, dict[str, Any]]] = []
        folder.mkdir(exist_ok=True)
        self.controller = Controller(
            Limits(**{"ended_grace": 0.05, **limits}),
            lambda slot, spec, on_end: FakeBackend(self, spec, on_end, slot),
            [ChildRecord(folder, 1, slot) for slot in range(slots)],
            History(folder / "history.json"),
            lambda event: self.events.append(shapes.event(event)),
            available,
            shortage,
        )

    def load(self, name: str, seconds: float = 5.0, **options: Any) -> ProxyError | None:
        """Load a model and wait for it; return the error if it failed."""
        claim = self.controller.load(model_spec(name, **options))
        assert claim.done.wait(seconds)
        return claim.error

    def describe(self) -> dict[str, Any]:
        """Return the whole state, as JSON."""
        return shapes.state(self.controller.describe())

    def lease(self, name: str | None = None, client: str = "someone", **options: Any) -> Lease:
        wanted = model_spec(name) if name else None
        disconnect = options.pop("disconnect", None) or Disconnect()
        return self.controller.lease(client, disconnect, lambda: wanted, **options)

    def close(self) -> None:
        self.may_load.set()
        self.controller.force_stop()
        self.controller.shutdown()
