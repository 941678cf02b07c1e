"""The last load and each model's load time, kept across restarts of the proxy."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from mlxproxy.backend.spec import ModelSpec
from mlxproxy.files import note, read_record
from mlxproxy.settings import context_length, seconds

KEPT = 200
FLAGS = ("force", "pin")  # of a load, stored only if they are set


class History:
    """Two facts about past loads, in one file of the instance folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        stored = read_record(path)
        self._seconds = _seconds(stored.get("seconds"))
        self._last = _last(stored.get("last"))

    def seconds(self, spec: ModelSpec) -> float | None:
        """Return how long the model's last load took, in seconds; None if that is not known."""
        return self._seconds.get(spec.path)

    def last(self) -> dict[str, Any] | None:
        """Return the model path and options that `PRELOAD=last` restores."""
        return self._last

    @property
    def is_empty(self) -> bool:
        """Whether no load has ever succeeded."""
        return not self._seconds and self._last is None

    def loaded(self, spec: ModelSpec, seconds: float) -> None:
        """Record that the load succeeded, and how many seconds it took."""
        with self._lock:
            self._seconds.pop(spec.path, None)
            self._seconds[spec.path] = round(seconds, 2)
            while len(self._seconds) > KEPT:
                del self._seconds[next(iter(self._seconds))]
            self._last = {
                "model_id": spec.path,
                "enable_thinking": spec.enable_thinking,
                "ttl": spec.ttl,
                **{name: True for name in FLAGS if getattr(spec, name)},
                **_context(spec.context),
            }
            self._store()

    def unloaded(self, path: str | None = None) -> None:
        """Record that a client unloaded this model, or all of them (None)."""
        with self._lock:
            if path is None or (self._last is not None and self._last["model_id"] == path):
                self._last = None
                self._store()

    def _store(self) -> None:
        note(self._path, {"seconds": self._seconds, "last": self._last})


def _seconds(stored: object) -> dict[str, float]:
    """Return the valid durations among the stored values."""
    found = stored if isinstance(stored, dict) else {}
    return {path: value for path, it in found.items() if (value := _duration(it)) is not None}


def _last(stored: object) -> dict[str, Any] | None:
    """Return the stored load; None if it is not a valid one."""
    if not isinstance(stored, dict) or not isinstance(stored.get("model_id"), str):
        return None
    return {
        "model_id": stored["model_id"],
        "enable_thinking": stored.get("enable_thinking") is True,
        "ttl": _duration(stored.get("ttl")),
        **{name: True for name in FLAGS if stored.get(name) is True},
        **_context(stored.get("context")),
    }


def _context(stored: object) -> dict[str, int]:
    """Return the context as an option of a load; nothing if none was given, or it is not valid."""
    try:
        return {"context": context_length(stored)}
    except ValueError:
        return {}


def _duration(stored: object) -> float | None:
    """Return the stored seconds; None if invalid: JSON numbers may be NaN, negative or infinite."""
    try:
        return seconds(stored)
    except ValueError:
        return None
