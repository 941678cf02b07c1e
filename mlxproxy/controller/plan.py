"""The core: decides what is loaded, which requests are granted, and which effects follow.

Each `on_…` method takes an event and its moment, changes the state, and returns the effects to
perform, in order. Nothing here waits, starts, sends, logs or reads a clock, so every decision sees
a consistent state. The core is not thread-safe: `controller.py` holds its lock around each call,
and performs the effects after it has released the lock.

Loads are carried out in the order in which they were requested; loads that compete neither for a
slot nor for memory run in parallel. These rules bound the wait behind them:

- A client may wait for MAX_LOADS loads at a time, and of the loads that it does not wait for
  (`"wait": false`) only the last counts.
- A load that nobody wants any more (its clients have left, or asked for another) is withdrawn, as
  long as no answer was aborted and nothing was stopped for it. The old model keeps answering.
- If two models do not fit together and requests name both, they take turns. While the loaded one
  is in use, requests for it are answered together, and those for the other wait until its turn is
  over (`policy.turn_ends`). Then it is drained, even if requests for it keep coming.
- When a load has ended, the waiting requests that the loaded model may answer get the free places,
  once, before the next load drains it. So a request waits for the load in progress and for its
  place in the queue, but not for all the loads behind that one; and a load waits for the answers of
  one such turn at most.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlxproxy.backend.spec import ModelSpec
from mlxproxy.controller import policy
from mlxproxy.controller.state import (
    Abort,
    Cancel,
    Cause,
    Claim,
    Closed,
    Effect,
    Emit,
    Exited,
    Failure,
    Finish,
    Forget,
    Grant,
    Limits,
    Loaded,
    Log,
    Moment,
    Operation,
    OperationSnapshot,
    Phase,
    Process,
    Reject,
    Remember,
    Request,
    Slot,
    SlotSnapshot,
    SlotState,
    Snapshot,
    Start,
    Stop,
)
from mlxproxy.errors import (
    BackendFailed,
    BackendTimeout,
    InsufficientMemory,
    LoadCancelled,
    ModelSwapped,
    ModelUnloaded,
    NoModelLoaded,
    ProxyError,
    ShuttingDown,
    TooManyRequests,
)

RETRY_AFTER_SECONDS = 5
NOTHING_LOADED_ADVICE = (
    "Load one with POST /v1/models/load (GET /v1/models lists them), or name one of them as the "
    "model."
)
MAX_LOADS = 4  # that one client may wait for at a time
LEAST_ROOM = 8  # requests that may wait for loads at least, and for unloads at most

NAMES_KEPT = 64  # paths of models that loads have named

INFO, WARNING, ERROR = 20, 30, 40  # the levels of `logging`


class Scheduler:
    """The decisions about slots, operations and requests.

    Args:
        limits: the timeouts and counts.
        slots: the number of processes that may run.

    Attributes:
        budget: bytes for all models together; see :meth:`on_memory`.
        named: the paths that loads have named, the latest with the greatest number. It decides
            which model answers a request without a name (:meth:`main_slot`).
        exits: when the processes of each path crashed, in monotonic seconds. A model that has
            crashed too often stays down until a load is requested.
    """

    def __init__(self, limits: Limits, slots: int = 1, unix: float = 0.0) -> None:
        self.limits = limits
        self.slots = [Slot(number, state_since=unix) for number in range(slots)]
        self.operations: list[Operation] = []
        self.queue: list[Request] = []
        self.failure: Failure | None = None
        self.budget = sys.maxsize
        self.named: dict[str, int] = {}
        self.exits: dict[str, list[float]] = {}
        self.asked = False
        self.closing = False
        self.forced = False
        self._turns = itertools.count(1)
        self._turn_ends: float | None = None
        self._relieved_at: float | None = None
        self._effects: list[Effect] = []

    # -- events: requests

    def needs_target(self) -> bool:
        """Return whether the model that a request names matters to the decision about it now."""
        settled = not self.operations and any(slot.may_grant for slot in self.slots)
        several = sum(slot.is_occupied for slot in self.slots) > 1
        return self.limits.swap_on_request or several or not settled

    def on_request(self, request: Request, now: Moment) -> list[Effect]:
        """Queue a request, and grant it if its model is loaded and a place is free.

        Raises:
            ShuttingDown: the proxy is shutting down.
        """
        self._refuse_if_closing()
        request.turn = next(self._turns)
        request.since = now.monotonic
        self.queue.append(request)
        self._settle(now)
        if request in self.queue and len(self.queue) > self.limits.max_queue:
            self._shed()
            self._settle(now)
        return self._decided()

    def on_released(self, request: Request, now: Moment) -> list[Effect]:
        """Give a request's place back, or remove the request from the queue."""
        slot = self._slot_of(request)
        if slot is not None:
            slot.requests.remove(request)
            slot.last_use = now.monotonic
        elif request in self.queue:
            self._leave_queue(request, now)
        else:
            return []
        self._settle(now)
        return self._decided()

    def on_disconnected(self, request: Request, now: Moment) -> list[Effect]:
        """End a disconnected client's request."""
        return self.on_aborted(request, BackendFailed("The client disconnected."), now)

    def on_aborted(self, request: Request, error: ProxyError, now: Moment) -> list[Effect]:
        """Remove a request from the queue, or abort its answer. A granted request keeps its place
        until it is released."""
        if request in self.queue:
            self._leave_queue(request, now)
            self._reject(request, error)
            self._settle(now)
        elif request.error is None and self._slot_of(request) is not None:
            self._abort(request, error)
        return self._decided()

    # -- events: loads and unloads

    def on_load(self, claim: Claim, spec: ModelSpec, now: Moment) -> list[Effect]:
        """Load a model, or join an equal load.

        Raises:
            ShuttingDown: the proxy is shutting down.
            TooManyRequests: the client waits for too many loads, or too many clients wait.
            InsufficientMemory: the model cannot fit, whatever is stopped for it.
        """
        self._refuse_if_closing()
        claim.since = now.monotonic
        joins = self._equal(spec, now) is not None
        if not joins and (error := self._misfit(spec)) is not None:
            raise error
        self._admit(claim, joins)
        operation = self._equal(spec, now)  # `_admit` may have ended what it joins
        self.asked = True
        self.exits.clear()
        if operation is None:
            operation = self._add(Operation(spec, Cause.ASKED, now.monotonic))
        elif (loaded := self._loaded_in(spec)) is not None and operation.is_over:
            loaded.ttl, loaded.pinned = spec.ttl, spec.pin
        else:
            operation.cause = Cause.ASKED
            operation.spec = spec  # equal except for the ttl and the pin
        self._name(spec)
        if not claim.waits:
            self._supersede(claim.client)
        self._claim(operation, claim)
        self._settle(now)
        return self._decided()

    def on_unload(self, claim: Claim, now: Moment, path: str | None = None) -> list[Effect]:
        """Unload a model; cancel the loads of it.

        Args:
            path: the model's. None: the model that answers requests without a name, or is about to;
                with one slot, whatever is loaded, and all loads.

        Raises:
            ShuttingDown: the proxy is shutting down.
            TooManyRequests: too many clients wait for an unload.
        """
        self._refuse_if_closing()
        claim.since = now.monotonic
        waiting = [each for item in self.operations if item.spec is None for each in item.claims]
        self._make_room(claim, waiting, LEAST_ROOM)
        self.asked = True
        if path is None and len(self.slots) > 1:
            path = self._unnamed_path()
        for slot in self.slots:
            if path is None or (slot.restore is not None and slot.restore.path == path):
                slot.restore = None
        for kept in (self.named, self.exits):
            for each in [each for each in kept if path in (None, each)]:
                del kept[each]
        loads = [item for item in self.operations if item.spec and path in (None, item.spec.path)]
        error = LoadCancelled("The load was cancelled by an unload.")
        for item in loads:
            assert item.spec is not None
            self._reject_waiting(item.spec, error)
            name = item.spec.model_id
            self._cancel(
                item, LoadCancelled(f"The load of {name} was cancelled by an unload."), now
            )
        self._claim(self._unload(path, bool(loads), now), claim)
        self._settle(now)
        return self._decided()

    def _unload(self, path: str | None, cancelled: bool, now: Moment) -> Operation:
        """Return the unload of a model: the one in progress, if there is one."""
        for item in reversed(self.operations):
            if item.spec is None and item.path in (None, path):
                item.cause = Cause.ASKED
                return item
            if path is None:
                break
        operation = Operation(None, Cause.ASKED, now.monotonic, path=path)
        if path is None:
            needed = bool(self.operations) or any(slot.is_occupied for slot in self.slots)
        else:
            operation.only = self._place_of(path)
            needed = operation.only is not None
        if needed:
            return self._add(operation)
        operation.changed = cancelled
        operation.phase = Phase.DONE
        return operation

    def _place_of(self, path: str) -> int | None:
        """Return the slot that holds a model, or that a load of it is about to fill."""
        for slot in self.slots:
            if slot.spec is not None and slot.spec.path == path:
                return slot.id
        coming = (item for item in self.operations if item.spec and item.spec.path == path)
        return next((item.slot for item in coming if item.slot is not None), None)

    def _unnamed_path(self) -> str | None:
        """Return the path of the model that answers requests without a name, or is about to."""
        coming = [item.spec.path for item in self.operations if item.spec and not item.cancelled]
        present = [slot.spec.path for slot in self.slots if slot.spec is not None]
        if asked := [path for path in present + coming if path in self.named]:
            return max(asked, key=self.named.__getitem__)
        main = self.main_slot().spec
        return main.path if main is not None else next(iter(coming), None)

    def on_leave(self, claim: Claim, now: Moment) -> list[Effect]:
        """Drop a claim whose client has left. May be called any number of times."""
        self._drop(claim, LoadCancelled("The client disconnected."))
        self._settle(now)
        return self._decided()

    # -- events: processes

    def on_launched(self, slot_id: int, process: Process) -> list[Effect]:
        """Record the process that is about to start in a slot."""
        slot = self.slots[slot_id]
        assert slot.state is SlotState.LOADING
        slot.process = process
        if slot.operation is not None:
            slot.operation.launched = process.spec
        return []

    def on_phase(self, slot_id: int, phase: Phase) -> list[Effect]:
        """Record the phase that a start has reached."""
        operation = self.slots[slot_id].operation
        if operation is not None and operation.slot == slot_id and not operation.is_over:
            operation.phase = phase
        return []

    def on_started(
        self, slot_id: int, process: Process, seconds: float, now: Moment
    ) -> list[Effect]:
        """Mark a slot as ready: its process answered a first chat, `seconds` after its start."""
        slot = self.slots[slot_id]
        operation = slot.operation
        assert slot.state is SlotState.LOADING
        assert operation is not None
        assert operation.spec
        slot.process, slot.spec = process, process.spec
        slot.operation = None
        slot.ttl, slot.pinned = operation.spec.ttl, operation.spec.pin  # the last that joined
        slot.ready_at, slot.load_seconds = now.monotonic, seconds
        slot.loaded_at = now.unix
        slot.last_use = now.monotonic
        self.failure = None
        loaded = operation.spec
        self._effects += (
            Remember(loaded, seconds),
            Log(INFO, f"{loaded.model_id} loaded in {seconds:.1f} s"),
        )
        self._enter(slot, SlotState.READY, now)
        self._effects.append(Emit(Loaded(slot_id, loaded, seconds)))
        self._finish(operation, operation.cancelled, now)
        self._settle(now)
        return self._decided()

    def on_failed(self, slot_id: int, error: ProxyError, now: Moment) -> list[Effect]:
        """Empty a slot whose start has failed or was cancelled; its process is gone."""
        slot = self.slots[slot_id]
        operation = slot.operation
        assert slot.state is SlotState.LOADING
        assert operation is not None
        assert operation.spec
        spec = operation.spec
        if operation.cancelled is not None:
            error = operation.cancelled
        else:
            self._effects.append(Log(ERROR, f"{spec.model_id} was not loaded: {error.message}"))
            self.failure = Failure(
                spec,
                error.code,
                error.message,
                now.unix,
                operation.previous,
                tuple(error.details.get("log", ())),
            )
            self._reject_waiting(spec, error)
        self._vacate(slot, now)
        self._finish(operation, error, now)
        self._settle(now)
        return self._decided()

    def on_stopped(self, slot_id: int, now: Moment) -> list[Effect]:
        """Go on with the operation that stopped a slot's process, now that it has been reaped."""
        slot = self.slots[slot_id]
        assert slot.state is SlotState.STOPPING
        assert slot.operation is not None
        # A request that still writes to a slow client has no process any more.
        slot.requests.clear()
        self._forget_process(slot)
        if slot.operation.slot != slot_id or slot.operation.cancelled is not None:
            self._vacate(slot, now)
        self._settle(now)
        return self._decided()

    def on_exited(
        self, slot_id: int, reason: str, now: Moment, hung: bool = False, log: Sequence[str] = ()
    ) -> list[Effect]:
        """Handle the crash of a ready process: it has exited, or can no longer generate.

        Any thread may report it: only the first report counts. A start notices its own failure.

        Args:
            hung: whether it was declared dead because it sent nothing.
            log: the last lines of its log.
        """
        slot = self.slots[slot_id]
        spec = slot.spec
        if not slot.answers or slot.exited or spec is None:
            return []
        slot.exited = True
        exits = policy.recent_exits(self.exits.get(spec.path, ()), now.monotonic)
        self.exits[spec.path] = exits
        looping = policy.is_crash_loop(exits)
        slot.restore = None if looping else self._as_asked(slot)
        sentence = f"The backend with {spec.model_id} crashed: {reason}."
        if looping:
            sentence += (
                f" It crashed {policy.CRASH_LOOP_EXITS} times within "
                f"{policy.CRASH_LOOP_SECONDS / 60:g} minutes, so it will not be restarted until "
                "the next load."
            )
        error = (BackendTimeout if hung else BackendFailed)(
            f"The backend crashed during the answer: {reason}. Try again."
        )
        for request in slot.requests:
            self._abort(request, error)
        self.failure = Failure(spec, "backend_failed", sentence, now.unix, None, tuple(log))
        self._effects += (Emit(Exited(slot_id, spec, reason)), Log(ERROR, sentence))
        self._settle(now)
        return self._decided()

    # -- events: time, memory, the end

    def on_memory(self, budget: int, held: Mapping[int, int] | None = None) -> None:
        """Record the memory budget, and what the processes hold.

        Args:
            budget: bytes for all models together.
            held: bytes that the process of each slot held at the last measurement.
        """
        self.budget = budget
        for slot_id, memory in (held or {}).items():
            if self.slots[slot_id].is_occupied:
                self.slots[slot_id].memory = memory

    def on_pressure(self, why: str | None, now: Moment) -> list[Effect]:
        """Unload the model that has been idle longest if memory runs out and several may be loaded.

        With one slot its model stays: clients of the backend's own port rely on it.

        Args:
            why: the shortage that the system reports; None if it reports none.
        """
        held = sum(slot.memory for slot in self.slots)
        if why is None and held > self.budget:
            why = f"the models hold {held / 1e9:.1f} GB, {self.budget / 1e9:.1f} GB are for them"
        if why is None:
            return []
        pause = policy.RELIEF_PAUSE_SECONDS
        early = self._relieved_at is not None and now.monotonic < self._relieved_at + pause
        leaving = any(item.cause is Cause.PRESSURE for item in self.operations)
        slot = policy.relief(self.slots) if len(self.slots) > 1 else None
        if slot is not None and slot.spec is not None and not (early or leaving or self.closing):
            self._relieved_at = now.monotonic
            line = f"{why}: unloading {slot.spec.model_id}, which has been idle the longest"
            self._effects.append(Log(WARNING, line))
            slot.restore = self._as_asked(slot)
            operation = self._add(Operation(None, Cause.PRESSURE, now.monotonic, slot.id))
            self._begin(operation, policy.Placement(-1, (slot.id,)), now)
            self._settle(now)
        return self._decided()

    def on_tick(self, now: Moment) -> list[Effect]:
        """Take the decisions that were waiting for a deadline."""
        self._settle(now)
        return self._decided()

    def on_shutdown(self, now: Moment) -> list[Effect]:
        """Reject new work, let answers finish for `shutdown_timeout`, empty all slots."""
        if not self.closing:
            self.closing = True
            error = ShuttingDown("mlxproxy is stopping. Try again once it has restarted.")
            for request in list(self.queue):
                self._reject(request, error)
            self.queue.clear()
            given_up = ShuttingDown("mlxproxy is stopping: the load was abandoned.")
            for operation in list(self.operations):
                if operation.spec is not None:
                    operation.cancelled = None  # the stop is the better reason
                    self._cancel(operation, given_up, now)
                operation.deadline = min(
                    operation.deadline, now.monotonic + self.limits.shutdown_timeout
                )
            self._add(Operation(None, Cause.SHUTDOWN, now.monotonic))
            self._settle(now)
        return self._decided()

    def on_force_stop(self, now: Moment) -> list[Effect]:
        """Stop waiting for answers, because the stop was requested twice."""
        self.forced = True
        self._settle(now)
        return self._decided()

    def next_deadline(self) -> float | None:
        """Return when :meth:`on_tick` is needed next, in monotonic seconds; None: not for now."""
        waits = [
            operation.deadline
            for operation in self.operations
            if any(self._is_waited_for(slot, operation) for slot in self._victims(operation))
        ]
        ends = (*map(self._idle_deadline, self.slots), self._turn_ends)
        return min((*waits, *(moment for moment in ends if moment is not None)), default=None)

    # -- queries

    def snapshot(self, now: Moment) -> Snapshot:
        """Return the whole state."""
        slots = tuple(self._slot_snapshot(slot, now) for slot in self.slots)
        operations = tuple(
            OperationSnapshot(item.spec, item.cause, item.phase, now.monotonic - item.since)
            for item in self.operations
        )
        return Snapshot(
            slots,
            slots[self.main_slot().id],
            operations,
            sum(slot.in_flight for slot in slots),
            len(self.queue),
            self.failure,
        )

    def main_slot(self) -> Slot:
        """Return the slot whose model answers requests without a name: the model that a load named
        last, else the one used last, and one that writes before one that only embeds or ranks.
        Ready slots come first, then those that still answer, then those that are not empty."""
        granting = [slot for slot in self.slots if slot.may_grant]
        answering = granting or [slot for slot in self.slots if slot.answers]
        busy = answering or [slot for slot in self.slots if slot.state is not SlotState.EMPTY]
        return max(busy or self.slots[:1], key=self._precedence)

    def _precedence(self, slot: Slot) -> tuple[bool, int, float]:
        spec = slot.spec
        if spec is None:
            return True, 0, slot.last_use
        return spec.model.writes, self.named.get(spec.path, 0), slot.last_use

    def position(self, request: Request) -> int:
        """Return the request's number in the queue, from 1; 0 if it is not in it."""
        return self.queue.index(request) + 1 if request in self.queue else 0

    def awaited(self, request: Request) -> Operation | None:
        """Return the operation that a queued request waits for, if it waits for one."""
        loads = (item for item in self.operations if item.spec)
        own = next((item for item in loads if item.spec and self._suits(request, item.spec)), None)
        first = self.operations[0] if self.operations and len(self.slots) == 1 else None
        return own or first

    def is_untouched(self) -> bool:
        """Return whether nobody has asked for a load or unload yet, and nothing is loaded."""
        occupied = any(slot.is_occupied for slot in self.slots)
        return not (self.asked or self.closing or self.operations or occupied)

    def _slot_snapshot(self, slot: Slot, now: Moment) -> SlotSnapshot:
        shown = slot.answers
        deadline = self._idle_deadline(slot)
        # Nobody may use a process that has not answered yet, or has been stopped.
        process = slot.process if slot.state is not SlotState.LOADING else None
        return SlotSnapshot(
            slot.id,
            slot.state,
            slot.state_since,
            slot.spec if shown else None,
            slot.spec,
            slot.loaded_at if shown else None,
            now.unix - (now.monotonic - slot.last_use) if shown else None,
            slot.ttl if shown else None,
            slot.pinned,
            process.pid if process else None,
            process.address.port if process else None,
            slot.memory,
            len(slot.requests),
            len(self._waiting_for(slot)) if shown else 0,
            None if deadline is None else max(0.0, deadline - now.monotonic),
            tuple(sorted(process.features)) if process else (),
        )

    # -- decisions, repeated until nothing is left to decide

    def _decided(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def _settle(self, now: Moment) -> None:
        self._turn_ends = None
        while self._step(now):
            self._turn_ends = None

    def _step(self, now: Moment) -> bool:
        """Take the first step that is due; return whether there was one."""
        return (
            self._withdraw(now)
            or any(self._advance(item, now) for item in self.operations if item.is_placed)
            or self._reap_or_idle(now)
            or self._take_next(now)
        )

    def _take_next(self, now: Moment) -> bool:
        """Begin the next operation; before a load, grant free places to the waiting requests."""
        waiting = next((item for item in self.operations if not item.is_placed), None)
        if waiting is not None and waiting.spec is None:
            if self._place_unload(waiting, now):
                return True
            if waiting.only is None:
                return False
        if self.queue and not self.closing:
            for slot in sorted(self.slots, key=lambda slot: -slot.last_use):
                if slot.may_grant and self._grant(slot, now):
                    return True
        if waiting is not None:
            return waiting.spec is not None and self._place_load(waiting, now)
        return not self.closing and self._load_for_requests(now)

    def _grant(self, slot: Slot, now: Moment) -> bool:
        """Grant the slot's free places fairly among clients; return whether any was granted."""
        assert slot.process is not None
        assert slot.spec is not None
        held = Counter(request.client for request in slot.requests)
        waiting = self._waiting_for(slot)
        before = len(slot.requests)
        while waiting and len(slot.requests) < self.limits.max_concurrent:
            request = policy.next_in_turn(waiting, held)
            if held[request.client] >= policy.most_places(self.limits.max_concurrent):
                break  # every other waiting client holds at least as many
            waiting.remove(request)
            if not policy.may_go(request, slot.requests):
                if policy.has_waited_enough(request, now.monotonic):
                    break
                continue
            self.queue.remove(request)
            slot.requests.append(request)
            request.slot = slot.id
            request.loaded = max(0.0, min(slot.load_seconds, slot.ready_at - request.since))
            held[request.client] += 1
            policy.served(self.queue, request.client, next(self._turns))
            self._effects.append(Grant(request, slot.id, slot.process))
        return len(slot.requests) > before

    def _load_for_requests(self, now: Moment) -> bool:
        """Load the model for the first request that no slot serves or will serve.

        While that load waits for the turn of a model in use to end, a load for a later request may
        go first, if it evicts nothing and takes nothing that the first one needs.
        """
        if any(not item.is_placed for item in self.operations):
            return False
        first: tuple[Operation, policy.Placement] | None = None
        for request in self.queue:
            if any(self._suits(request, spec) for spec in self._present_or_coming()):
                continue
            wanted = self._wanted(request)
            if wanted is None:
                if self.operations:
                    continue  # the operations in progress decide it
                self.queue.remove(request)
                self._reject(request, self._not_loaded(request))
                return True
            if (error := self._misfit(wanted)) is not None:
                self.queue.remove(request)
                self._reject(request, error)
                return True
            operation = Operation(wanted, Cause.REQUEST, now.monotonic)
            placement = self._placement(wanted)
            if first is not None:
                if placement is None or placement.victims or not self._fits_beside(wanted, *first):
                    continue
            elif placement is None:
                return False
            elif (ends := self._turn_of(placement)) > now.monotonic:
                first, self._turn_ends = (operation, placement), ends
                continue
            self._add(operation)
            self._begin(operation, placement, now)
            return True
        return False

    def _turn_of(self, placement: policy.Placement) -> float:
        """Return when the turns of the models to evict are over, in monotonic seconds."""
        return max((policy.turn_ends(slot) for slot in self._slots(placement.victims)), default=0.0)

    def _fits_beside(self, spec: ModelSpec, first: Operation, placement: policy.Placement) -> bool:
        """Return whether a load would still fit once the first one has taken its place."""
        taken = {placement.slot, *placement.victims}
        rest = [slot for slot in self.slots if slot.id not in taken]
        reserved = [*self._reserved(), first]
        beside = policy.place(spec, rest, reserved, self.budget, self.limits.max_loaded)
        return beside is not None and not beside.victims

    def _present_or_coming(self) -> list[ModelSpec]:
        """Return the models that answer requests now, or will without another operation."""
        present = [slot.spec for slot in self.slots if slot.spec is not None and slot.may_grant]
        coming = [item.spec for item in self.operations if item.spec and not item.cancelled]
        return present + coming

    def _wanted(self, request: Request) -> ModelSpec | None:
        """Return the load for a request that no slot serves: the former one, if it still suits."""
        former = sorted(
            (slot for slot in self.slots if slot.restore is not None),
            key=lambda slot: -slot.last_use,
        )
        restored = (slot.restore for slot in former if slot.restore is not None)
        wanted = next((spec for spec in restored if self._suits(request, spec)), request.target)
        wanted = wanted or request.fallback
        if wanted is None or policy.is_crash_loop(self.exits.get(wanted.path, ())):
            return None
        return wanted

    def _place_load(self, operation: Operation, now: Moment) -> bool:
        """Begin a load if a slot is available; end it if it is not needed or not possible."""
        spec = operation.spec
        assert spec is not None
        if (slot := self._loaded_in(spec)) is not None:
            operation.changed = False  # the operations in between have been withdrawn
            slot.ttl, slot.pinned = spec.ttl, spec.pin
            self._finish(operation, None, now)
        elif (equal := self._on_its_way(spec)) is not None:
            self._join(operation, equal)
        elif (error := self._misfit(spec)) is not None:
            self._reject_waiting(spec, error)
            self._finish(operation, error, now)
        elif (placement := self._placement(spec)) is not None:
            self._begin(operation, placement, now)
        else:
            return False
        return True

    def _placement(self, spec: ModelSpec) -> policy.Placement | None:
        """Return where a load goes now; None while it has to wait."""
        placement = policy.place(
            spec, self.slots, self._reserved(), self.budget, self.limits.max_loaded
        )
        # An unload in progress may free enough: evict nothing else before that is known.
        leaving = any(item.is_placed and item.spec is None for item in self.operations)
        return None if placement is not None and placement.victims and leaving else placement

    def _reserved(self) -> list[Operation]:
        """Return the loads that have been given their slots but have not started yet."""
        return [
            item
            for item in self.operations
            if item.spec is not None and item.phase in (Phase.DRAINING, Phase.STOPPING)
        ]

    def _place_unload(self, operation: Operation, now: Moment) -> bool:
        slots = self._about(operation.only)
        if any(slot.operation is not None for slot in slots):
            return False
        victims = tuple(
            slot.id
            for slot in slots
            if slot.spec is not None and operation.path in (None, slot.spec.path)
        )
        self._begin(operation, policy.Placement(-1, victims), now)
        return True

    def _begin(self, operation: Operation, placement: policy.Placement, now: Moment) -> None:
        """Give the operation its slots, on which nothing is granted any more."""
        limit = self._drain_limit(operation)
        operation.deadline = now.monotonic + limit
        operation.victims = placement.victims
        operation.phase = Phase.DRAINING
        if operation.spec is not None:
            operation.slot = placement.slot
            self.slots[placement.slot].operation = operation
        for slot in self._victims(operation):
            slot.operation = operation
            if slot.requests:
                self._enter(slot, SlotState.DRAINING, now)

    def _drain_limit(self, operation: Operation) -> float:
        limits = self.limits
        return (
            limits.shutdown_timeout if operation.cause is Cause.SHUTDOWN else limits.drain_timeout
        )

    def _advance(self, operation: Operation, now: Moment) -> bool:
        """Advance an operation that has its slots by one step; return whether it advanced."""
        if operation.phase is Phase.DRAINING:
            waits = any(self._is_waited_for(slot, operation) for slot in self._victims(operation))
            if waits and not self.forced and now.monotonic < operation.deadline:
                return False
            self._cut(operation, now)
            return True
        if operation.phase is not Phase.STOPPING:
            return False
        went = False
        for slot in self._victims(operation):
            if not slot.answers:
                continue
            waits = self._is_waited_for(slot, operation)
            if not waits or now.monotonic >= operation.deadline:
                assert slot.process is not None
                assert slot.spec is not None
                operation.previous = slot.spec.model_id
                self._enter(slot, SlotState.STOPPING, now)
                self._effects.append(Stop(slot.id, slot.process))
                went = True
        if any(slot.is_occupied for slot in self._victims(operation)):
            return went
        self._emptied(operation, now)
        return True

    def _cut(self, operation: Operation, now: Moment) -> None:
        """Abort the answers still in flight; the operation can no longer be withdrawn."""
        operation.phase = Phase.STOPPING
        operation.deadline = now.monotonic + self.limits.ended_grace
        error = self._ending_for(operation)
        cut = [
            request
            for slot in self._victims(operation)
            for request in slot.requests
            if request.error is None
        ]
        for request in cut:
            self._abort(request, error)
        if cut:
            self._effects.append(
                Log(WARNING, f"{len(cut)} answers in flight aborted: {error.message}")
            )

    def _emptied(self, operation: Operation, now: Moment) -> None:
        """Start the load, or end the operation, now that all its victims are gone."""
        if operation.spec is None:
            if operation.cause is Cause.ASKED:
                for slot in self._about(operation.only):
                    slot.restore = None  # set if the process crashed while draining
                self._effects.append(Forget(operation.path))
            self._finish(operation, None, now)
            if operation.cause is Cause.SHUTDOWN:
                self._effects.append(Closed())
            return
        assert operation.slot is not None
        slot = self.slots[operation.slot]
        if operation.cancelled is not None:
            self._vacate(slot, now)
            self._finish(operation, operation.cancelled, now)
            return
        if not self._still_fits(operation):
            self._place_again(operation, now)
            return
        for victim in self._victims(operation):
            victim.operation = None
        operation.victims = ()
        operation.phase = Phase.STARTING
        slot.operation = operation
        slot.spec = operation.spec
        for each in self.slots:
            if each is slot or (each.restore and each.restore.path == operation.spec.path):
                each.restore = None
        self._enter(slot, SlotState.LOADING, now)
        self._effects.append(Start(slot.id, operation.spec))

    def _still_fits(self, operation: Operation) -> bool:
        """Return whether a load fits beside the other models, which may have grown since it was
        given its slots."""
        assert operation.spec is not None
        others = [each for each in self._reserved() if each is not operation]
        occupied = [slot for slot in self.slots if slot.is_occupied]
        return not (occupied or others) or policy.fits(
            operation.spec, occupied, others, self.budget
        )

    def _place_again(self, operation: Operation, now: Moment) -> None:
        """Give up a load's slots, so that it is decided again what is evicted for it."""
        assert operation.slot is not None
        for slot in (*self._victims(operation), self.slots[operation.slot]):
            slot.operation = None
        self._vacate(self.slots[operation.slot], now)
        operation.slot, operation.victims, operation.phase = None, (), Phase.WAITING
        if not operation.claims:
            self.operations.remove(operation)  # the requests that need it are still in the queue

    def _reap_or_idle(self, now: Moment) -> bool:
        """Begin to empty a slot whose process has exited, or that has been idle for long enough."""
        for slot in self.slots:
            if slot.operation is not None:
                continue
            cause = None
            if slot.exited:
                cause = Cause.EXIT
            elif slot.spec is not None and self._is_idle(slot, now):
                cause = Cause.IDLE
                slot.restore = self._as_asked(slot)
                line = f"{slot.spec.model_id} is idle: unloading it"
                self._effects.append(Log(INFO, line))
            if cause is not None:
                operation = self._add(Operation(None, cause, now.monotonic, slot.id))
                self._begin(operation, policy.Placement(-1, (slot.id,)), now)
                return True
        return False

    def _is_idle(self, slot: Slot, now: Moment) -> bool:
        deadline = self._idle_deadline(slot)
        return deadline is not None and now.monotonic >= deadline

    def _idle_deadline(self, slot: Slot) -> float | None:
        if not slot.may_grant or slot.requests or self.queue or self.closing:
            return None
        if any(not item.is_placed for item in self.operations):
            return None  # those operations decide about the slot
        default = 0.0 if slot.pinned else self.limits.idle_ttl
        return policy.idle_deadline(slot.last_use, slot.ttl, default)

    # -- joining, withdrawing, cancelling

    def _add(self, operation: Operation) -> Operation:
        self.operations.append(operation)
        return operation

    def _equal(self, spec: ModelSpec, now: Moment) -> Operation | None:
        """Return the operation that a load joins: a load that nothing will undo, or a finished one
        if the model is already loaded."""
        for operation in reversed(self.operations):
            if operation.serves(spec) and operation.cancelled is None:
                return operation
            if not operation.is_placed or (operation.only is None and operation.spec is None):
                return None
        if self._loaded_in(spec) is None:
            return None
        return Operation(spec, Cause.ASKED, now.monotonic, phase=Phase.DONE, changed=False)

    def _loaded_in(self, spec: ModelSpec) -> Slot | None:
        found = (slot for slot in self.slots if slot.may_grant and slot.spec is not None)
        return next((slot for slot in found if slot.spec and spec.is_met_by(slot.spec)), None)

    def _on_its_way(self, spec: ModelSpec) -> Operation | None:
        placed = (item for item in self.operations if item.is_placed and not item.cancelled)
        return next((item for item in placed if item.serves(spec)), None)

    def _join(self, operation: Operation, equal: Operation) -> None:
        """Merge a load that has not begun into an equal one that has."""
        self.operations.remove(operation)
        operation.phase = Phase.DONE
        equal.spec, equal.cause = operation.spec, operation.cause
        for claim in operation.claims:
            claim.operation = equal
        equal.claims += operation.claims

    def _claim(self, operation: Operation, claim: Claim) -> None:
        claim.operation = operation
        operation.claims.append(claim)
        if operation.is_over:
            self._effects.append(Finish(claim, operation.error))

    def _drop(self, claim: Claim, error: ProxyError) -> None:
        operation = claim.operation
        if operation is not None and claim in operation.claims and not operation.is_over:
            operation.claims.remove(claim)
            self._effects.append(Finish(claim, error))

    def _supersede(self, client: str) -> None:
        """Drop the client's earlier claims that it does not wait for: only the last one counts."""
        error = LoadCancelled("The same client has asked for another load since.")
        for operation in self.operations:
            for claim in [each for each in operation.claims if not each.waits]:
                if claim.client == client:
                    operation.claims.remove(claim)
                    self._effects.append(Finish(claim, error))

    def _admit(self, claim: Claim, joins: bool) -> None:
        """Return if the client may request one more load.

        Raises:
            TooManyRequests: it waits for too many loads, or too many claims wait and it has the
                most.
        """
        loads = [item for item in self.operations if item.spec is not None]
        mine = sum(
            any(each.waits and each.client == claim.client for each in item.claims)
            for item in loads
        )
        if claim.waits and not joins and mine >= MAX_LOADS:
            raise TooManyRequests(
                f"You are already waiting for {mine} loads. Wait for one of them to finish, "
                "or unload.",
                retry_after=RETRY_AFTER_SECONDS,
            )
        claims = [each for item in loads for each in item.claims]
        self._make_room(claim, claims, max(LEAST_ROOM, self.limits.max_queue))

    def _make_room(self, claim: Claim, others: Sequence[Claim], room: int) -> None:
        """Reject the newest claim of the client with the most, if there is one too many.

        Raises:
            TooManyRequests: that claim is the new one.
        """
        if len(others) < room:
            return
        # A client that does not wait already has its answer: the load was accepted.
        waiting = sorted((each for each in others if each.waits), key=lambda each: each.since)
        refused = policy.turned_away([*waiting, claim])
        error = TooManyRequests(
            "Too many requests are already waiting for loads and unloads. Try again in a few "
            "seconds.",
            retry_after=RETRY_AFTER_SECONDS,
        )
        if refused is claim:
            raise error
        operation = refused.operation
        assert operation is not None
        operation.claims.remove(refused)  # not withdrawn here: the new claim may want the same
        self._effects.append(Finish(refused, error))

    def _withdraw(self, now: Moment) -> bool:
        """Cancel a load that nobody wants any more, if nothing was aborted or stopped for it."""
        for operation in self.operations:
            if operation.may_be_withdrawn() and self._is_needless(operation):
                self._cancel(
                    operation, LoadCancelled("No client is waiting for this load any more."), now
                )
                return True
        return False

    def _is_needless(self, operation: Operation) -> bool:
        """Return whether it is a load that has no claim and that no request needs."""
        spec = operation.spec
        if spec is None or operation.claims:
            return False
        before = self._before(operation)
        return not any(
            self._suits(request, spec) and not any(self._suits(request, other) for other in before)
            for request in self.queue
        )

    def _before(self, operation: Operation) -> list[ModelSpec]:
        """Return what will be loaded when the operation's turn comes, as far as that is known."""
        before = {
            slot.id: slot.spec
            for slot in self.slots
            if slot.spec is not None and not slot.exited and slot.answers
        }
        coming: list[ModelSpec] = []
        for earlier in self.operations:
            if earlier is operation:
                break
            if earlier.cancelled is not None:
                continue
            for victim in earlier.victims:
                before.pop(victim, None)
            if (earlier.spec is None and not earlier.is_placed) or len(self.slots) == 1:
                before.clear()
                coming.clear()
            if earlier.spec is not None:
                coming.append(earlier.spec)
        return [*before.values(), *coming]

    def _cancel(self, operation: Operation, why: ProxyError, now: Moment) -> None:
        """Cancel a load: immediately if nothing was stopped for it, else as soon as possible."""
        if operation.may_be_withdrawn():
            for slot in self._victims(operation):
                slot.operation = None
                if slot.state is SlotState.DRAINING:
                    self._enter(slot, SlotState.READY, now)
            if operation.slot is not None:
                self.slots[operation.slot].operation = None
            self._finish(operation, why, now)
            return
        first = operation.cancelled is None
        operation.cancelled = operation.cancelled or why
        if first and operation.slot is not None and operation.phase is not Phase.STOPPING:
            self._effects.append(Cancel(operation.slot))

    def _finish(self, operation: Operation, error: ProxyError | None, now: Moment) -> None:
        operation.error = error
        operation.phase = Phase.FAILED if error else Phase.DONE
        self.operations.remove(operation)
        for slot in self.slots:
            if slot.operation is operation:
                slot.operation = None
        self._effects += [Finish(claim, error) for claim in operation.claims]
        self._effects.append(Emit(self.snapshot(now)))

    # -- requests

    def _suits(self, request: Request, spec: ModelSpec) -> bool:
        """Return whether a model may answer the request."""
        named = request.target if self.limits.swap_on_request else None
        return named is None or named.path == spec.path

    def _waiting_for(self, slot: Slot) -> list[Request]:
        """Return the queued requests that a slot may answer: those that name its model and, on the
        main slot, those that name no model that is ready."""
        spec = slot.spec
        assert spec is not None
        if not self.queue:
            return []
        ready = {other.spec.path for other in self.slots if other.may_grant and other.spec}
        is_main = slot is self.main_slot()
        return [
            request
            for request in self.queue
            if (
                request.target.path == spec.path
                if request.target is not None and request.target.path in ready
                else is_main and self._suits(request, spec)
            )
        ]

    def _shed(self) -> None:
        """Shorten the queue by one: reject the newest request of the client with the most in it."""
        refused = policy.turned_away(self.queue)
        self.queue.remove(refused)
        in_flight = sum(len(slot.requests) for slot in self.slots)
        error = TooManyRequests(
            f"{in_flight} answers are in flight and {len(self.queue)} requests are "
            "already queued. Try again in a few seconds.",
            retry_after=RETRY_AFTER_SECONDS,
        )
        self._reject(refused, error)

    def _leave_queue(self, request: Request, now: Moment) -> None:
        self.queue.remove(request)
        for slot in self.slots:
            if slot.spec is not None and self._suits(request, slot.spec):
                slot.last_use = now.monotonic

    def _reject_waiting(self, spec: ModelSpec, error: ProxyError) -> None:
        """Reject the queued requests that only this load could have served."""
        others = [slot.spec for slot in self.slots if slot.may_grant and slot.spec is not None]
        for request in list(self.queue):
            if self._suits(request, spec) and not any(
                self._suits(request, each) for each in others
            ):
                self.queue.remove(request)
                self._reject(request, error)

    def _reject(self, request: Request, error: ProxyError) -> None:
        if request.error is None:
            request.error = error
            self._effects.append(Reject(request, error))

    def _abort(self, request: Request, error: ProxyError) -> None:
        if request.error is None:
            request.error = error
            self._effects.append(Abort(request, error))

    # -- sentences

    def _misfit(self, spec: ModelSpec) -> ProxyError | None:
        """Return why a load cannot fit into memory, with the numbers; None if it can."""
        found = policy.shortage(spec, self.slots, self.budget, self.limits.max_loaded)
        if found is None:
            return None
        fit, names = found.fit, ", ".join(each.model_id for each in found.pinned)
        if found.is_full:
            why = f"{spec.model_id} has no place: {names} stay loaded, because they are pinned."
        else:
            why = f"{spec.model_id} does not fit into memory. {fit.sentence()}"
            why += f" Pinned and therefore not counted as available: {names}." if names else ""
        if names:
            why += (
                ' To unpin one, load it with "pin": false (POST /v1/models/load), or unload it '
                "(POST /v1/models/unload)."
            )
        if not found.is_full:
            why += ' "force": true loads it anyway.'
        details: dict[str, Any] = {"needed_bytes": fit.needed, "available_bytes": fit.available}
        if names:
            details["pinned"] = [each.model_id for each in found.pinned]
        return InsufficientMemory(why, **details)

    def _refuse_if_closing(self) -> None:
        if self.closing:
            raise ShuttingDown("mlxproxy is stopping. Try again once it has restarted.")

    def _ending_for(self, operation: Operation) -> ProxyError:
        limit = self.limits.drain_timeout
        if self.closing:
            return ShuttingDown("The answer was aborted: mlxproxy is stopping.")
        if operation.spec is None:
            return ModelUnloaded(
                f"The answer was aborted: it did not finish within {limit:g} s (DRAIN_TIMEOUT) "
                "before the unload."
            )
        return ModelSwapped(
            f"The answer was aborted: it did not finish within {limit:g} s (DRAIN_TIMEOUT) before "
            f"the swap to {operation.spec.model_id}. Try again."
        )

    def _not_loaded(self, request: Request) -> ProxyError:
        if self.failure is not None and any(slot.is_occupied for slot in self.slots):
            wanted = request.target
            assert wanted is not None  # else the loaded model would answer it
            return NoModelLoaded(
                f"{wanted.model_id} is not loaded, because it has crashed too often. Load it with "
                "POST /v1/models/load to try again."
            )
        advice = request.advice or NOTHING_LOADED_ADVICE
        reason = "" if self.failure is None else f" {self.failure.reason}"
        return NoModelLoaded(f"No model is loaded{':' if reason else '.'}{reason} {advice}")

    # -- slots

    def _enter(self, slot: Slot, state: SlotState, now: Moment) -> None:
        slot.enter(state, now.unix)
        self._effects.append(Emit(self.snapshot(now)))

    def _vacate(self, slot: Slot, now: Moment) -> None:
        """Mark a slot as empty, and forget its process and requests."""
        slot.requests.clear()
        self._forget_process(slot)
        if slot.state is not SlotState.EMPTY:
            self._enter(slot, SlotState.EMPTY, now)

    @staticmethod
    def _forget_process(slot: Slot) -> None:
        slot.process = slot.spec = slot.ttl = None
        slot.pinned = slot.exited = False
        slot.memory = 0

    @staticmethod
    def _as_asked(slot: Slot) -> ModelSpec:
        """Return the slot's load with the ttl and pin that were requested last."""
        assert slot.spec is not None
        return replace(slot.spec, ttl=slot.ttl, pin=slot.pinned)

    def _name(self, spec: ModelSpec) -> None:
        """Record that a load has named the model."""
        self.named.pop(spec.path, None)
        self.named[spec.path] = next(self._turns)
        while len(self.named) > NAMES_KEPT:
            del self.named[next(iter(self.named))]

    def _about(self, only: int | None) -> list[Slot]:
        return self.slots if only is None else [self.slots[only]]

    def _victims(self, operation: Operation) -> list[Slot]:
        return self._slots(operation.victims)

    def _slots(self, numbers: Sequence[int]) -> list[Slot]:
        return [self.slots[number] for number in numbers]

    def _slot_of(self, request: Request) -> Slot | None:
        """Return the slot on which the request has a place."""
        if request.slot is None:
            return None
        slot = self.slots[request.slot]
        return slot if request in slot.requests else None

    @staticmethod
    def _is_waited_for(slot: Slot, operation: Operation) -> bool:
        """Return whether a slot that is to be emptied still has answers to wait for. While it
        drains, they may finish as long as the process lives; then they have to notice the abort."""
        draining = operation.phase is Phase.DRAINING
        return bool(slot.requests) and slot.answers and not (draining and slot.exited)
