"""Events for subscribers: publishing never waits, and a subscriber that is too slow loses some."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

from mlxproxy.errors import TooManyRequests

KEPT = 512  # events that a slow reader may lag behind
FOLLOWERS = 16  # each holds a thread of the server's reserve
FOLLOWERS_OF_ONE = 8  # at most, per client, so that there is room for others

Event = tuple[str, dict[str, Any]]


class Subscriber:
    """One follower's queue: the events since it subscribed; beyond KEPT, the oldest are dropped."""

    def __init__(self, kinds: frozenset[str] | None, client: str) -> None:
        self.kinds = kinds
        self.client = client
        self.lost = 0
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()

    def put(self, event: Event) -> None:
        with self._changed:
            if len(self._events) >= KEPT:
                self._events.popleft()
                self.lost += 1
            self._events.append(event)
            self._changed.notify()

    def get(self, timeout: float) -> Event | None:
        """Return the next event; None after `timeout` seconds without one, or after `wake`."""
        with self._changed:
            if not self._events:
                self._changed.wait(timeout)
            return self._events.popleft() if self._events else None

    def wake(self) -> None:
        """End a wait in `get`."""
        with self._changed:
            self._changed.notify()


class EventBus:
    """The place where events are published and followed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._followers: set[Subscriber] = set()
        self.closed = False

    def publish(self, kind: str, data: dict[str, Any]) -> None:
        """Send an event to all followers; never block, so it may be called under any lock."""
        with self._lock:
            followers = [it for it in self._followers if it.kinds is None or kind in it.kinds]
        if followers:
            event = (kind, {"at": round(time.time(), 3), **data})
            for follower in followers:
                follower.put(event)

    def subscribe(self, *kinds: str, client: str = "") -> Subscriber:
        """Return a new follower of these kinds of event (of all, if none is named).

        Raises:
            TooManyRequests: this client, or all clients together, have as many followers as are
                allowed; one more could leave no thread for others.
        """
        subscription = Subscriber(frozenset(kinds) or None, client)
        with self._lock:
            own = sum(it.client == client for it in self._followers)
            if own >= FOLLOWERS_OF_ONE or len(self._followers) >= FOLLOWERS:
                raise TooManyRequests(
                    f"There are already {len(self._followers)} followers of logs and events, "
                    f"{own} of them yours. Close one of yours first.",
                    retry_after=30,
                )
            self._followers.add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscriber) -> None:
        with self._lock:
            self._followers.discard(subscription)

    def close(self) -> None:
        """Wake all followers so that they end: the proxy is about to stop."""
        self.closed = True
        with self._lock:
            followers = list(self._followers)
        for follower in followers:
            follower.wake()
