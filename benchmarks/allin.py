"""The price of answers with that of their requests in it, which the steady state does not show.

The processor time counts from before the first connection until after the last one has ended.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import load, wire
from benchmarks.load import RECV_BYTES, Work
from benchmarks.processes import cpu_seconds

CLIENTS = 8  # of whole answers, each asking again as soon as it is answered
ENDED_SECONDS = 0.05  # in which a contestant closes what its clients have closed
# The same pace as in the steady state, see `rounds.WORKS`.
STREAMED = {
    f"{streams} x {events}": Work(streams=streams, events=events, interval=interval)
    for streams, events, interval in ((32, 20, 10), (32, 60, 10), (32, 100, 10), (256, 60, 80))
}
WHOLE = {f"whole, {tokens}": tokens for tokens in (20, 60, 100)}
MAIN, MANY, SHORT = "32 x 100", "256 x 60", "whole, 20"


@dataclass(frozen=True)
class Price:
    """The price of some answers.

    Attributes:
        cpu: microseconds of processor time for each answer.
        rate: answers per second.
    """

    cpu: float
    rate: float


def streamed(port: int, pids: Sequence[int], work: Work, batches: int) -> Price:
    """Return the price of streams, in batches that start at the same time.

    Raises:
        RuntimeError: a stream was not whole.
    """
    began, used = time.monotonic(), cpu_seconds(pids)
    for _ in range(batches):
        for number, pieces in enumerate(load.streams(port, work)):
            if not wire.answer(pieces).is_whole(number, work.events):
                raise RuntimeError("a stream is not whole")
    return _price(pids, began, used, batches * work.streams)


def whole(port: int, pids: Sequence[int], tokens: int, answers: int) -> Price:
    """Return the price of whole answers whose tokens are there at once, at saturation.

    Raises:
        RuntimeError: an answer was missing or incomplete.
    """
    request = wire.request(port, {"events": tokens, "interval": 0}, stream=False)
    began, used = time.monotonic(), cpu_seconds(pids)
    asked = 0
    with selectors.DefaultSelector() as selector:

        def ask() -> None:
            nonlocal asked
            asked += 1
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(request)
            selector.register(connection, selectors.EVENT_READ, bytearray())

        for _ in range(min(CLIENTS, answers)):
            ask()
        while selector.get_map():
            for key, _ in selector.select():
                connection, raw = key.fileobj, key.data
                assert isinstance(connection, socket.socket)
                data = connection.recv(RECV_BYTES)
                raw += data
                if not data:
                    raise RuntimeError(f"no whole answer: {bytes(raw[:300])!r}")
                if wire.is_answered(bytes(raw)):
                    selector.unregister(connection)
                    connection.close()
                    if asked < answers:
                        ask()
    return _price(pids, began, used, answers)


def _price(pids: Sequence[int], began: float, used: float, answers: int) -> Price:
    seconds = time.monotonic() - began
    time.sleep(ENDED_SECONDS)
    return Price((cpu_seconds(pids) - used) / answers * 1e6, answers / seconds)
