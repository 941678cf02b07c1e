"""How many bytes of bodies are in memory at once: a share for each client, a limit for all."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from mlxproxy.errors import TooManyRequests

SMALL = 64 << 10  # bytes; bodies below are not counted: the number of requests is limited already


class Budget:
    """Bytes that requests hold from the reading of their bodies to the end of their answers.

    Args:
        limit: of all clients together. One client has half of it at most.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()

    def take(self, client: str, size: int) -> Callable[[], None]:
        """Take so many bytes; return what gives them back, to be called once.

        Raises:
            TooManyRequests: the client, or all together, hold too much already. Who holds nothing
                may take a body of any allowed size while the half of it is free.
        """
        if size < SMALL:
            return lambda: None
        with self._lock:
            own, all_together = self._held[client], self._held.total()
            if (own and own + size > self._limit // 2) or all_together + size > self._limit:
                raise TooManyRequests(
                    f"The bodies of the requests in flight take up {all_together:,} bytes "
                    f"({own:,} of them yours), so there is no room for {size:,} more. Try again "
                    "when one of them is done.",
                    retry_after=5,
                )
            self._held[client] += size

        def give_back() -> None:
            with self._lock:
                self._held[client] -= size
                if not self._held[client]:
                    del self._held[client]

        return give_back
