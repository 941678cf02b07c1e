"""A limit on the bytes of bodies in memory at the same time: per client, and for all together."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from mlxproxy.errors import TooManyRequests

SMALL = 64 << 10  # bytes; smaller bodies are not counted: the number of requests is limited anyway


class Budget:
    """The bytes that requests hold from reading their bodies until their answers end.

    Args:
        limit: bytes for all clients together. One client may hold at most half of it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()

    def take(self, client: str, size: int) -> Callable[[], None]:
        """Reserve `size` bytes; return a function that releases them, to be called once.

        Raises:
            TooManyRequests: the client, or all clients together, hold too much already. A client
                that holds nothing may exceed its half, as long as the limit for all is kept.
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
