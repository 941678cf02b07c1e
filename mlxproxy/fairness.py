"""Whose turn it is, and who has to go where too many wait: rules without a clock or a lock.

Round-robin among clients. A client's turn is the moment since which it has waited without being
served, as a number that only grows: the arrival of its request, or the last grant to it if that
came later. So a client that is served goes behind all who wait at that moment, however many
requests it has; and nothing need be remembered of a client that has nothing waiting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar


class Waiting(Protocol):
    """A request that waits for a place.

    Attributes:
        client: whose it is.
        turn: since when that client has waited without being served.
    """

    client: str
    turn: int


class Owned(Protocol):
    """Anything that waits for a client."""

    client: str


W = TypeVar("W", bound=Waiting)
T = TypeVar("T", bound=Owned)


def next_in_turn(waiting: Sequence[W], held: Mapping[str, int]) -> W:
    """Return the request to serve next: of the client that holds the fewest places, and among
    those of the one that has waited longest; one client's requests stay in their order.

    Args:
        waiting: in the order of their arrival; at least one.
        held: how many places each client holds.
    """
    return min(waiting, key=lambda it: (held.get(it.client, 0), it.turn))


def served(waiting: Sequence[Waiting], client: str, now: int) -> None:
    """Put a client that has just been served behind all who wait.

    Args:
        now: a number greater than every turn given out before.
    """
    for request in waiting:
        if request.client == client:
            request.turn = now


def turned_away(waiting: Sequence[T]) -> T:
    """Return who has to go where one too many waits: the newest of the client with the most.

    Args:
        waiting: in the order of their arrival; the newcomer, who goes if its client is among those
            with the most, is the last.
    """
    counts = Counter(it.client for it in waiting)
    greedy, most = counts.most_common(1)[0]
    if counts[waiting[-1].client] == most:
        return waiting[-1]
    return next(it for it in reversed(waiting) if it.client == greedy)
