"""The backend's output: always drained, with its last lines in memory and the rest in a file.

A pipe that nobody reads blocks its writer (`mlx_lm.server` after 136 requests), and a write that
fails (a full disk) may cost it an answer. So one thread only drains the pipe, and another one,
behind a bounded queue, writes the file: a slow or full disk costs log lines, never an answer.
"""

from __future__ import annotations

import contextlib
import os
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

Listener = Callable[[str], None]


class OutputPump:
    """The thread that drains one backend's output pipe until its end.

    Args:
        pipe: the read end; closed here.
        file: where the output is stored.
        on_output: called with each block of whole lines, unchanged.
        on_lines: called with each block as text, for clients that follow the log.
    """

    def __init__(
        self, pipe: int, file: LogFile, on_output: Callable[[bytes], None], on_lines: Listener
    ) -> None:
        self._pipe = pipe
        self._file = file
        self._on_output = on_output
        self._on_lines = on_lines
        self._lock = threading.Lock()
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._thread = threading.Thread(target=self._run, name="backend-output", daemon=True)
        self._thread.start()

    def tail(self) -> list[str]:
        """Return the last lines, oldest first."""
        with self._lock:
            return list(self._tail)

    def join(self, timeout: float) -> None:
        """Wait for the end of the output, for at most `timeout` seconds."""
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
        """Return the whole lines, and the unfinished one (an overlong line counts as whole)."""
        end = data.rfind(b"\n") + 1
        if not end and len(data) > PIPE_BYTES:
            end = len(data)
        return data[:end], data[end:]

    def _take(self, block: bytes) -> None:
        text = harmless(block.decode("utf-8", "replace"))  # it may quote a model or a client
        with self._lock:
            # Only the end of a flood can be useful; splitting all of it would occupy a core.
            for line in text[-TAIL_LINES * 100 :].splitlines():
                self._tail.append(line[:LINE_BYTES])
        self._file.put(text)
        self._on_lines(text)
        self._on_output(block)
