"""The backend's output: drained whatever happens, its last lines in memory, the rest in a file.

A pipe that nobody reads stops `mlx_lm.server` after 136 requests, and a write that fails (a full
disk) empties its answers. So one thread does nothing but empty the pipe, and another, behind a
bounded queue, writes the file: a slow or full disk costs log lines, never an answer.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable

from mlxproxy.logfile import LogFile
from mlxproxy.text import harmless
from mlxproxy.writing import GATHER

TAIL_LINES = 200
LINE_BYTES = 2000
TRICKLE = 4096  # bytes
PIPE_BYTES = 1 << 16

# 0.32 logs the first and lives on with /health 503; 0.31 dies with a bare traceback of its thread.
_DEATH = re.compile(rb"generation thread died: ?(.*)|Exception in thread .*\(_generate\)")

Listener = Callable[[str], None]


class OutputPump:
    """Empties one backend's output pipe until its end.

    Args:
        pipe: the read end; closed here.
        file: where the output is kept.
        on_death: called with the reason when the log tells that generation has ended.
        on_lines: called with each block of text, for those who follow the log.
    """

    def __init__(self, pipe: int, file: LogFile, on_death: Listener, on_lines: Listener) -> None:
        self._pipe = pipe
        self._file = file
        self._on_death = on_death
        self._on_lines = on_lines
        self._lock = threading.Lock()
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._thread = threading.Thread(target=self._run, name="backend-output", daemon=True)
        self._thread.start()

    def tail(self) -> list[str]:
        """The last lines, oldest first."""
        with self._lock:
            return list(self._tail)

    def join(self, timeout: float) -> None:
        """Waits for the end of the output, in seconds at most."""
        self._thread.join(timeout)

    def _run(self) -> None:
        rest = b""
        with contextlib.suppress(OSError):
            while data := os.read(self._pipe, PIPE_BYTES):
                block, rest = self._whole_lines(rest + data)
                if block:
                    self._take(block)
                if len(data) < TRICKLE:
                    time.sleep(GATHER)
        if rest:
            self._take(rest)
        os.close(self._pipe)

    @staticmethod
    def _whole_lines(data: bytes) -> tuple[bytes, bytes]:
        """What ends with a line's end, and the begun line (cut where it grows without end)."""
        end = data.rfind(b"\n") + 1
        if not end and len(data) > PIPE_BYTES:
            end = len(data)
        return data[:end], data[end:]

    def _take(self, block: bytes) -> None:
        text = harmless(block.decode("utf-8", "replace"))  # it may quote a model or a client
        with self._lock:
            # Of a flood only the end can be of use; splitting all of it would cost a core.
            for line in text[-TAIL_LINES * 100 :].splitlines():
                self._tail.append(line[:LINE_BYTES])
        self._file.put(text)
        self._on_lines(text)
        if b"generation thread died" in block or b"(_generate)" in block:
            match = _DEATH.search(block)
            if match:
                reason = (match[1] or b"").decode("utf-8", "replace").strip()
                self._on_death(reason or "its generation thread crashed with a traceback")
