"""The core in a world without threads, where time advances only when it is told to.

The world does what the core says, and checks the invariants after each event, in its own terms:
it never uses the core's own rules to check them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any

from mlxproxy.backend.protocol import Address
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.controller.plan import Scheduler
from mlxproxy.controller.policy import Placement
from mlxproxy.controller.state import (
    Abort,
    Cancel,
    Cause,
    Claim,
    Closed,
    Effect,
    Emit,
    Exited,
    Finish,
    Grant,
    Limits,
    Moment,
    Operation,
    Phase,
    Reject,
    Request,
    Slot,
    SlotState,
    Start,
    Stop,
)
from mlxproxy.errors import (
    LoadCancelled,
    LoadFailed,
    ModelSwapped,
    ModelUnloaded,
    ProxyError,
    ShuttingDown,
)
from tests.support.fake_backend import model_spec

DRAIN, STOP, GRACE = 120.0, 30.0, 5.0  # seconds
LOAD = 1.0  # seconds that a load takes
TURN, PAUSE = 2.0, 1.0  # a turn in load times of the model; seconds between two requests


class Process:
    """A process that only has a name."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec, self.pid, self.address = spec, 1, Address("127.0.0.1", 1)
        self.features: tuple[str, ...] = ()
        self.ready = False
        self.stopping = False


class Watched(Scheduler):
    """A core whose choice of victims is checked when it is made.

    Attributes:
        ttls: the ttl of the most recently requested load, by its operation.
        asked_for: the paths that loads have named, the most recent one last.
        began: when each slot's process became ready.
        took: how long that had taken, as far as it counts.
        used: when each slot was last used.
    """

    def __init__(self, limits: Limits, slots: int) -> None:
        super().__init__(limits, slots)
        self.ttls: dict[Operation, float | None] = {}
        self.asking: ModelSpec | None = None
        self.asked_for: list[str] = []
        self.began: dict[int, float] = {}
        self.took: dict[int, float] = {}
        self.used: dict[int, float] = {}

    def _claim(self, operation: Operation, claim: Claim) -> None:
        if self.asking is not None:
            self.ttls.pop(operation, None)
            self.ttls[operation] = self.asking.ttl
            self.asked_for.append(self.asking.path)
        super()._claim(operation, claim)

    def _join(self, operation: Operation, equal: Operation) -> None:
        self.ttls.pop(equal, None)
        renamed = {operation: equal}
        self.ttls = {renamed.get(each, each): ttl for each, ttl in self.ttls.items()}
        super()._join(operation, equal)

    def _begin(self, operation: Operation, placement: Placement, now: Moment) -> None:
        if operation.spec is not None and not operation.spec.force:
            _check_victims(self, operation.spec, placement)
        if operation.spec is not None and operation.cause is Cause.REQUEST:
            for slot in (self.slots[number] for number in placement.victims):
                unused = not slot.requests and now.monotonic >= self.used[slot.id] + PAUSE
                over = now.monotonic >= self.began[slot.id] + TURN * self.took[slot.id]
                assert over or unused, "a model that is in use was swapped out before its turn"
        super()._begin(operation, placement, now)

    def _grant(self, slot: Slot, now: Moment) -> bool:
        before = list(slot.requests)
        granted = super()._grant(slot, now)
        ready = [each for each in self.slots if each.may_grant]
        for request in (each for each in slot.requests if each not in before):
            paths = [each.spec.path for each in ready if each.spec]
            assert slot.spec is not None
            if request.target is not None and request.target.path in paths:
                assert request.target.path == slot.spec.path, "the model it names is there"
            elif asked := [path for path in reversed(self.asked_for) if path in paths]:
                assert asked[0] == slot.spec.path, "not the model that a load named last"
        return granted


def _check_victims(core: Scheduler, spec: ModelSpec, placement: Placement) -> None:
    """Check the victims: none pinned, the fewest busy, the fewest, the least recently used."""

    def may_go(slot: Slot) -> bool:
        ready = slot.state is SlotState.READY and not slot.exited and slot.operation is None
        return ready and slot.spec is not None and not slot.pinned

    own = [slot for slot in core.slots if slot.spec and slot.spec.path == spec.path]
    chosen = [core.slots[number] for number in placement.victims]
    assert all(slot in chosen for slot in own), "one model in two places"
    assert all(may_go(slot) or slot in own for slot in chosen), "what may not be evicted was chosen"
    coming = [
        item.spec
        for item in core.operations
        if item.spec and item.spec is not spec and item.phase in (Phase.DRAINING, Phase.STOPPING)
    ]

    def suffices(victims: Iterable[Slot]) -> bool:
        stay = [slot.needed_bytes for slot in core.slots if slot.spec and slot not in victims]
        kept = [*stay, *(each.needed_bytes for each in coming)]
        room = any(not slot.spec and not slot.operation for slot in core.slots) or any(victims)
        fits = sum(kept) + spec.needed_bytes <= core.budget
        return room and fits and len(kept) < core.limits.max_loaded

    def cost(victims: Iterable[Slot]) -> tuple[int, int, list[float]]:
        victims = list(victims)
        busy = sum(bool(slot.requests) for slot in victims)
        return busy, len(victims), sorted(slot.last_use for slot in victims)

    candidates = [slot for slot in core.slots if may_go(slot) and slot not in own]
    choices = [
        [*own, *choice]
        for size in range(len(candidates) + 1)
        for choice in combinations(candidates, size)
        if suffices([*own, *choice])
    ]
    assert choices, "something was stopped for a model that does not fit"
    assert cost(chosen) == min(map(cost, choices)), "a better choice of victims was there"


class House:
    """A core, its world, and the checks.

    Args:
        slots: the number of slots.
        budget: bytes for all models together; None: unlimited.
        limits: see `Limits`.
    """

    def __init__(self, slots: int = 1, budget: int | None = None, **limits: Any) -> None:
        defaults = {"drain_timeout": DRAIN, "shutdown_timeout": STOP, "ended_grace": GRACE}
        self.limits = Limits(**{**defaults, **limits})
        self.core = Watched(self.limits, slots)
        if budget is not None:
            self.core.on_memory(budget)
        self.time = 1000.0
        self.processes: dict[int, Process] = {}
        self.cancelled: set[int] = set()
        self.starts: list[str] = []
        self.stops: list[str] = []
        self.exits: list[Exited] = []
        self.effects: list[Effect] = []
        self.requests: list[Request] = []
        self.granted: dict[Request, Process] = {}
        self.granted_on: Counter[str] = Counter()
        self.released: set[Request] = set()
        self.claims: list[Claim] = []
        self.ended: dict[Claim, ProxyError | None] = {}
        self.used = self.core.used
        self.measured: dict[int, int] = {}
        self.claimed: dict[int, tuple[Operation, float]] = {}
        self.crashes: dict[str, list[float]] = {}
        self.relieved: list[float] = []
        self.stopped_at: float | None = None
        self.forced = False
        self.closed = False

    # -- events

    def request(
        self, name: str | None = None, client: str = "someone", exclusive: bool = False
    ) -> Request:
        request = Request(client, model_spec(name) if name else None, exclusive=exclusive)
        self.do(lambda now: self.core.on_request(request, now))
        self.requests.append(request)
        return request

    def release(self, request: Request) -> None:
        if request.slot is not None and self._has_place(request):
            self.used[request.slot] = self.time
        self.do(lambda now: self.core.on_released(request, now))
        self.granted.pop(request, None)
        self.released.add(request)

    def leave(self, who: Request | Claim) -> None:
        before = self._withdrawable()
        if isinstance(who, Claim):
            claim = who
            effects = self.do(lambda now: self.core.on_leave(claim, now))
        else:
            request = who
            effects = self.do(lambda now: self.core.on_disconnected(request, now))
        self._check_withdrawn(before, effects)

    def load(self, name: str, client: str = "someone", waits: bool = True, **options: Any) -> Claim:
        claim, spec = Claim(client, waits), model_spec(name, **options)
        self.do(lambda now: self.core.on_load(claim, spec, now), asked=(claim, spec))
        return claim

    def unload(self, client: str = "someone", name: str | None = None) -> Claim:
        claim, path = Claim(client), None if name is None else f"/models/{name}"
        one = len(self.core.slots) == 1
        loads = [item for item in self.core.operations if item.spec]
        self.do(lambda now: self.core.on_unload(claim, now, path))
        self.claims.append(claim)
        assert claim.operation is not None
        about = claim.operation.path
        assert name is None or about in (None, path)
        if name is not None or one:
            mine = [item for item in loads if item.spec and path in (None, item.spec.path)]
            assert all(item.is_over or item.cancelled for item in mine)
        self.core.asked_for[:] = [each for each in self.core.asked_for if about not in (None, each)]
        return claim

    def grow(self, slot: int, bytes_held: int) -> None:
        """Report that the process of the slot holds this many bytes."""
        self.measured[slot] = bytes_held
        self.core.on_memory(self.core.budget, {slot: bytes_held})
        self._check()

    def pressure(self) -> None:
        """Report that memory is running out."""
        before = [
            (slot.last_use, slot.id)
            for slot in self.core.slots
            if slot.may_grant and not slot.requests and not slot.pinned
        ]
        effects = self.do(lambda now: self.core.on_pressure("memory is low", now))
        for effect in effects:
            if isinstance(effect, Stop):
                assert len(self.core.slots) > 1, "the only model was unloaded"
                assert (effect.slot == min(before)[1]) or self.core.operations, "another one went"
                assert all(self.time - each >= 10 for each in self.relieved), "too many went"
                self.relieved.append(self.time)

    def ready(self, slot: int = 0, seconds: float = LOAD) -> None:
        """Let the start in the slot succeed after this many seconds."""
        process = self.processes[slot]
        self.do(lambda now: self.core.on_launched(slot, process))
        for phase in (Phase.STARTING, Phase.LOADING, Phase.WARMING):
            self.do(lambda now, phase=phase: self.core.on_phase(slot, phase))
        process.ready = True
        self.cancelled.discard(slot)
        self.used[slot] = self.core.began[slot] = self.time
        self.core.took[slot] = min(seconds, 30.0)
        self.do(lambda now: self.core.on_started(slot, process, seconds, now))

    def fail(self, slot: int = 0) -> None:
        """Let the start in the slot fail, or end after it was given up."""
        self.measured.pop(slot, None)
        error = LoadFailed(f"{self.processes.pop(slot).spec.model_id} is broken")
        self.cancelled.discard(slot)
        self.do(lambda now: self.core.on_failed(slot, error, now))

    def gone(self, slot: int = 0) -> None:
        """Let the stop of the slot end."""
        assert self.processes[slot].stopping
        process = self.processes.pop(slot)
        self.measured.pop(slot, None)
        for request in [each for each, where in self.granted.items() if where is process]:
            assert request.error is not None or not self.core._slot_of(request)
        self.do(lambda now: self.core.on_stopped(slot, now))

    def die(self, slot: int = 0, hung: bool = False) -> None:
        """Let the process of the slot exit by itself, noticed by two threads."""
        before = len(self.exits)
        dead = self.core.slots[slot]
        others = {
            each.id: (each.state, each.process)
            for each in self.core.slots
            if each is not dead
            and each.is_occupied
            and (each.operation is None or each.operation is not dead.operation)
        }
        mourned = dead.exited
        answering = dead.state in (SlotState.READY, SlotState.DRAINING)
        for _ in range(2):
            effects = self.do(lambda now: self.core.on_exited(slot, "it was killed", now, hung))
            for effect in effects:
                if isinstance(effect, Abort):
                    assert effect.request.slot == slot, "another slot's answer was ended"
        told = self.exits[before:]
        assert [each.slot for each in told] == ([slot] if answering and not mourned else [])
        if told:
            self.crashes.setdefault(told[0].spec.path, []).append(self.time)
        for each in self.core.slots:
            if each.id in others:
                assert (each.state, each.process) == others[each.id], "another slot noticed"

    def wait(self, seconds: float) -> None:
        self.time += seconds
        self.do(self.core.on_tick)
        deadline = self.core.next_deadline()
        assert deadline is None or deadline > self.time, "a deadline passes without a decision"
        for slot in self.core.slots:
            ttl = self.limits.idle_ttl if slot.ttl is None else slot.ttl
            if slot.pinned and slot.ttl is None:
                ttl = 0.0
            idle = slot.may_grant and not slot.requests and not self.core.queue and ttl
            if idle and not self.core.operations:
                assert self.time < self.used[slot.id] + ttl + 1e-6, "an idle model stays"

    def shutdown(self) -> None:
        self.stopped_at = self.time if self.stopped_at is None else self.stopped_at
        self.do(self.core.on_shutdown)

    def force_stop(self) -> None:
        self.forced = True
        self.do(self.core.on_force_stop)

    def settle(self, until_ready: bool = True) -> None:
        """Let every operation in progress succeed; answers in flight stay."""
        for _ in range(200):
            slot = next((each for each in self.processes if self._is_at_work(each)), None)
            if slot is None:
                return
            if self.processes[slot].stopping:
                self.gone(slot)
            elif slot in self.cancelled:
                self.fail(slot)
            else:
                self.ready(slot)
        raise AssertionError("it does not come to rest")

    def finish(self) -> None:
        """Let everything end: each request is answered, each deadline passes."""
        for _ in range(500):
            self.settle()
            answering = [each for each in self.granted if self._has_place(each)]
            if answering:
                self.release(answering[0])
            elif self._is_anything_left() and (deadline := self.core.next_deadline()) is not None:
                self.wait(deadline - self.time)
            elif not any(map(self._is_at_work, self.processes)):
                return
        raise AssertionError("it does not come to an end")

    def _is_anything_left(self) -> bool:
        return bool(self.core.operations or self.core.queue)

    def nobody_waits(self) -> None:
        for request in self.requests:
            assert request in self.released or request.error or request.slot is not None, "waits"
        assert not self.core.queue
        for claim in self.claims:
            assert claim in self.ended, "nobody tells a client of the end"
        assert not self.core.operations

    # -- the state

    @property
    def loaded(self) -> list[str]:
        return [slot.spec.model_id for slot in self.core.slots if slot.answers and slot.spec]

    def state(self, slot: int = 0) -> SlotState:
        return self.core.slots[slot].state

    def _is_at_work(self, slot: int) -> bool:
        process = self.processes[slot]
        return process.stopping or not process.ready

    def _has_place(self, request: Request) -> bool:
        return self.core._slot_of(request) is not None

    # -- the world does what the core says

    def do(
        self,
        event: Callable[[Moment], list[Effect]],
        asked: tuple[Claim, ModelSpec] | None = None,
    ) -> list[Effect]:
        if asked is None:
            effects = event(Moment(self.time, self.time))
        else:
            claim, self.core.asking = asked
            try:
                effects = event(Moment(self.time, self.time))
            finally:
                self.core.asking = None
            self.crashes.clear()
            self.claims.append(claim)
        granted = [effect for effect in effects if isinstance(effect, Grant)]
        for effect in granted:
            held = self.claimed.get(effect.slot)
            if held is not None and not held[0].is_over:
                emptied = effect.slot in held[0].victims or not self.processes[effect.slot].ready
                assert not emptied, "granted on a slot that is to be emptied"
        for effect in effects:
            self._perform(effect)
        self.effects += effects
        self._check()
        return effects

    def _perform(self, effect: Effect) -> None:
        if isinstance(effect, Grant):
            process = self.processes[effect.slot]
            assert process is effect.process, "granted on another process"
            assert process.ready, "granted on a slot that is not ready"
            assert not process.stopping, "granted on a slot that is being stopped"
            assert not self.core.closing
            assert effect.request not in self.granted, "granted twice"
            target = effect.request.target
            if self.limits.swap_on_request and target is not None:
                assert process.spec.path == target.path, "answered by another model"
            self.granted[effect.request] = process
            self.granted_on[process.spec.model_id] += 1
        elif isinstance(effect, Start):
            assert effect.slot not in self.processes, "two processes in one slot"
            operation = self.core.slots[effect.slot].operation
            if operation is not None and operation.cause is Cause.REQUEST:
                crashes = self.crashes.get(effect.spec.path, ())
                recent = [each for each in crashes if self.time - each < 300]
                assert len(recent) < 3, "started again and again by itself"
            self.processes[effect.slot] = Process(effect.spec)
            self.cancelled.discard(effect.slot)
            self.starts.append(effect.spec.model_id)
            if not effect.spec.force:
                used = sum(
                    max(process.spec.needed_bytes, self.measured.get(slot, 0))
                    for slot, process in self.processes.items()
                )
                assert used <= self.core.budget, "more than the memory there is"
        elif isinstance(effect, Stop):
            process = self.processes[effect.slot]
            assert process is effect.process
            assert not process.stopping, "stopped twice"
            assert process.ready, "a start is cancelled, not stopped"
            process.stopping = True
            self.stops.append(process.spec.model_id)
        elif isinstance(effect, Cancel):
            assert not self.processes[effect.slot].ready
            self.cancelled.add(effect.slot)
        elif isinstance(effect, (Reject, Abort)):
            assert effect.request.error is effect.error
            if isinstance(effect, Abort):
                self._check_cut(effect)
        elif isinstance(effect, Finish):
            assert effect.claim not in self.ended, "told twice"
            self.ended[effect.claim] = effect.error
            if effect.error is None:
                self._check_ttl(effect.claim)
        elif isinstance(effect, Emit) and isinstance(effect.event, Exited):
            self.exits.append(effect.event)
        elif isinstance(effect, Closed):
            assert not self.closed
            self.closed = True
            assert not self.processes, "a stop left a process"

    # -- the invariants

    def _check(self) -> None:
        core, limits = self.core, self.limits
        assert len(self.processes) <= limits.max_loaded
        assert len(core.queue) <= limits.max_queue
        paths = [process.spec.path for process in self.processes.values()]
        assert len(paths) == len(set(paths)), "one model has two processes"
        deadline = core.next_deadline()
        if limits.swap_on_request and not core.operations and not core.closing:
            for request in core.queue:
                if request.target is not None and request.target.path not in paths:
                    assert deadline is not None, "nothing brings the model of a request"
                    assert deadline <= self.time + 60, "a turn has no end"
        for slot in core.slots:
            assert len(slot.requests) <= limits.max_concurrent
            if any(request.exclusive for request in slot.requests):
                assert len(slot.requests) == 1
            process = self.processes.get(slot.id)
            if slot.state is SlotState.EMPTY:
                assert process is None, "a process in an empty slot"
                assert not slot.requests
            if slot.answers:
                assert process is not None
                assert process.ready
                assert not process.stopping
            for request in slot.requests:
                assert request.slot == slot.id
                assert request.error or slot.state in (SlotState.READY, SlotState.DRAINING)
            held = self.claimed.get(slot.id)
            if slot.operation is None:
                self.claimed.pop(slot.id, None)
            elif held is None or held[0] is not slot.operation:
                self.claimed[slot.id] = (slot.operation, self.time)
        for operation in core.operations:
            unwanted = operation.spec and not operation.claims and not operation.cancelled
            if unwanted and operation.phase in (Phase.WAITING, Phase.DRAINING):
                assert any(
                    not limits.swap_on_request
                    or request.target is None
                    or request.target.path == operation.spec.path
                    for request in core.queue
                ), "a load that nobody wants"
            if operation.cause is Cause.IDLE and operation.phase is Phase.STOPPING:
                assert operation.only is not None
                slot = core.slots[operation.only]
                ttl = limits.idle_ttl if slot.ttl is None else slot.ttl
                if slot.state is SlotState.STOPPING and slot.spec:
                    assert self.time >= self.used.get(slot.id, 0.0) + ttl - 1e-6, "not idle"

    def _check_cut(self, effect: Abort) -> None:
        """Check that no answer is aborted before the deadline."""
        assert effect.request.slot is not None
        if self.forced:
            return
        if isinstance(effect.error, ShuttingDown):
            assert self.stopped_at is not None
            _, since = self.claimed[effect.request.slot]
            drained = self.time - since >= DRAIN  # for a load before the stop
            assert drained or self.time >= self.stopped_at + STOP - 1e-6, "cut too early"
        elif isinstance(effect.error, (ModelSwapped, ModelUnloaded)):
            _, since = self.claimed[effect.request.slot]
            assert self.time - since >= self.limits.drain_timeout - 1e-6, "cut too early"

    def _check_ttl(self, claim: Claim) -> None:
        operation = claim.operation
        assert operation is not None
        if operation.spec is None:
            return
        asked = [
            ttl
            for each, ttl in self.core.ttls.items()
            if each.spec == operation.spec and each.is_over and each.error is None
        ]
        for slot in self.core.slots:
            if slot.may_grant and slot.spec == operation.spec:
                assert slot.ttl == asked[-1], "the last ttl does not count"

    def _withdrawable(self) -> list[Operation]:
        return [item for item in self.core.operations if item.phase is Phase.DRAINING]

    def _check_withdrawn(self, before: list[Operation], effects: list[Effect]) -> None:
        """Check that a withdrawn swap leaves the old model where it is."""
        stopped = {effect.slot for effect in effects if isinstance(effect, Stop)}
        for operation in before:
            if isinstance(operation.error, LoadCancelled) and operation.is_over:
                for number in operation.victims:
                    slot = self.core.slots[number]
                    assert number not in stopped or slot.operation is not None
                    assert slot.operation is not operation
                    assert slot.process is not None, "the old model is gone"
