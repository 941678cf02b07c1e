"""The vocabulary of the core: states, what is asked for, what is decided, what is told.

Nothing here acts. The core (`plan.py`) changes these objects under the controller's lock; the
frozen ones are handed out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mlxproxy.backend.spec import ModelSpec
from mlxproxy.errors import ProxyError

if TYPE_CHECKING:
    import threading

    from mlxproxy.backend.protocol import Address, Wire


class Moment(NamedTuple):
    """The time of an event: all arithmetic is on `monotonic`; `unix` is only told to people."""

    monotonic: float
    unix: float


class SlotState(str, Enum):
    """What a slot is doing. The values are part of the HTTP contract."""

    EMPTY = "empty"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"


class Phase(str, Enum):
    """How far an operation is. The values are part of the HTTP contract."""

    WAITING = "waiting"
    DRAINING = "draining"
    STOPPING = "stopping"
    STARTING = "starting"
    LOADING = "loading"
    WARMING = "warming"
    DONE = "done"
    FAILED = "failed"


class Cause(str, Enum):
    """Why an operation exists. The values are part of the HTTP contract."""

    ASKED = "asked"
    REQUEST = "request"  # a chat needs the model
    IDLE = "idle"
    EXIT = "death"
    PRESSURE = "pressure"  # memory runs out
    SHUTDOWN = "shutdown"


NEXT_STATES: Mapping[SlotState, frozenset[SlotState]] = {
    SlotState.EMPTY: frozenset({SlotState.LOADING}),
    SlotState.LOADING: frozenset({SlotState.READY, SlotState.EMPTY}),
    SlotState.READY: frozenset({SlotState.DRAINING, SlotState.STOPPING}),
    # Back to READY where the load that it was drained for is withdrawn.
    SlotState.DRAINING: frozenset({SlotState.READY, SlotState.STOPPING}),
    # A swap goes from STOPPING straight on to LOADING.
    SlotState.STOPPING: frozenset({SlotState.EMPTY, SlotState.LOADING}),
}


@dataclass(frozen=True)
class Limits:
    """The settings that the core decides by (seconds, counts): see settings.py.

    Attributes:
        max_concurrent: answers in flight on each slot.
        max_loaded: models in memory at a time.
        ended_grace: for answers that were ended to notice it; no setting.
        stop_timeout: for a process to end before it is killed.
    """

    drain_timeout: float = 120.0
    shutdown_timeout: float = 30.0
    idle_ttl: float = 0.0
    max_concurrent: int = 32
    max_queue: int = 64
    swap_on_request: bool = False
    ended_grace: float = 5.0
    stop_timeout: float = 10.0
    max_loaded: int = sys.maxsize


class Process(Protocol):
    """A backend process: the controller starts, watches and stops it, the core only hands it on.

    Attributes:
        last_byte_at: when the last byte of any answer came, in monotonic seconds.
    """

    last_byte_at: float

    @property
    def spec(self) -> ModelSpec:
        """What it was started for, as it was on disk then."""

    @property
    def pid(self) -> int | None:
        """Its number; None before the start."""

    @property
    def address(self) -> Address:
        """Where it answers."""

    @property
    def wire(self) -> Wire:
        """How its engine spells requests and answers."""

    @property
    def ended(self) -> str | None:
        """Why it can no longer generate, or None while it can."""

    @property
    def hung(self) -> bool:
        """Whether it was taken for dead because it sent nothing."""

    def command(self) -> list[str]:
        """Return its command line."""

    def start(self) -> None:
        """Start it."""

    def wait_ready(self, cancelled: threading.Event, on_phase: Callable[[str], None]) -> None:
        """Return when it has answered."""

    def stop(self) -> None:
        """End and reap it."""

    def check(self) -> str | None:
        """Ask it whether it can generate; return why it cannot."""

    def declare_hung(self, reason: str) -> None:
        """Take it for dead."""

    def has(self, feature: str) -> bool:
        """Return whether it has armed a feature."""

    def hang(self, waiting_since: float, stall_timeout: float) -> str | None:
        """Return why it hangs, as it says itself."""

    def answers_probe(self, patience: float) -> bool:
        """Return whether it answers a short chat within so many seconds; True, too, while another
        thread asks it, which will know."""

    def last_words(self) -> list[str]:
        """Return the last lines of its log, fit for a client."""

    def bytes_read(self) -> int | None:
        """Return the bytes read since the load began, where known."""

    def memory(self) -> int | None:
        """Return its resident memory in bytes."""


class Fallback(NamedTuple):
    """What to load for a request that names no model while nothing is loaded, or what to do."""

    spec: ModelSpec | None = None
    advice: str = ""


@dataclass(eq=False)
class Request:
    """A request's place: first in the queue, then on a slot, until it is released.

    Attributes:
        target: what it names, if that is a model we have; None: whatever is loaded.
        fallback: what to load for it if nothing is loaded and nothing is to be restored.
        advice: what its client can do if there is nothing to load, as a sentence.
        exclusive: whether it must have its slot to itself.
        turn: see `policy.next_in_turn`.
        slot: where it was granted; None before.
        error: why it is not granted, or why its answer is to end. The first one counts.
    """

    client: str
    target: ModelSpec | None = None
    fallback: ModelSpec | None = None
    advice: str = ""
    exclusive: bool = False
    since: float = 0.0
    turn: int = 0
    slot: int | None = None
    error: ProxyError | None = None


@dataclass(eq=False)
class Claim:
    """What one client wants of a load or an unload, from its request until the end.

    A load is carried out for its claims: one that has lost its last is withdrawn.

    Attributes:
        client: who asks, for a fair share.
        waits: whether its request waits for the end. A claim that nobody waits with lasts until
            the end, too, or until its client makes another such claim.
    """

    client: str = ""
    waits: bool = True
    since: float = 0.0
    operation: Operation | None = None


@dataclass(eq=False)
class Operation:
    """A load or an unload, and how far it is.

    Attributes:
        load: what is to be loaded; None for an unload.
        only: the slot that an unload is about; None: all.
        path: the model that an unload is about; None: whatever is loaded.
        claims: of those who asked for it and still want it.
        slot: where the load goes, once that is decided.
        victims: the slots that are emptied for it.
        launched: what its process reads, which may be newer than what was asked for.
        deadline: until when it waits for answers, in monotonic seconds.
        changed: whether there was anything to do.
        previous: the id of the model that was stopped for it.
        cancelled: why it is given up, if it is.
    """

    spec: ModelSpec | None
    cause: Cause
    since: float
    only: int | None = None
    path: str | None = None
    phase: Phase = Phase.WAITING
    claims: list[Claim] = field(default_factory=list)
    slot: int | None = None
    victims: tuple[int, ...] = ()
    launched: ModelSpec | None = None
    deadline: float = 0.0
    changed: bool = True
    previous: str | None = None
    cancelled: ProxyError | None = None
    error: ProxyError | None = None

    @property
    def is_placed(self) -> bool:
        """Whether the slots that it needs are its own."""
        return self.phase is not Phase.WAITING

    @property
    def is_over(self) -> bool:
        return self.phase in (Phase.DONE, Phase.FAILED)

    def serves(self, spec: ModelSpec) -> bool:
        """Whether it ends with what that load asks for; its process reads what is on disk then."""
        return self.spec == spec and (self.launched is None or spec.is_met_by(self.launched))

    def may_be_withdrawn(self) -> bool:
        """Whether it is a load for which nothing has been cut, stopped or started yet."""
        return self.spec is not None and self.phase in (Phase.WAITING, Phase.DRAINING)


@dataclass(eq=False)
class Slot:
    """A place for one backend process.

    Attributes:
        load: what its process is for, from the start to the end; None while it is empty.
        operation: what is to empty or fill it; nothing is granted on it then.
        exited: whether its process has ended, or can no longer generate, and is not reaped yet.
        ttl: of the last load that was asked for, equal ones included.
        pinned: whether it is never evicted for another; as the last load said, too.
        memory: bytes that its process was last seen to hold.
        ready_at: when its process had answered, in monotonic seconds.
        load_seconds: how long that took.
        restore: what the next request brings back.
    """

    id: int
    state: SlotState = SlotState.EMPTY
    state_since: float = 0.0  # Unix seconds
    spec: ModelSpec | None = None
    process: Process | None = None
    operation: Operation | None = None
    exited: bool = False
    loaded_at: float = 0.0  # Unix seconds
    last_use: float = 0.0
    ready_at: float = 0.0
    load_seconds: float = 0.0
    ttl: float | None = None
    pinned: bool = False
    memory: int = 0
    requests: list[Request] = field(default_factory=list)
    restore: ModelSpec | None = None

    @property
    def is_occupied(self) -> bool:
        """Whether it holds memory."""
        return self.spec is not None

    @property
    def needed_bytes(self) -> int:
        """What it needs: the larger of the estimate and of what was measured."""
        return 0 if self.spec is None else max(self.spec.needed_bytes, self.memory)

    @property
    def answers(self) -> bool:
        """Whether requests may be under way on its process."""
        return self.state in (SlotState.READY, SlotState.DRAINING)

    @property
    def may_grant(self) -> bool:
        """Whether new requests may be answered here."""
        return self.state is SlotState.READY and self.operation is None

    def enter(self, state: SlotState, unix: float) -> None:
        """Change the state, along an edge of `NEXT_STATES`."""
        assert state in NEXT_STATES[self.state], f"slot {self.id}: {self.state} → {state}"
        self.state, self.state_since = state, unix


# -- what is told: frozen, and JSON only in `blueprints/`


@dataclass(frozen=True)
class Failure:
    """Why the last load failed, or the last process ended."""

    spec: ModelSpec
    code: str
    reason: str
    at: float  # Unix seconds
    previous: str | None = None
    log: tuple[str, ...] = ()


@dataclass(frozen=True)
class SlotSnapshot:
    """One slot. `spec`, `loaded_at` and `ttl` are there while its model answers.

    Attributes:
        occupant: what holds its memory, whether it answers or not.
        last_use: Unix seconds.
        memory: bytes that its process was last seen to hold.
        waiting: requests in the queue that its model may answer.
    """

    id: int
    state: SlotState
    state_since: float
    spec: ModelSpec | None
    occupant: ModelSpec | None
    loaded_at: float | None
    last_use: float | None
    ttl: float | None
    pinned: bool
    pid: int | None
    port: int | None
    memory: int
    in_flight: int
    waiting: int
    idle_unload_in: float | None


@dataclass(frozen=True)
class OperationSnapshot:
    """A load or an unload that is under way."""

    spec: ModelSpec | None
    cause: Cause
    phase: Phase
    seconds: float


@dataclass(frozen=True)
class Snapshot:
    """The whole state at one moment.

    Attributes:
        main: the slot that the contract's single-model answers are about.
        operations: all that are under way, in their order.
    """

    slots: tuple[SlotSnapshot, ...]
    main: SlotSnapshot
    operations: tuple[OperationSnapshot, ...]
    in_flight: int
    waiting: int
    failure: Failure | None

    @property
    def operation(self) -> OperationSnapshot | None:
        """Return the first that is under way."""
        return self.operations[0] if self.operations else None


@dataclass(frozen=True)
class Progress:
    """How far a load is: only what is known, never an invented percentage.

    Attributes:
        slot: where it goes, once that is decided.
    """

    slot: int | None
    spec: ModelSpec | None
    phase: Phase
    seconds: float
    bytes_read: int | None
    bytes_total: int | None
    last_seconds: float | None


@dataclass(frozen=True)
class Loaded:
    """A load has ended well."""

    slot: int
    spec: ModelSpec
    seconds: float


@dataclass(frozen=True)
class Exited:
    """A process has ended by itself."""

    slot: int
    spec: ModelSpec
    reason: str


Event = Snapshot | Progress | Loaded | Exited


# -- what is decided, in the order in which it is to be performed


@dataclass(frozen=True)
class Grant:
    """Let the request be answered by that process."""

    request: Request
    slot: int
    process: Process


@dataclass(frozen=True)
class Reject:
    """Tell a request in the queue that it will not be granted."""

    request: Request
    error: ProxyError


@dataclass(frozen=True)
class Abort:
    """End an answer in flight."""

    request: Request
    error: ProxyError


@dataclass(frozen=True)
class Start:
    """Start a process for the load; come back with on_started or, once it is gone, on_failed."""

    slot: int
    spec: ModelSpec


@dataclass(frozen=True)
class Cancel:
    """Give up the start that is under way in a slot."""

    slot: int


@dataclass(frozen=True)
class Stop:
    """Stop the slot's process; come back with on_stopped."""

    slot: int
    process: Process


@dataclass(frozen=True)
class Finish:
    """Tell who waits for a load or unload how it ended."""

    claim: Claim
    error: ProxyError | None


@dataclass(frozen=True)
class Remember:
    """Keep for the next start of the proxy what was loaded, and how many seconds it took."""

    spec: ModelSpec
    seconds: float


@dataclass(frozen=True)
class Forget:
    """Keep for the next start of the proxy that this model, or any (None), is not to be loaded."""

    path: str | None = None


@dataclass(frozen=True)
class Emit:
    """Tell the subscribers."""

    event: Event


@dataclass(frozen=True)
class Log:
    """Write a line; the level is one of `logging`."""

    level: int
    line: str


@dataclass(frozen=True)
class Closed:
    """Nothing is left to do: the shutdown has ended."""


Effect = (
    Grant
    | Reject
    | Abort
    | Start
    | Cancel
    | Stop
    | Finish
    | Remember
    | Forget
    | Emit
    | Log
    | Closed
)
