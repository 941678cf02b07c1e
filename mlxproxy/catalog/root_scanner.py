"""One models folder and its last snapshot, brought up to date without making callers wait."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from mlxproxy.catalog.scanning import Snapshot

log = logging.getLogger("mlxproxy.catalog")


class RootScanner:
    """A scanner for one root, which runs in a thread of its own, one scan at a time.

    A disk that hangs blocks only that thread; callers get the last snapshot after a short wait, or
    immediately while the disk is known to hang.

    Args:
        root: the folder.
        remembered: returns what an earlier run knew about it.
        scan: brings a snapshot up to date.
        changed: called when the models differ from those before.

    All three are called in the scanning thread.
    """

    def __init__(
        self,
        root: str,
        remembered: Callable[[str], Snapshot],
        scan: Callable[[str, Snapshot], Snapshot],
        changed: Callable[[], None],
    ) -> None:
        self.root = root
        self._snapshot = Snapshot()
        self._remembered = remembered
        self._scan = scan
        self._on_change = changed
        self._condition = threading.Condition()
        self._wanted = 0  # scans are numbered from 1
        self._begun = 0
        self._ended = 0
        self._begun_at = 0.0
        self._scanning = False

    @property
    def snapshot(self) -> Snapshot:
        """The result of the last scan."""
        return self._snapshot

    @property
    def known(self) -> bool:
        """Whether a scan has ended, so that what is not in the snapshot was not there."""
        return self._ended > 0

    def request(self) -> int:
        """Request a scan that begins after this call; return its number."""
        with self._condition:
            self._wanted = self._begun + 1
            if not self._scanning:
                self._scanning = True
                threading.Thread(target=self._run, name="catalog", daemon=True).start()
            return self._wanted

    def wait(self, number: int, patience: float, until: float) -> bool:
        """Wait for that scan to end; return whether the snapshot is fresh.

        Args:
            number: what :meth:`request` returned.
            patience: seconds after which a scan counts as hanging and the wait ends.
            until: when the wait ends at the latest, on the monotonic clock.
        """
        with self._condition:
            while self._ended < number:
                now = time.monotonic()
                hanging = self._begun > self._ended and now - self._begun_at >= patience
                if hanging or now >= until:
                    return False
                self._condition.wait(until - now)
            return True

    def _run(self) -> None:
        if not self.known:
            self._snapshot = self._remembered(self.root)
        while self._begin():
            before = self._snapshot
            try:
                self._snapshot = self._scan(self.root, before)
            except Exception:
                log.exception("%s could not be scanned", self.root)
            with self._condition:
                self._ended = self._begun
                self._condition.notify_all()
            self._tell(before, self._snapshot)

    def _tell(self, before: Snapshot, after: Snapshot) -> None:
        for problem in sorted(after.problems - before.problems):
            log.warning("%s", problem)
        if after.entries is not before.entries and after.entries != before.entries:
            try:
                self._on_change()
            except Exception:
                log.exception("the inventory of %s could not be saved", self.root)

    def _begin(self) -> bool:
        with self._condition:
            self._scanning = self._begun < self._wanted
            if self._scanning:
                self._begun += 1
                self._begun_at = time.monotonic()
            return self._scanning
