"""Activity in the background, while the clients are running."""

from __future__ import annotations

import threading


class Meanwhile:
    """Activity in a thread of its own until it is told to end."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.over.set()
        self._thread.join()

    def _run(self) -> None:
        raise NotImplementedError
