"""The proxy's end of the channel to `inside/`, over which the backend reports on itself."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from mlxproxy.backend.protocol import Command
from mlxproxy.engines.mlx_lm.liveness import Beat, Liveness

log = logging.getLogger("mlxproxy.backend")

MAX_LINE_BYTES = 1 << 16
REASON_CHARACTERS = 500


class Link:
    """The channel to one backend, read by a thread of its own until the backend closes it.

    Args:
        on_death: called with the reason when the generation thread has crashed.
    """

    def __init__(self, on_death: Callable[[str], None]) -> None:
        self._on_death = on_death
        self._ours, self.theirs = socket.socketpair()
        self._liveness: Liveness | None = None
        self._features: frozenset[str] = frozenset()
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """Return the child's end of the channel, which becomes the child's standard input."""
        return self.theirs.fileno()

    def open(self) -> None:
        """Start to read. The child must have its end by now."""
        self.theirs.close()
        threading.Thread(target=self._run, name="backend-link", daemon=True).start()

    def let_clients_in(self) -> None:
        """Tell the backend that what it logs from now on may hold what clients said."""
        self._send(b"\n")

    def close(self) -> None:
        """Close both ends, because there is no child."""
        self.theirs.close()
        self._ours.close()

    @property
    def features(self) -> frozenset[str]:
        """The features of `inside/` that the backend has armed."""
        return self._features

    def has(self, feature: str) -> bool:
        """Return whether the backend has armed a feature of `inside/`."""
        return feature in self._features

    def hang(self, waiting_since: float, stall_timeout: float, load_timeout: float) -> str | None:
        """Return why the backend hangs; None while it is alive, or if it sends no reports."""
        with self._lock:
            if self._liveness is None:
                return None
            return self._liveness.hang(time.monotonic(), waiting_since, stall_timeout, load_timeout)

    def _send(self, message: bytes) -> bool:
        try:
            return self._ours.send(message, socket.MSG_DONTWAIT) == len(message)
        except OSError:
            return False

    def _run(self) -> None:
        with self._ours, self._ours.makefile("rb") as lines, contextlib.suppress(OSError):
            while line := lines.readline(MAX_LINE_BYTES):
                with contextlib.suppress(
                    ValueError, KeyError, TypeError, AttributeError, RecursionError
                ):
                    self._take(json.loads(line))

    def _take(self, report: dict[str, Any]) -> None:
        if "beat" in report:
            beat = Beat.from_json(report["beat"])
            with self._lock:
                if self._liveness is not None:
                    self._liveness.take(beat, time.monotonic())
        elif "died" in report:
            reason = str(report["died"])[:REASON_CHARACTERS]
            self._on_death(reason or "its generation thread has crashed")
        elif "features" in report:
            self._features = frozenset(map(str, report["features"]))
            with self._lock:
                if self.has("heartbeat"):
                    self._liveness = Liveness(computes_on_cpu=report["device"] == "cpu")
            for name, why in report["off"].items():
                log.warning("%s is off with this mlx-lm: %s", name, why)
        elif "off" in report:  # one that suits this mlx-lm, but not this model
            self._features -= report["off"].keys()
            for name, why in report["off"].items():
                log.warning("%s is off for this model: %s", name, why)


class WaitingLink(Link):
    """The channel to a standby: see `inside/standby.py`."""

    def __init__(self, on_death: Callable[[str], None]) -> None:
        super().__init__(on_death)
        self._is_waiting = False
        self._has_taken = False
        self._answered = threading.Event()

    def is_waiting(self) -> bool:
        """Return whether the process has imported everything, and has no command line yet."""
        return self._is_waiting

    def prepare(self, path: str) -> None:
        """Tell the process which model comes next."""
        self._send(_line({"prepare": path}))

    def hand_over(self, command: Command, seconds: float) -> bool:
        """Give the process its command line; return whether it has confirmed that in time."""
        told = {"argv": command.argv, "environment": dict(command.environment)}
        return self._send(_line(told)) and self._answered.wait(seconds) and self._has_taken

    def _run(self) -> None:
        super()._run()
        self._answered.set()

    def _take(self, report: dict[str, Any]) -> None:
        if "waiting" in report:
            self._is_waiting = True
            if why := report["waiting"]:
                log.warning("a standby cannot prepare for a model with this mlx-lm: %s", why)
        elif "taken" in report:
            self._is_waiting, self._has_taken = False, True
            self._answered.set()
        else:
            super()._take(report)


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
