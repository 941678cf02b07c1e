"""The processes of a proxy, and the resources that they hold."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field

import psutil

from tests.support.proxy import Proxy
from tools.soak.meanwhile import Meanwhile

SAMPLE = 0.25


@dataclass
class Figures:
    """The resources that the proxy's process holds."""

    threads: int
    files: int
    sockets: int
    rss: int

    @classmethod
    def of(cls, process: psutil.Process) -> Figures:
        with process.oneshot():
            return cls(
                process.num_threads(),
                process.num_fds(),
                len(process.net_connections("all")),
                process.memory_info().rss,
            )

    @classmethod
    def at_rest(cls, process: psutil.Process) -> Figures:
        """Return the figures once they have not changed for a second."""
        figures, since = cls.of(process), time.monotonic()
        while time.monotonic() - since < 1:
            time.sleep(0.1)
            if (now := cls.of(process)).held() != figures.held():
                figures, since = now, time.monotonic()
        return figures

    def held(self) -> tuple[int, int, int]:
        """Return the figures that must be back at their old values when the proxy is idle."""
        return self.threads, self.files, self.sockets


@dataclass
class Samples(Meanwhile):
    """Samples of the proxy, taken from outside during the whole phase.

    Attributes:
        budget: bytes that all backends together may hold.
        models, memory: the most backends, and their most bytes, at a time.
        excess: a sentence for each sample that was over a limit.
    """

    proxy: Proxy
    process: psutil.Process
    max_loaded: int
    budget: int
    rss: list[int] = field(default_factory=list)
    threads: int = 0
    files: int = 0
    models: int = 0
    memory: int = 0
    excess: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def _run(self) -> None:
        while not self.over.wait(SAMPLE):
            with contextlib.suppress(psutil.Error):
                self.rss.append(self.process.memory_info().rss)
                self.threads = max(self.threads, self.process.num_threads())
                self.files = max(self.files, self.process.num_fds())
                self._look_at(backends(self.proxy), resident(alive(self.proxy)))

    def _look_at(self, running: list[psutil.Process], held: int) -> None:
        self.models = max(self.models, len(running))
        self.memory = max(self.memory, held)
        if len(running) > self.max_loaded:
            self.excess.append(f"{len(running)} backends at once: {running}")
        if held > self.budget:
            self.excess.append(f"{held:,} bytes held, {self.budget:,} allowed, by {running}")


def alive(proxy: Proxy) -> list[psutil.Process]:
    """Return the processes that the proxy has started, and their descendants, without zombies."""
    found = []
    for child in proxy.children():
        with contextlib.suppress(psutil.Error):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def resident(processes: list[psutil.Process]) -> int:
    """Return the resident memory of the processes, as the system tells it."""
    held = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            held += process.memory_info().rss
    return held


def backends(proxy: Proxy) -> list[psutil.Process]:
    """Return only the backends: the proxy's own children, without the compilers that MLX starts."""
    assert proxy.process is not None
    found = []
    for process in alive(proxy):
        with contextlib.suppress(psutil.Error):
            if process.ppid() == proxy.process.pid:
                found.append(process)
    return found
