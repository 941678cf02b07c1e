"""Will it fit? What a load takes, what the machine has, and when that runs out."""

from __future__ import annotations

import ctypes
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from mlxproxy.backend.processes import ask
from mlxproxy.catalog.model import DEFAULT_CONTEXT, Model

_GB = 1e9


@dataclass(frozen=True)
class Fit:
    """An estimate of a load against the memory there is, in bytes."""

    needed: int
    available: int

    @property
    def fits(self) -> bool:
        return self.needed <= self.available

    def sentence(self) -> str:
        """The numbers, for a person."""
        return (
            f"It needs about {self.needed / _GB:.1f} GB (estimated from its weights and a "
            f"context), but {self.available / _GB:.1f} GB are available."
        )


SHARE = 0.8  # of a machine's memory that several models may hold together, if nobody says more
SCARCE_SHARE = 0.05  # of the memory, that is left where it runs out
STALLED_PERCENT = 20.0  # of the last ten seconds, in which nothing went on for want of memory
CRITICAL = 4  # kern.memorystatus_vm_pressure_level, of 1, 2 and 4
SMALLEST_CACHE_BYTES = 512 << 20


@dataclass(frozen=True)
class Memory:
    """The machine's memory, as one proxy's models may use it.

    One model may have all that is free, as its estimate counts a context of its own. Of several,
    each may grow beyond what was estimated: without a setting, a part is left for that.

    Attributes:
        budget: the setting MEMORY_BUDGET: bytes, or a share of the machine's memory (a float).
        models: how many may be loaded at a time.
    """

    budget: int | float | None = None
    models: int = 1

    def available(self, held: int = 0) -> int:
        """Return the bytes that all models together may use.

        On macOS what the budget or else Metal says; elsewhere no more than is free, besides, and
        without bounds where the system does not tell.

        Args:
            held: bytes that the present models hold, and give back when they are stopped.
        """
        memory = ask(psutil.virtual_memory)
        if memory is None:  # a refusal should be certain
            return self.budget if isinstance(self.budget, int) else sys.maxsize
        most = self._most(memory.total)
        if sys.platform == "darwin":
            return most
        return min(most, memory.available + held)

    def cache_bytes(self, needed: int) -> int:
        """Return the bytes that a model's prompt cache may hold.

        Half of what is left beside one such model for each that may be loaded: the other half is
        for the contexts of the answers in flight.

        Args:
            needed: the bytes that the model takes.
        """
        memory = ask(psutil.virtual_memory)
        most = self._most(memory.total) if memory is not None else 0
        return max(SMALLEST_CACHE_BYTES, (most // self.models - needed) // 2)

    def _most(self, total: int) -> int:
        if isinstance(self.budget, float):
            return int(total * self.budget)
        if self.budget is not None:
            return self.budget
        if sys.platform == "darwin":
            return working_set(total, _sysctl(b"iogpu.wired_limit_mb", ctypes.c_uint64) or 0)
        return total if self.models == 1 else int(total * SHARE)


def shortage() -> str | None:
    """Return how the system says that memory is running out; None where it is not."""
    if sys.platform == "darwin":
        level = _sysctl(b"kern.memorystatus_vm_pressure_level", ctypes.c_uint32)
        return "memory pressure is critical" if (level or 0) >= CRITICAL else None
    memory = ask(psutil.virtual_memory)
    if memory is None:
        return None
    return scarcity(memory.total, memory.available, _read("/proc/pressure/memory"))


def scarcity(total: int, available: int, pressure: str) -> str | None:
    """Return why these figures of Linux mean that memory is running out; None if they do not.

    Args:
        pressure: `/proc/pressure/memory` (the kernel's documentation, "PSI"); empty if unknown.
    """
    if available < total * SCARCE_SHARE:
        return f"only {available / _GB:.1f} GB of memory are left"
    stalled = re.search(r"^full avg10=([0-9.]{1,9})\b", pressure, re.MULTILINE)
    if stalled is not None and float(stalled[1]) > STALLED_PERCENT:
        return f"for want of memory, everything stood still for {stalled[1]} % of the time"
    return None


def oom_kills() -> int:
    """Return how many processes the system has killed for want of memory since it started; 0 where
    it does not count them."""
    found = re.search(r"^oom_kill ([0-9]{1,18})$", _read("/proc/vmstat"), re.MULTILINE)
    return int(found[1]) if found is not None else 0


def ran_out(kills_before: int) -> bool:
    """Return whether memory has most likely run out.

    Args:
        kills_before: what :func:`oom_kills` said earlier.
    """
    return oom_kills() > kills_before or shortage() is not None


def footprint(pid: int) -> int | None:
    """Return the bytes that a process holds; None if it is gone.

    On macOS its physical footprint, which counts what Metal holds; elsewhere its resident memory.
    """
    if sys.platform == "darwin":
        return _physical_footprint(ctypes.CDLL(None).proc_pid_rusage, pid)
    return ask(lambda: int(psutil.Process(pid).memory_info().rss))


_RUSAGE_INFO_V0 = struct.Struct("16s10Q")  # <sys/resource.h>: ri_uuid, then ten numbers
_PHYS_FOOTPRINT = 8  # its place among the fields


def _physical_footprint(proc_pid_rusage: Callable[..., int], pid: int) -> int | None:
    buffer = ctypes.create_string_buffer(_RUSAGE_INFO_V0.size)
    if proc_pid_rusage(ctypes.c_int(pid), ctypes.c_int(0), buffer) != 0:
        return None
    return int(_RUSAGE_INFO_V0.unpack(buffer.raw)[_PHYS_FOOTPRINT])


def fit(model: Model, available: int, context: int = DEFAULT_CONTEXT) -> Fit:
    """Whether a model with a context of that many tokens fits into that many bytes."""
    return Fit(model.memory_bytes(context), available)


def working_set(total: int, wired_limit_mb: int) -> int:
    """The GPU's share of a Mac's memory in bytes, as Metal recommends it.

    Args:
        total: the machine's memory in bytes.
        wired_limit_mb: the limit that the user has set with sysctl; 0 if none.
    """
    if wired_limit_mb > 0:
        return min(total, wired_limit_mb << 20)
    return total * 3 // 4 if total > 32 << 30 else total * 2 // 3


def _sysctl(name: bytes, kind: type[ctypes.c_uint32] | type[ctypes.c_uint64]) -> int | None:
    """Return a number of the kernel's; None where it has none of that name."""
    value = kind(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    found = ctypes.CDLL(None).sysctlbyname(
        name, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
    )
    return int(value.value) if found == 0 else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, ValueError):
        return ""
