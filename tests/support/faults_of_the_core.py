"""Deliberate faults in the core: its tests must catch each one, or they prove nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mlxproxy.controller import policy
from mlxproxy.controller.plan import Scheduler
from mlxproxy.controller.state import (
    Grant,
    Moment,
    Operation,
    Phase,
    Slot,
)
from mlxproxy.errors import BackendFailed, ProxyError

Fault = Callable[[pytest.MonkeyPatch], None]


def _everything_may_be_granted(patch: pytest.MonkeyPatch) -> None:
    """Grant requests on a slot that is being emptied."""
    granting = property(lambda slot: slot.answers and slot.process is not None)
    patch.setattr(Slot, "may_grant", granting)


def _answers_are_cut_at_once(patch: pytest.MonkeyPatch) -> None:
    """Swap without waiting for the answers in flight."""
    patch.setattr(Scheduler, "_drain_limit", lambda self, operation: 0.0)


def _drains_have_no_end(patch: pytest.MonkeyPatch) -> None:
    """Let an answer that does not end keep the next model out forever."""
    patch.setattr(Scheduler, "_drain_limit", lambda self, operation: 1e9)


def _nothing_is_withdrawn(patch: pytest.MonkeyPatch) -> None:
    """Continue a load although its clients have left."""
    patch.setattr(Scheduler, "_withdraw", lambda self, now: False)


def _withdrawn_too_late(patch: pytest.MonkeyPatch) -> None:
    """Withdraw a load although answers were aborted for it, so that no model is left."""
    phases = (Phase.WAITING, Phase.DRAINING, Phase.STOPPING)
    patch.setattr(
        Operation, "may_be_withdrawn", lambda self: self.spec is not None and self.phase in phases
    )


def _the_first_ttl_counts(patch: pytest.MonkeyPatch) -> None:
    """Lose the ttl of a load that joined another."""
    on_started = Scheduler.on_started

    def started(self: Scheduler, slot_id: int, process: Any, *rest: Any) -> Any:
        operation = self.slots[slot_id].operation
        assert operation is not None
        operation.spec = process.spec
        return on_started(self, slot_id, process, *rest)

    patch.setattr(Scheduler, "on_started", started)


def _each_witness_counts(patch: pytest.MonkeyPatch) -> None:
    """Report and count an exit twice if two threads see it."""
    on_exited = Scheduler.on_exited

    def exited(self: Scheduler, slot_id: int, *rest: Any, **named: Any) -> Any:
        self.slots[slot_id].exited = False
        return on_exited(self, slot_id, *rest, **named)

    patch.setattr(Scheduler, "on_exited", exited)


def _an_exit_ends_all_answers(patch: pytest.MonkeyPatch) -> None:
    """Abort the answers of other slots when one exits."""
    on_exited = Scheduler.on_exited

    def exited(self: Scheduler, slot_id: int, reason: str, *rest: Any, **named: Any) -> Any:
        effects = on_exited(self, slot_id, reason, *rest, **named)
        if self.failure is not None and effects:
            for slot in self.slots:
                for request in slot.requests:
                    self._abort(request, BackendFailed("not its own"))
        return effects + self._decided()

    patch.setattr(Scheduler, "on_exited", exited)


def _busy_ones_are_evicted_first(patch: pytest.MonkeyPatch) -> None:
    """Evict the least recently used model, even if it is in use."""
    _patched_place(patch, lambda slots: [_without_requests(slot) for slot in slots])


def _pinned_ones_are_evicted(patch: pytest.MonkeyPatch) -> None:
    """Evict a pinned model for another."""
    _patched_place(patch, lambda slots: [_copy(slot, pinned=False) for slot in slots])
    shortage = policy.shortage
    patch.setattr(
        policy,
        "shortage",
        lambda spec, slots, *rest: shortage(
            spec, [_copy(slot, pinned=False) for slot in slots], *rest
        ),
    )


def _pins_of_joined_loads_are_lost(patch: pytest.MonkeyPatch) -> None:
    """Let a load of a model that is already loaded neither pin nor unpin it."""
    on_load = Scheduler.on_load

    def loaded(self: Scheduler, claim: Any, spec: Any, now: Any) -> Any:
        before = {slot.id: (slot.process, slot.pinned) for slot in self.slots}
        effects = on_load(self, claim, spec, now)
        for slot in self.slots:
            process, pinned = before[slot.id]
            if slot.process is process is not None:
                slot.pinned = pinned
        return effects

    patch.setattr(Scheduler, "on_load", loaded)


def _pins_outlive_their_model(patch: pytest.MonkeyPatch) -> None:
    """Pin the next model in a slot because the one before it was pinned."""
    forget = Scheduler._forget_process

    def forgotten(slot: Slot) -> None:
        pinned = slot.pinned
        forget(slot)
        slot.pinned = pinned

    patch.setattr(Scheduler, "_forget_process", staticmethod(forgotten))


def _growth_is_not_seen(patch: pytest.MonkeyPatch) -> None:
    """Count only the estimated size of a process, not the size that it has grown to."""
    patch.setattr(
        Slot, "needed_bytes", property(lambda slot: slot.spec.needed_bytes if slot.spec else 0)
    )


def _growth_after_the_placing_is_not_seen(patch: pytest.MonkeyPatch) -> None:
    """Start a load beside models that have grown since it was given its slots."""
    patch.setattr(Scheduler, "_still_fits", lambda self, operation: True)


def _one_model_in_two_places(patch: pytest.MonkeyPatch) -> None:
    """Load a model next to itself if the options differ."""
    patch.setattr(policy, "_same", lambda slot, spec: False)


def _no_turns(patch: pytest.MonkeyPatch) -> None:
    """Swap immediately for each request for another model."""
    patch.setattr(policy, "turn_ends", lambda slot: 0.0)


def _turns_have_no_end(patch: pytest.MonkeyPatch) -> None:
    """Keep a model for as long as it is in use."""
    patch.setattr(policy, "turn_ends", lambda slot: slot.last_use + (1e9 if slot.requests else 1.0))


def _nobody_wakes_at_the_end_of_a_turn(patch: pytest.MonkeyPatch) -> None:
    """Set no deadline for the end of a turn."""
    settle = Scheduler._settle

    def settled(self: Scheduler, now: Any) -> None:
        settle(self, now)
        self._turn_ends = None

    patch.setattr(Scheduler, "_settle", settled)


def _anybody_answers_the_unnamed(patch: pytest.MonkeyPatch) -> None:
    """Answer a request that names no model with the most recently used one."""
    patch.setattr(Scheduler, "_precedence", lambda self, slot: slot.last_use)


def _an_unload_takes_all(patch: pytest.MonkeyPatch) -> None:
    """Unload the other models, too, when one is unloaded."""
    place_unload = Scheduler._place_unload

    def placed(self: Scheduler, operation: Operation, now: Moment) -> bool:
        operation.only = operation.path = None
        return place_unload(self, operation, now)

    patch.setattr(Scheduler, "_place_unload", placed)


def _relief_takes_what_is_used(patch: pytest.MonkeyPatch) -> None:
    """Evict a model that is answering when memory runs out."""
    relief = policy.relief
    patch.setattr(policy, "relief", lambda slots: relief([_without_requests(s) for s in slots]))


def _relief_takes_them_all(patch: pytest.MonkeyPatch) -> None:
    """Evict one model after another when memory runs out, without checking what each has freed."""
    patch.setattr(policy, "RELIEF_PAUSE_SECONDS", 0.0)


def _the_latest_used_goes(patch: pytest.MonkeyPatch) -> None:
    """Evict the most recently used model."""
    _patched_place(patch, lambda slots: [_copy(slot, last_use=-slot.last_use) for slot in slots])


def _memory_is_without_bounds(patch: pytest.MonkeyPatch) -> None:
    """Load models at the same time that do not fit together."""
    place = policy.place
    patch.setattr(policy, "place", lambda spec, s, r, b, m: place(spec, s, r, 1 << 60, m))


def _nothing_is_too_large(patch: pytest.MonkeyPatch) -> None:
    """Accept a model that cannot fit."""
    patch.setattr(policy, "shortage", lambda *arguments: None)


def _what_is_coming_takes_no_memory(patch: pytest.MonkeyPatch) -> None:
    """Forget a load that has its slot and has not started yet."""
    place = policy.place
    patch.setattr(policy, "place", lambda spec, s, r, b, m: place(spec, s, [], b, m))


def _exclusive_requests_have_company(patch: pytest.MonkeyPatch) -> None:
    """Run other requests together with one that must be alone."""
    patch.setattr(policy, "may_go", lambda request, in_flight: True)


def _exclusive_requests_wait_for_ever(patch: pytest.MonkeyPatch) -> None:
    """Let a request that must be alone be overtaken again and again."""
    patch.setattr(policy, "has_waited_enough", lambda request, now: False)


def _the_queue_has_no_end(patch: pytest.MonkeyPatch) -> None:
    """Let any number of requests wait."""
    patch.setattr(Scheduler, "_shed", lambda self: None)


def _idle_from_the_first_moment(patch: pytest.MonkeyPatch) -> None:
    """Ignore the time of the last use."""
    patch.setattr(
        policy,
        "idle_deadline",
        lambda last_use, ttl, default: 0.0 if (default if ttl is None else ttl) else None,
    )


def _never_idle(patch: pytest.MonkeyPatch) -> None:
    """Keep a model that nobody uses."""
    patch.setattr(policy, "idle_deadline", lambda last_use, ttl, default: None)


def _crashes_for_ever(patch: pytest.MonkeyPatch) -> None:
    """Restart a backend that crashes again and again."""
    patch.setattr(policy, "is_crash_loop", lambda exits: False)


def _rejections_are_not_told(patch: pytest.MonkeyPatch) -> None:
    """Take a request out of the queue without telling its client."""
    patch.setattr(Scheduler, "_reject", lambda self, request, error: None)


def _claims_are_not_told(patch: pytest.MonkeyPatch) -> None:
    """Leave a client waiting forever for a load that is finished."""
    finish = Scheduler._finish

    def finished(self: Scheduler, operation: Operation, *rest: Any) -> None:
        operation.claims = operation.claims[:1]
        finish(self, operation, *rest)

    patch.setattr(Scheduler, "_finish", finished)


def _an_unload_cancels_nothing(patch: pytest.MonkeyPatch) -> None:
    """Continue loads although an unload was requested after them."""
    cancel = Scheduler._cancel

    def cancelled(self: Scheduler, operation: Operation, why: ProxyError, now: Moment) -> None:
        if "by an unload" not in why.message:
            cancel(self, operation, why, now)

    patch.setattr(Scheduler, "_cancel", cancelled)


def _equal_loads_do_not_join(patch: pytest.MonkeyPatch) -> None:
    """Start a separate process for each client that requests a load."""
    patch.setattr(Scheduler, "_equal", lambda self, spec, now: None)
    patch.setattr(Scheduler, "_loaded_in", lambda self, spec: None)
    patch.setattr(Scheduler, "_on_its_way", lambda self, spec: None)


def _the_name_does_not_matter(patch: pytest.MonkeyPatch) -> None:
    """Answer a request with a model other than the one it names."""
    patch.setattr(Scheduler, "_suits", lambda self, request, spec: True)


def _nothing_comes_back(patch: pytest.MonkeyPatch) -> None:
    """Find nothing loaded for the next request after an exit or an idle unload."""
    patch.setattr(Scheduler, "_wanted", lambda self, request: request.target)


def _no_turn_between_loads(patch: pytest.MonkeyPatch) -> None:
    """Drain the previous load without a turn for the requests that have waited."""
    grant = Scheduler._grant

    def granted(self: Scheduler, slot: Slot, now: Any) -> bool:
        return (
            False if any(not item.is_placed for item in self.operations) else grant(self, slot, now)
        )

    patch.setattr(Scheduler, "_grant", granted)


def _a_stop_still_grants(patch: pytest.MonkeyPatch) -> None:
    """Forget the queued requests at a stop."""
    on_shutdown = Scheduler.on_shutdown

    def shutdown(self: Scheduler, now: Any) -> Any:
        queue, self.queue = self.queue, []
        effects = on_shutdown(self, now)
        self.queue = queue
        return effects

    patch.setattr(Scheduler, "on_shutdown", shutdown)


def _grants_are_told_twice(patch: pytest.MonkeyPatch) -> None:
    """Grant one place twice."""
    decided = Scheduler._decided

    def doubled(self: Scheduler) -> Any:
        effects = decided(self)
        return effects + [effect for effect in effects if isinstance(effect, Grant)][:1]

    patch.setattr(Scheduler, "_decided", doubled)


def _copy(slot: Slot, **changes: Any) -> Slot:
    copied = Slot(slot.id)
    copied.__dict__.update({**slot.__dict__, **changes})
    return copied


def _without_requests(slot: Slot) -> Slot:
    return _copy(slot, requests=[])


def _patched_place(patch: pytest.MonkeyPatch, seen: Callable[[Any], Any]) -> None:
    place = policy.place

    def patched(spec: Any, slots: Any, *rest: Any) -> Any:
        return place(spec, seen(slots), *rest)

    patch.setattr(policy, "place", patched)


FAULTS: tuple[Fault, ...] = tuple(
    value
    for name, value in list(globals().items())
    if name.startswith("_") and getattr(value, "__doc__", None) and callable(value)
    and getattr(value, "__module__", "") == __name__
    and name not in ("_copy", "_without_requests", "_patched_place")
)  # fmt: skip
