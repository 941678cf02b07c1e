"""What the I/O thread waits for: only connections that may have changed are asked."""

from __future__ import annotations

import math
import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from mlxproxy.server.poller import Poller

SECONDS = 10.0  # enough for any event; no wait of a test lasts that long


class Handler:
    """A connection as the poller sees it, which counts how often it is asked."""

    accepting = False

    def __init__(self) -> None:
        self.socket, self.peer = socket.socketpair()
        self.reads = True
        self.writes = False
        self.due = math.inf
        self.asked = self.expired = 0

    @property
    def descriptor(self) -> int:
        return self.socket.fileno()

    def readable(self) -> bool:
        self.asked += 1
        return self.reads

    def writable(self) -> bool:
        return self.writes

    def deadline(self) -> float:
        return self.due

    def expire(self) -> None:
        self.expired += 1
        self.due = math.inf


@pytest.fixture
def handlers() -> Iterator[list[Handler]]:
    made = [Handler() for _ in range(20)]
    yield made
    for handler in made:
        handler.socket.close()
        handler.peer.close()


@pytest.fixture
def poller(handlers: list[Handler]) -> Poller:
    poller = Poller()
    for handler in handlers:
        poller[handler.descriptor] = handler
    assert list(poller.wait(0)) == []
    return poller


def test_an_event_on_one_connection_asks_no_other(poller: Poller, handlers: list[Handler]) -> None:
    first, *others = handlers
    for _ in range(5):
        first.peer.send(b"x")
        assert list(poller.wait(SECONDS)) == [(first.descriptor, first, select.POLLIN)]
        first.socket.recv(1)
    assert list(poller.wait(0)) == []
    assert first.asked == 6
    assert [other.asked for other in others] == [1] * len(others)


def test_what_a_requests_thread_has_changed_is_noticed(
    poller: Poller, handlers: list[Handler]
) -> None:
    handler = handlers[7]
    handler.writes = True
    assert list(poller.wait(0)) == []  # nobody has said so
    worker = threading.Thread(target=poller.changed, args=(handler.descriptor, handler))
    worker.start()
    worker.join()
    assert list(poller.wait(SECONDS)) == [(handler.descriptor, handler, select.POLLOUT)]


def test_a_connection_that_reads_no_more_is_left_alone(
    poller: Poller, handlers: list[Handler]
) -> None:
    handler = handlers[0]
    handler.reads = False
    poller.changed(handler.descriptor, handler)
    handler.peer.send(b"x")
    assert list(poller.wait(0)) == []


def test_a_deadline_ends_the_wait_and_is_met_once(poller: Poller, handlers: list[Handler]) -> None:
    handler = handlers[3]
    handler.due = time.monotonic() + 0.02
    poller.changed(handler.descriptor, handler)
    while not handler.expired:
        assert list(poller.wait(SECONDS)) == []
        poller.expire()
    poller.expire()
    assert [other.expired for other in handlers] == [int(it is handler) for it in handlers]


def test_what_concerns_all_connections_is_asked_of_all(
    poller: Poller, handlers: list[Handler]
) -> None:
    for handler in handlers:
        handler.due = 0.0  # as when there is no room for another connection any more
    poller.look_at_all()
    assert [handler.expired for handler in handlers] == [1] * len(handlers)


def test_an_event_of_a_closed_connection_does_not_reach_the_one_that_got_its_descriptor(
    poller: Poller, handlers: list[Handler]
) -> None:
    first, second = handlers[:2]
    first.peer.send(b"x")
    second.peer.close()
    newcomer = Handler()
    try:
        handled = []
        for descriptor, handler, _ in poller.wait(SECONDS):
            handled.append(handler)
            other = second if handler is first else first
            del poller[other.descriptor]
            poller[other.descriptor] = newcomer
            del poller[descriptor]
        assert len(handled) == 1
        assert newcomer not in handled
    finally:
        newcomer.socket.close()
        newcomer.peer.close()


def test_a_closed_connection_is_not_waited_for(poller: Poller, handlers: list[Handler]) -> None:
    handler = handlers[0]
    poller.changed(handler.descriptor, handler)
    del poller[handler.descriptor]
    handler.peer.send(b"x")
    assert list(poller.wait(0)) == []
