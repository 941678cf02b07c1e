"""Memory: how much a load needs, how much the machine has, and whether it is running out."""

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
    """The estimate for a load, and the available memory, in bytes."""

    needed: int
    available: int

    @property
    def fits(self) -> bool:
        return self.needed <= self.available

    def sentence(self) -> str:
        """Return the numbers as a sentence for a person."""
        return (
            f"It needs about {self.needed / _GB:.1f} GB (estimated from its weights and a "
            f"context), but {self.available / _GB:.1f} GB are available."
        )


SHARE = 0.8  # of the machine's memory, that several models may hold together by default
SCARCE_SHARE = 0.05  # of the memory; with less left, it is running out
STALLED_PERCENT = 20.0  # of the last ten seconds, in which all tasks stalled on memory
CRITICAL = 4  # kern.memorystatus_vm_pressure_level, of 1, 2 and 4
SMALLEST_CACHE_BYTES = 512 << 20


@dataclass(frozen=True)
class Memory:
    """The part of the machine's memory that one proxy's models may use.

    A single model may use all free memory, as its estimate includes a context. If there are
    several, each may grow beyond its estimate: without a setting, a part is reserved for that.

    Attributes:
        budget: the setting MEMORY_BUDGET: bytes, or a share of the machine's memory (a float).
        models: the number of models that may be loaded at a time.
    """

    budget: int | float | None = None
    models: int = 1

    def available(self, held: int = 0) -> int:
        """Return the bytes that all models together may use.

        On macOS, that is the budget or else what Metal recommends; elsewhere, it is also no more
        than is free. There is no bound if the system does not report its memory.

        Args:
            held: bytes that the loaded models hold, and that stopping them would free.
        """
        memory = ask(psutil.virtual_memory)
        if memory is None:  # reject only when certain
            return self.budget if isinstance(self.budget, int) else sys.maxsize
        most = self._most(memory.total)
        if sys.platform == "darwin":
            return most
        return min(most, memory.available + held)

    def cache_bytes(self, needed: int) -> int:
        """Return the bytes that a model's prompt cache may hold.

        That is half of what remains of a model's share of the memory; the other half is for the
        contexts of the answers in flight.

        Args:
            needed: the bytes that the model itself takes.
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
    """Return how the system reports that memory is running out; None if it is not."""
    if sys.platform == "darwin":
        level = _sysctl(b"kern.memorystatus_vm_pressure_level", ctypes.c_uint32)
        return "memory pressure is critical" if (level or 0) >= CRITICAL else None
    memory = ask(psutil.virtual_memory)
    if memory is None:
        return None
    return scarcity(memory.total, memory.available, _read("/proc/pressure/memory"))


def scarcity(total: int, available: int, pressure: str) -> str | None:
    """Return why these Linux figures mean that memory is running out; None if they do not.

    Args:
        pressure: `/proc/pressure/memory` (the kernel's documentation, "PSI"); empty if unknown.
    """
    if available < total * SCARCE_SHARE:
        return f"only {available / _GB:.1f} GB of memory are left"
    stalled = re.search(r"^full avg10=([0-9.]{1,9})\b", pressure, re.MULTILINE)
    if stalled is not None and float(stalled[1]) > STALLED_PERCENT:
        return f"all processes were waiting for memory {stalled[1]} % of the time"
    return None


def oom_kills() -> int:
    """Return how many processes the system has killed since boot because memory ran out; 0 if it
    does not count them."""
    found = re.search(r"^oom_kill ([0-9]{1,18})$", _read("/proc/vmstat"), re.MULTILINE)
    return int(found[1]) if found is not None else 0


def ran_out(kills_before: int) -> bool:
    """Return whether memory has most likely run out.

    Args:
        kills_before: what :func:`oom_kills` returned earlier.
    """
    return oom_kills() > kills_before or shortage() is not None


def footprint(pid: int) -> int | None:
    """Return the bytes that a process holds; None if it is gone.

    On macOS, that is its physical footprint, which includes Metal's memory; elsewhere, its resident
    memory.
    """
    if sys.platform == "darwin":
        return _physical_footprint(ctypes.CDLL(None).proc_pid_rusage, pid)
    return ask(lambda: int(psutil.Process(pid).memory_info().rss))


_RUSAGE_INFO_V0 = struct.Struct("16s10Q")  # <sys/resource.h>: ri_uuid, then ten numbers
_PHYS_FOOTPRINT = 8  # its index among the fields


def _physical_footprint(proc_pid_rusage: Callable[..., int], pid: int) -> int | None:
    buffer = ctypes.create_string_buffer(_RUSAGE_INFO_V0.size)
    if proc_pid_rusage(ctypes.c_int(pid), ctypes.c_int(0), buffer) != 0:
        return None
    return int(_RUSAGE_INFO_V0.unpack(buffer.raw)[_PHYS_FOOTPRINT])


def fit(model: Model, available: int, context: int = DEFAULT_CONTEXT) -> Fit:
    """Return the fit of a model with a context of `context` tokens into `available` bytes."""
    return Fit(model.memory_bytes(context), available)


def working_set(total: int, wired_limit_mb: int) -> int:
    """Return the GPU's share of a Mac's memory in bytes, as Metal recommends it.

    Args:
        total: the machine's memory in bytes.
        wired_limit_mb: the limit that the user has set with sysctl; 0 if none.
    """
    if wired_limit_mb > 0:
        return min(total, wired_limit_mb << 20)
    return total * 3 // 4 if total > 32 << 30 else total * 2 // 3


def _sysctl(name: bytes, kind: type[ctypes.c_uint32] | type[ctypes.c_uint64]) -> int | None:
    """Return a number that the kernel keeps; None if it has none of that name."""
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
