"""The rules of the core, as functions: whose turn it is, whom to reject, what fits, what to evict.

Places are shared round-robin among clients. A client's turn is the moment since which it has waited
without being served, as a number that only grows: the arrival of its request, or the last grant to
it if that came later. So a client that is served goes behind all that wait at that moment, however
many requests it has; and nothing needs to be stored about a client that has nothing waiting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol, TypeVar

from mlxproxy.backend.memory import Fit
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.controller.state import Operation, Slot

# After this many crashes within this many seconds, a model stays down until a load is requested.
CRASH_LOOP_EXITS, CRASH_LOOP_SECONDS = 3, 300.0
# An exclusive request (see guard) lets others overtake it for this long, then has its turn.
EXCLUSIVE_PATIENCE_SECONDS = 10.0
# A model in use is not swapped out for a request that names another one before its turn is over. A
# turn lasts this many times as long as the load took, so that swaps take at most a third of the
# time, but no longer than a minute. A model is in use while it answers and for a moment afterwards
# (at most as long as its load), in which a client that has read one answer sends its next request.
TURN_LOADS, LONGEST_TURN_SECONDS = 2.0, 60.0
BETWEEN_REQUESTS_SECONDS = 1.0
# After an unload because of a memory shortage, this long passes before the next one: the system's
# figures are averages of the last ten seconds, and have to catch up first.
RELIEF_PAUSE_SECONDS = 10.0


class Waiting(Protocol):
    """A request that waits for a place.

    Attributes:
        client: whose request it is.
        turn: the moment since which that client has waited without being served.
    """

    client: str
    turn: int


class Owned(Protocol):
    """Anything that waits on behalf of a client."""

    client: str


class Exclusive(Protocol):
    """A request that may have to be answered alone.

    Attributes:
        since: when it came, in monotonic seconds.
    """

    exclusive: bool
    since: float


W = TypeVar("W", bound=Waiting)
T = TypeVar("T", bound=Owned)


def next_in_turn(waiting: Sequence[W], held: Mapping[str, int]) -> W:
    """Return the request to serve next: one of the client that holds the fewest places and, among
    such clients, has waited longest. The requests of one client stay in order.

    Args:
        waiting: in the order of their arrival; at least one.
        held: how many places each client holds.
    """
    return min(waiting, key=lambda request: (held.get(request.client, 0), request.turn))


def most_places(max_concurrent: int) -> int:
    """Return how many places one client may hold: one of every eight is reserved for short answers
    to other clients, however long this client's are."""
    return max_concurrent - max_concurrent // 8


def served(waiting: Sequence[Waiting], client: str, now: int) -> None:
    """Put a client that has just been served behind all that wait.

    Args:
        now: a number greater than every turn assigned before.
    """
    for request in waiting:
        if request.client == client:
            request.turn = now


def turned_away(waiting: Sequence[T]) -> T:
    """Return whom to reject if one too many waits: the newest of the client with the most.

    Args:
        waiting: in the order of their arrival; the newcomer, which is rejected if its client is
            among those with the most, is the last.
    """
    counts = Counter(each.client for each in waiting)
    greedy, most = counts.most_common(1)[0]
    if counts[waiting[-1].client] == most:
        return waiting[-1]
    return next(each for each in reversed(waiting) if each.client == greedy)


# -- exclusive requests, idleness, crashes


def may_go(request: Exclusive, in_flight: Sequence[Exclusive]) -> bool:
    """Return whether the request may be answered alongside those in flight."""
    return not in_flight or not (request.exclusive or any(other.exclusive for other in in_flight))


def has_waited_enough(request: Exclusive, now: float) -> bool:
    """Return whether an exclusive request no longer lets others overtake it."""
    return request.exclusive and now - request.since > EXCLUSIVE_PATIENCE_SECONDS


def idle_deadline(last_use: float, ttl: float | None, default: float) -> float | None:
    """Return when an idle model is to be unloaded; None: never.

    Args:
        ttl: the load's, in seconds; None: the default. 0 means never.
    """
    seconds = default if ttl is None else ttl
    return last_use + seconds if seconds else None


def recent_exits(exits: Sequence[float], now: float) -> list[float]:
    """Return the exits that still count, including one at `now`."""
    return [moment for moment in exits if now - moment < CRASH_LOOP_SECONDS] + [now]


def is_crash_loop(exits: Sequence[float]) -> bool:
    """Return whether a process has crashed too often to be restarted automatically."""
    return len(exits) >= CRASH_LOOP_EXITS


def turn_ends(slot: Slot) -> float:
    """Return when the turn of a slot's model is over, in monotonic seconds.

    Until then, requests for other models do not evict it.
    """
    end = slot.ready_at + min(TURN_LOADS * slot.load_seconds, LONGEST_TURN_SECONDS)
    if slot.requests:
        return end
    return min(end, slot.last_use + min(slot.load_seconds, BETWEEN_REQUESTS_SECONDS))


# -- memory


@dataclass(frozen=True)
class Placement:
    """The slot that a load goes to, and the slots that are emptied for it."""

    slot: int
    victims: tuple[int, ...]


@dataclass(frozen=True)
class Shortage:
    """The reason why a load cannot fit, whatever is evicted for it.

    Attributes:
        fit: the numbers.
        pinned: the pinned models that would have to be evicted.
        is_full: whether places are missing, not memory: pinned models hold all of them.
    """

    fit: Fit
    pinned: tuple[ModelSpec, ...] = ()
    is_full: bool = False


def shortage(
    spec: ModelSpec, slots: Sequence[Slot], budget: int, max_loaded: int
) -> Shortage | None:
    """Return why the load cannot fit, whatever is evicted for it; None if it can.

    A forced load fits into any memory. A load of a pinned model takes that model's place.
    """
    kept = [
        slot for slot in slots if slot.pinned and slot.spec is not None and not _same(slot, spec)
    ]
    pinned = tuple(slot.spec for slot in kept if slot.spec is not None)
    available = budget - sum(slot.needed_bytes for slot in kept)
    fit = Fit(spec.needed_bytes, max(0, available))
    if len(kept) >= min(max_loaded, len(slots)):
        return Shortage(fit, pinned, is_full=True)
    if spec.force or fit.fits:
        return None
    if spec.needed_bytes > budget:
        return Shortage(Fit(spec.needed_bytes, budget))
    return Shortage(fit, pinned)


def place(
    spec: ModelSpec,
    slots: Sequence[Slot],
    reserved: Sequence[Operation],
    budget: int,
    max_loaded: int,
) -> Placement | None:
    """Return where a load goes now; None while it has to wait for other operations.

    Evict never a pinned model, never a busy one if an idle one suffices, as few as possible, and
    the longest unused first. A slot that another operation empties still counts as occupied, since
    that operation may be withdrawn. A model is loaded only once: with other options, it takes its
    own place.

    Args:
        reserved: the loads that have been given their slots but have not started yet.
        budget: bytes for all models together.
    """
    own = [slot for slot in slots if _same(slot, spec)]
    if not all(slot.may_grant for slot in own):
        return None
    if any(item.spec is not None and item.spec.path == spec.path for item in reserved):
        return None
    free = [slot for slot in slots if not slot.is_occupied and slot.operation is None]
    candidates = sorted(
        (slot for slot in slots if slot.may_grant and not slot.pinned and slot not in own),
        key=lambda slot: slot.last_use,
    )
    occupied = [slot for slot in slots if slot.is_occupied]

    def suffices(victims: Sequence[Slot]) -> bool:
        kept = [slot for slot in occupied if slot not in victims]
        is_room = bool(free or victims) and len(kept) + len(reserved) < max_loaded
        return is_room and _used(kept, reserved) + spec.needed_bytes <= budget

    best = min(
        (
            (*own, *victims)
            for count in range(len(candidates) + 1)
            for victims in combinations(candidates, count)
            if suffices((*own, *victims))
        ),
        key=lambda victims: (sum(bool(slot.requests) for slot in victims), len(victims)),
        default=None,
    )
    if best is None and spec.force:  # evict all that may be evicted, once nothing is in progress
        settled = all(slot.operation is None and not slot.exited for slot in slots)
        best = (*own, *candidates) if settled and not reserved else None
    if best is None or not (free or best):
        return None
    # Its own slot; of the free ones, one that has nothing else to restore.
    target = min(own or free or best, key=lambda slot: (slot.restore not in (None, spec), slot.id))
    return Placement(target.id, tuple(slot.id for slot in best))


def fits(spec: ModelSpec, kept: Sequence[Slot], reserved: Sequence[Operation], budget: int) -> bool:
    """Return whether a load fits beside what is kept and what has been promised a place."""
    return spec.force or _used(kept, reserved) + spec.needed_bytes <= budget


def _used(kept: Sequence[Slot], reserved: Sequence[Operation]) -> int:
    promised = sum(item.spec.needed_bytes for item in reserved if item.spec is not None)
    return sum(slot.needed_bytes for slot in kept) + promised


def relief(slots: Sequence[Slot]) -> Slot | None:
    """Return the slot to empty if memory runs out: of those that are idle and not pinned, the
    longest unused one."""
    idle = (slot for slot in slots if slot.may_grant and not slot.requests and not slot.pinned)
    return min(idle, key=lambda slot: slot.last_use, default=None)


def _same(slot: Slot, spec: ModelSpec) -> bool:
    return slot.spec is not None and slot.spec.path == spec.path
