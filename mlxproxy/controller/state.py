"""The vocabulary of the core: states, requests, decisions (effects), and snapshots.

Nothing here acts. The core (`plan.py`) changes these objects under the controller's lock; the
frozen ones are given to others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mlxproxy.backend.spec import ModelSpec
from mlxproxy.errors import ProxyError

if TYPE_CHECKING:
    import threading

    from mlxproxy.backend.protocol import Address, Fields, Wire


class Moment(NamedTuple):
    """The time of an event: all arithmetic uses `monotonic`; `unix` is only shown to people."""

    monotonic: float
    unix: float


class SlotState(str, Enum):
    """The state of a slot. The values are part of the HTTP contract."""

    EMPTY = "empty"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"


class Phase(str, Enum):
    """The phase of an operation. The values are part of the HTTP contract."""

    WAITING = "waiting"
    DRAINING = "draining"
    STOPPING = "stopping"
    STARTING = "starting"
    LOADING = "loading"
    WARMING = "warming"
    DONE = "done"
    FAILED = "failed"


class Cause(str, Enum):
    """The reason for an operation. The values are part of the HTTP contract."""

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
    # Back to READY if the load that it was drained for is withdrawn.
    SlotState.DRAINING: frozenset({SlotState.READY, SlotState.STOPPING}),
    # A swap goes directly from STOPPING to LOADING.
    SlotState.STOPPING: frozenset({SlotState.EMPTY, SlotState.LOADING}),
}


@dataclass(frozen=True)
class Limits:
    """The settings that the core uses (seconds, counts): see settings.py.

    Attributes:
        max_concurrent: answers in flight on each slot.
        max_loaded: models in memory at a time.
        ended_grace: in which aborted answers have to notice the abort; not a setting.
        stop_timeout: in which a process has to exit before it is killed.
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
    """A backend process: the controller starts, watches and stops it; the core only passes it on.

    Attributes:
        last_byte_at: when the last byte of any answer came, in monotonic seconds.
    """

    last_byte_at: float

    @property
    def spec(self) -> ModelSpec:
        """The load that it was started for, as its model was on disk then."""

    @property
    def pid(self) -> int | None:
        """The process id; None before the start."""

    @property
    def address(self) -> Address:
        """The address at which it answers."""

    @property
    def wire(self) -> Wire:
        """The wire format of its engine's requests and answers."""

    @property
    def ended(self) -> str | None:
        """The reason why it can no longer generate; None while it can."""

    @property
    def hung(self) -> bool:
        """Whether it was declared dead because it sent nothing."""

    def command(self) -> list[str]:
        """Return its command line."""

    def start(self) -> None:
        """Start it."""

    def wait_ready(self, cancelled: threading.Event, on_phase: Callable[[str], None]) -> None:
        """Return when it has answered."""

    def stop(self) -> None:
        """Stop and reap it."""

    def check(self) -> str | None:
        """Ask it whether it can generate; return why it cannot."""

    def declare_hung(self, reason: str) -> None:
        """Declare it dead."""

    @property
    def features(self) -> Collection[str]:
        """The features that it has enabled."""

    def has(self, feature: str) -> bool:
        """Return whether it has a feature enabled."""

    def hang(self, waiting_since: float, stall_timeout: float) -> str | None:
        """Return why it hangs, as it reports itself; None while it lives."""

    def count_tokens(self, fields: Fields) -> int | None:
        """Return how many tokens the prompt of a checked chat has; None if it does not tell."""

    def answers_probe(self, patience: float) -> bool:
        """Return whether it answers a short chat within `patience` seconds; also return True while
        another thread is asking it, which will find out."""

    def last_words(self) -> list[str]:
        """Return the last lines of its log, fit for a client."""

    def bytes_read(self) -> int | None:
        """Return the bytes read since the load began, if known."""

    def memory(self) -> int | None:
        """Return its resident memory in bytes."""


class Fallback(NamedTuple):
    """The load for a request that names no model while nothing is loaded, or else advice."""

    spec: ModelSpec | None = None
    advice: str = ""


@dataclass(eq=False)
class Request:
    """A request's place: first in the queue, then on a slot, until it is released.

    Attributes:
        target: the model that it names, if that is a known one; None: whatever is loaded.
        fallback: what to load for it if nothing is loaded and nothing is to be restored.
        advice: what its client can do if there is nothing to load, as a sentence.
        exclusive: whether it must have its slot to itself.
        turn: see `policy.next_in_turn`.
        slot: where it was granted; None before.
        loaded: how many seconds of its wait were a load, once it is granted.
        error: why it was rejected, or why its answer was aborted. The first one counts.
    """

    client: str
    target: ModelSpec | None = None
    fallback: ModelSpec | None = None
    advice: str = ""
    exclusive: bool = False
    since: float = 0.0
    turn: int = 0
    slot: int | None = None
    loaded: float = 0.0
    error: ProxyError | None = None


@dataclass(eq=False)
class Claim:
    """One client's interest in a load or an unload, from its request until the end.

    A load is carried out for its claims: a load that has lost its last claim is withdrawn.

    Attributes:
        client: whose claim it is, for fair sharing.
        waits: whether its request waits for the end. A claim without a waiting request also lasts
            until the end, or until its client makes another such claim.
    """

    client: str = ""
    waits: bool = True
    since: float = 0.0
    operation: Operation | None = None


@dataclass(eq=False)
class Operation:
    """A load or an unload, and its progress.

    Attributes:
        spec: the model to load, with its options; None for an unload.
        only: the slot that an unload is about; None: all.
        path: the model that an unload is about; None: whatever is loaded.
        claims: those of the clients that requested it and still want it.
        slot: where the load goes, once that is decided.
        victims: the slots that are emptied for it.
        launched: what its process reads, which may be newer than what was requested.
        deadline: until when it waits for answers, in monotonic seconds.
        changed: whether there was anything to do.
        previous: the id of the model that was stopped for it.
        cancelled: why it was cancelled, if it was.
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
        """Whether it has been given the slots that it needs."""
        return self.phase is not Phase.WAITING

    @property
    def is_over(self) -> bool:
        return self.phase in (Phase.DONE, Phase.FAILED)

    def serves(self, spec: ModelSpec) -> bool:
        """Return whether it ends with what that load requests; its process reads the disk later."""
        return self.spec == spec and (self.launched is None or spec.is_met_by(self.launched))

    def may_be_withdrawn(self) -> bool:
        """Return whether it is a load for which nothing was aborted, stopped or started yet."""
        return self.spec is not None and self.phase in (Phase.WAITING, Phase.DRAINING)


@dataclass(eq=False)
class Slot:
    """A place for one backend process.

    Attributes:
        spec: what its process is for, from the start to the end; None while it is empty.
        operation: the one that empties or fills it; nothing is granted on it meanwhile.
        exited: whether its process has exited, or can no longer generate, and is not reaped yet.
        ttl: that of the last requested load, equal loads included.
        pinned: whether it is never evicted for another model; also as the last load said.
        memory: bytes that its process held at the last measurement.
        ready_at: when its process had answered, in monotonic seconds.
        load_seconds: how long that took.
        restore: the load that the next request restores.
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
        """The memory that it needs: the larger of the estimate and the measurement."""
        return 0 if self.spec is None else max(self.spec.needed_bytes, self.memory)

    @property
    def answers(self) -> bool:
        """Whether requests may be in flight on its process."""
        return self.state in (SlotState.READY, SlotState.DRAINING)

    @property
    def may_grant(self) -> bool:
        """Whether new requests may be answered here."""
        return self.state is SlotState.READY and self.operation is None

    def enter(self, state: SlotState, unix: float) -> None:
        """Change the state, along an edge of `NEXT_STATES`."""
        assert state in NEXT_STATES[self.state], f"slot {self.id}: {self.state} → {state}"
        self.state, self.state_since = state, unix


# -- snapshots and events: frozen; only `blueprints/` turns them into JSON


@dataclass(frozen=True)
class Failure:
    """The reason why the last load failed, or why the last process crashed."""

    spec: ModelSpec
    code: str
    reason: str
    at: float  # Unix seconds
    previous: str | None = None
    log: tuple[str, ...] = ()


@dataclass(frozen=True)
class SlotSnapshot:
    """One slot. `spec`, `loaded_at` and `ttl` are set while its model answers.

    Attributes:
        occupant: the load that holds its memory, whether it answers or not.
        last_use: Unix seconds.
        memory: bytes that its process held at the last measurement.
        waiting: queued requests that its model may answer.
        features: those that its process has enabled, in order.
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
    features: tuple[str, ...]


@dataclass(frozen=True)
class OperationSnapshot:
    """A load or an unload in progress."""

    spec: ModelSpec | None
    cause: Cause
    phase: Phase
    seconds: float


@dataclass(frozen=True)
class Snapshot:
    """The whole state at one moment.

    Attributes:
        main: the slot that the contract's single-model answers are about.
        operations: all that are in progress, in order.
    """

    slots: tuple[SlotSnapshot, ...]
    main: SlotSnapshot
    operations: tuple[OperationSnapshot, ...]
    in_flight: int
    waiting: int
    failure: Failure | None

    @property
    def operation(self) -> OperationSnapshot | None:
        """The first operation in progress, if any."""
        return self.operations[0] if self.operations else None


@dataclass(frozen=True)
class Progress:
    """The progress of a load: only what is known, never an invented percentage.

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
    """The event that a load has succeeded."""

    slot: int
    spec: ModelSpec
    seconds: float


@dataclass(frozen=True)
class Exited:
    """The event that a process has crashed."""

    slot: int
    spec: ModelSpec
    reason: str


Event = Snapshot | Progress | Loaded | Exited


# -- effects, performed in the order in which they were decided


@dataclass(frozen=True)
class Grant:
    """Let this process answer the request."""

    request: Request
    slot: int
    process: Process


@dataclass(frozen=True)
class Reject:
    """Reject a queued request."""

    request: Request
    error: ProxyError


@dataclass(frozen=True)
class Abort:
    """Abort an answer in flight."""

    request: Request
    error: ProxyError


@dataclass(frozen=True)
class Start:
    """Start a process for the load; report on_started or, once it is gone, on_failed."""

    slot: int
    spec: ModelSpec


@dataclass(frozen=True)
class Cancel:
    """Cancel the start in progress in a slot."""

    slot: int


@dataclass(frozen=True)
class Stop:
    """Stop the slot's process; report on_stopped."""

    slot: int
    process: Process


@dataclass(frozen=True)
class Finish:
    """Report the outcome of a load or unload to a client that waits for it."""

    claim: Claim
    error: ProxyError | None


@dataclass(frozen=True)
class Remember:
    """Store for the next start of the proxy what was loaded, and how many seconds it took."""

    spec: ModelSpec
    seconds: float


@dataclass(frozen=True)
class Forget:
    """Store for the next start of the proxy not to load this model, or any model (None)."""

    path: str | None = None


@dataclass(frozen=True)
class Emit:
    """Send an event to the subscribers."""

    event: Event


@dataclass(frozen=True)
class Log:
    """Write a line; the level is one of `logging`."""

    level: int
    line: str


@dataclass(frozen=True)
class Closed:
    """End the shutdown: nothing is left to do."""


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
