"""What was loaded last, and how long each model took, kept across starts of the proxy."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from mlxproxy.backend import Load
from mlxproxy.files import read_json, write_json

KEPT = 200


class History:
    """Two facts about past loads, in one file of the instance folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        stored = read_json(path)
        seconds = stored.get("seconds")
        self._seconds: dict[str, float] = seconds if isinstance(seconds, dict) else {}
        last = stored.get("last")
        self._last: dict[str, Any] | None = last if isinstance(last, dict) else None

    def seconds(self, load: Load) -> float | None:
        """How long the model took to load the last time, in seconds."""
        value = self._seconds.get(load.path)
        return value if isinstance(value, (int, float)) else None

    def last(self) -> dict[str, Any] | None:
        """The model path and options that `PRELOAD=last` brings back."""
        return self._last

    def loaded(self, load: Load, seconds: float) -> None:
        """The load succeeded after so many seconds."""
        with self._lock:
            self._seconds.pop(load.path, None)
            self._seconds[load.path] = round(seconds, 2)
            while len(self._seconds) > KEPT:
                del self._seconds[next(iter(self._seconds))]
            self._last = {"model_id": load.path, **load.options()}
            self._store()

    def unloaded(self) -> None:
        """Somebody asked for nothing to be loaded."""
        with self._lock:
            self._last = None
            self._store()

    def _store(self) -> None:
        write_json(self._path, {"seconds": self._seconds, "last": self._last})
