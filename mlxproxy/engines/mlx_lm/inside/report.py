"""The backend's channel to the proxy for reports about itself, which no model's text can reach.

It carries one JSON object per line, over the socket that the proxy passed as standard input. The
proxy sends one byte, when it starts to admit clients.

==============  ====================================================================================
``features``    names of the armed features; ``off``: names of the others, with the reason
``off``         alone: names of armed features that do not suit the model, with the reason
``died``        the generation thread has crashed; the reason, without any client's or model's text
``beat``        once a second while there are requests: see :class:`Pulse`
==============  ====================================================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any


class Reporter:
    """Sends reports; it drops them if nobody listens, and never waits.

    Args:
        descriptor: a stream socket to the proxy, owned by this object from now on.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._socket = None if descriptor is None else socket.socket(fileno=descriptor)
        self._lock = threading.Lock()
        self._serving = descriptor is None
        if self._socket is not None:
            threading.Thread(target=self._listen, name="reporter", daemon=True).start()

    @classmethod
    def of_standard_input(cls) -> Reporter:
        """Take the channel from standard input."""
        return cls(take_standard_input())

    def send(self, **report: Any) -> None:
        """Send one report."""
        if self._socket is None:
            return
        line = json.dumps(report).encode() + b"\n"
        with self._lock, contextlib.suppress(OSError):
            self._socket.send(line, socket.MSG_DONTWAIT)

    def serving(self) -> bool:
        """Return whether the proxy admits clients; until then, errors are about the model."""
        return self._serving

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            self._serving = bool(self._socket and self._socket.recv(1))

    def close(self) -> None:
        """Close the channel."""
        if self._socket is not None:
            self._socket.close()


def take_standard_input() -> int:
    """Return what standard input is, so that no child process inherits it; it reads nothing now."""
    descriptor = os.dup(0)  # not inheritable
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return descriptor


class Pulse:
    """The progress of the generation thread, which writes it; the watcher reads it.

    Attributes:
        steps: pieces of work done: a step of the batch, a token, a piece of a prompt.
        doing: the current work: ``step``, ``tokenize`` or ``load``; None between two of them.
        active: requests that the generation thread has taken and not yet released.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.doing: str | None = None
        self.active = 0

    @contextlib.contextmanager
    def at(self, work: str) -> Iterator[None]:
        """Set the current work for the duration of a block."""
        before, self.doing = self.doing, work
        try:
            yield
        finally:
            self.step()
            self.doing = before

    def step(self) -> None:
        """Count a piece of work as done."""
        self.steps += 1

    def beat(self, queued: int) -> dict[str, Any]:
        """Return the state as a report.

        Args:
            queued: requests that the generation thread has not taken yet.
        """
        return {
            "steps": self.steps,
            "doing": self.doing,
            "busy": bool(self.active or queued),
            "cpu": round(time.process_time(), 3),
            "faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
        }
