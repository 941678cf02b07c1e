"""Text for a destination that may be slow, full or gone, taken from any thread without blocking."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable

log = logging.getLogger("mlxproxy.writing")

QUEUED_CHUNKS = 256
# Seconds for which single lines are collected: waking two threads for each line would delay
# the tokens of every client.
GATHER = 0.05
CLOSING = 1.0  # seconds for the last lines


class Writer:
    """A bounded queue of text for a thread that writes it; never blocks or raises.

    Args:
        name: the name of the destination, for the log.
        write: writes a block of text; called in the writer's thread. If it raises OSError or
            ValueError, that block is lost.
    """

    def __init__(self, name: str, write: Callable[[str], None]) -> None:
        self._name = name
        self._write = write
        self._chunks: queue.Queue[str | None] = queue.Queue(QUEUED_CHUNKS)
        self._lost = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"writer of {name}", daemon=True)
        self._thread.start()

    def put(self, text: str) -> None:
        """Queue text for writing; drop and count it if the destination does not keep up."""
        try:
            self._chunks.put_nowait(text)
        except queue.Full:
            self._lost += 1

    def close(self) -> None:
        """Write what is queued, for at most one second."""
        deadline = time.monotonic() + CLOSING
        with contextlib.suppress(queue.Full):
            self._chunks.put(None, timeout=CLOSING)
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        fails = False
        while not self._closed:
            text = self._gathered()
            lost, self._lost = self._lost, 0
            if lost:
                text = f"[mlxproxy: {lost} blocks of log lines lost]\n{text}"
            if not text:
                continue
            try:
                self._write(text)
                fails = False
            except (OSError, ValueError) as error:  # retry with the next block
                self._lost += lost + 1
                if not fails:
                    log.warning("%s cannot be written: %s", self._name, error)
                fails = True
                time.sleep(GATHER)

    def _gathered(self) -> str:
        """Wait for text; return all that is queued."""
        texts = [self._chunks.get()]
        if texts[0] is not None:
            time.sleep(GATHER)
        with contextlib.suppress(queue.Empty):
            while texts[-1] is not None:
                texts.append(self._chunks.get_nowait())
        self._closed = texts[-1] is None
        return "".join(text for text in texts if text is not None)
