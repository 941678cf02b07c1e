"""Where the prompts that a backend has read outlive its process, and how much room they have."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxproxy.engines.mlx_lm.inside.disk.store import Store

DEFAULT_BYTES = 20 << 30
DEFAULT_SHARE = 0.1  # of the free disk
# What remains of the time to exit when a backend stops writing.
STOP_MARGIN_SECONDS = 2.0


@dataclass(frozen=True)
class PromptDisk:
    """The folder of all models' prompt caches (`inside/disk/`), and its budget.

    Attributes:
        folder: it is made when the first entry is written.
        budget: the setting PROMPT_CACHE_DISK: bytes, or a share of the free disk (a float); None:
            the smaller of DEFAULT_BYTES and DEFAULT_SHARE.
        stop_timeout: seconds that a process gets to exit.
    """

    folder: Path
    budget: int | float | None
    stop_timeout: float

    def bytes(self) -> int:
        """Return the bytes that all entries may take; 0: there are none."""
        if isinstance(self.budget, int):
            return self.budget
        share = DEFAULT_SHARE if self.budget is None else self.budget
        place = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        taken = sum(entry.size for entry in Store(self.folder, 0).entries())
        room = int((shutil.disk_usage(place).free + taken) * share)
        return room if self.budget is not None else min(DEFAULT_BYTES, room)

    def options(self, model_id: str) -> dict[str, Any] | None:
        """Return the options for the process that serves a model; None: nothing is kept."""
        budget = self.bytes()
        if budget == 0:
            return None
        return {
            "folder": str(self.folder),
            "bytes": budget,
            "stop_seconds": max(0.0, self.stop_timeout - STOP_MARGIN_SECONDS),
            "model": model_id,
        }
