"""Will it fit? What a load takes, and what the machine has."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

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


def available(returned: int = 0) -> int:
    """Bytes that a new backend may use.

    On macOS what Metal recommends as the most that all models together hold; elsewhere the
    memory that is free, and without bounds where the system does not tell.

    Args:
        returned: bytes that the present backend holds and gives back first.
    """
    memory = ask(psutil.virtual_memory)
    if memory is None:
        return sys.maxsize  # a refusal should be certain
    if sys.platform == "darwin":
        return working_set(memory.total, _wired_limit_mb())
    return min(memory.total, memory.available + returned)


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


def _wired_limit_mb() -> int:
    value = ctypes.c_uint64(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    found = ctypes.CDLL(None).sysctlbyname(
        b"iogpu.wired_limit_mb", ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
    )
    return value.value if found == 0 else 0
