"""Who is evicted, what fits, whose turn it is: rules without a state (see test_fairness too)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest

from mlxproxy.backend.batch import ANY_BATCH, Batch
from mlxproxy.controller import policy
from mlxproxy.controller.policy import Placement, place, shortage
from mlxproxy.controller.state import Cause, Operation, Phase, Request, Slot, SlotState
from tests.support.fake_backend import model_spec

ALL = sys.maxsize


def ready(number: int, name: str, last_use: float = 0.0, busy: bool = False) -> Slot:
    slot = Slot(number, SlotState.READY, spec=model_spec(name), last_use=last_use)
    if busy:
        slot.requests.append(Request("someone"))
    return slot


def placed(
    slots: Sequence[Slot], budget: int = ALL, pinned: str = "", reserved: Any = (), **options: Any
) -> Placement | None:
    for slot in slots:
        slot.pinned = slot.spec is not None and slot.spec.model_id in pinned.split()
    return place(model_spec("new", **options), slots, reserved, budget, len(slots))


def test_an_empty_slot_is_used_before_anything_is_evicted() -> None:
    assert placed([ready(0, "a"), Slot(1)]) == Placement(1, ())


def test_the_longest_unused_goes_first() -> None:
    slots = [ready(0, "a", 30.0), ready(1, "b", 10.0), ready(2, "c", 20.0)]
    assert placed(slots) == Placement(1, (1,))


def test_an_idle_model_goes_before_a_busy_one_that_was_unused_for_longer() -> None:
    assert placed([ready(0, "a", 10.0, busy=True), ready(1, "b", 20.0)]) == Placement(1, (1,))


def test_two_idle_models_go_before_one_busy_one() -> None:
    slots = [ready(0, "a", 30.0), ready(1, "b", 20.0), ready(2, "c", 10.0, busy=True)]
    assert placed(slots, budget=2000) == Placement(0, (1, 0))


def test_no_more_go_than_have_to() -> None:
    slots = [ready(0, "a", 10.0), ready(1, "b", 20.0), ready(2, "c", 30.0)]
    assert placed(slots, budget=3000) == Placement(0, (0,))


def test_a_busy_model_goes_when_nothing_else_will_do() -> None:
    assert placed([ready(0, "a", busy=True)]) == Placement(0, (0,))


def test_a_pinned_model_never_goes() -> None:
    assert placed([ready(0, "a", 10.0), ready(1, "b", 20.0)], pinned="a") == Placement(1, (1,))
    assert placed([ready(0, "a")], pinned="a") is None


def test_what_is_on_its_way_is_waited_for() -> None:
    loading = Slot(0, SlotState.LOADING, spec=model_spec("a"))
    assert placed([loading]) is None
    taken = ready(0, "a")
    taken.operation = Operation(None, Cause.IDLE, 0.0)
    assert placed([taken]) is None


def test_the_place_of_a_load_that_has_not_started_is_kept_for_it() -> None:
    slots = [Slot(0), Slot(1)]
    coming = Operation(model_spec("b"), Cause.ASKED, 0.0, phase=Phase.STOPPING, slot=0)
    slots[0].operation = coming
    assert placed(slots, budget=2000, reserved=[coming]) == Placement(1, ())
    assert placed(slots, budget=1000, reserved=[coming]) is None


def test_what_another_load_empties_counts_as_there_until_it_is_gone() -> None:
    slots = [ready(0, "a"), Slot(1)]
    slots[0].operation = Operation(model_spec("b"), Cause.ASKED, 0.0, phase=Phase.DRAINING)
    assert placed(slots, budget=1500) is None


def test_no_more_models_are_there_than_may_be() -> None:
    slots = [ready(0, "a", 20.0), ready(1, "b", 10.0), Slot(2)]
    assert place(model_spec("new"), slots, [], ALL, 2) == Placement(2, (1,))


def test_a_model_that_cannot_fit_is_told_with_the_numbers() -> None:
    slots = [ready(0, "a"), Slot(1)]
    found = shortage(model_spec("new"), slots, 900, 2)
    assert found is not None
    assert (found.fit.needed, found.fit.available, found.pinned) == (1000, 900, ())
    assert shortage(model_spec("new"), slots, 1000, 2) is None
    assert shortage(model_spec("new", force=True), slots, 900, 2) is None


def test_what_is_pinned_is_named_where_it_leaves_no_room() -> None:
    slots = [ready(0, "a"), Slot(1)]
    slots[0].pinned = True
    assert shortage(model_spec("new"), slots, 2000, 2) is None
    short = shortage(model_spec("new"), slots, 1999, 2)
    assert short is not None
    assert (short.fit.available, [each.model_id for each in short.pinned]) == (999, ["a"])
    assert not short.is_full
    full = shortage(model_spec("new", force=True), slots[:1], 9000, 1)
    assert full is not None
    assert full.is_full
    assert shortage(model_spec("a", enable_thinking=True), slots, 1000, 1) is None  # its own place
    too_large = shortage(model_spec("big"), slots, 1999, 2)
    assert too_large is not None
    assert too_large.pinned == ()  # it would not fit if they went, either


def test_what_a_model_has_grown_to_counts() -> None:
    slots = [ready(0, "a"), Slot(1)]
    assert placed(slots, budget=2500) == Placement(1, ())
    slots[0].memory = 1600
    assert placed(slots, budget=2500) == Placement(1, (0,))
    slots[0].memory = 10  # of what is not there yet, the estimate
    assert placed(slots, budget=1500) == Placement(1, (0,))


def test_a_model_with_other_options_takes_its_own_place() -> None:
    slots = [ready(0, "a", 10.0), ready(1, "new", 20.0), Slot(2)]
    assert placed(slots, enable_thinking=True) == Placement(1, (1,))
    assert placed(slots, pinned="new", enable_thinking=True) == Placement(1, (1,))
    slots[1].state = SlotState.LOADING
    assert placed(slots, enable_thinking=True) is None


def test_for_want_of_memory_the_longest_unused_goes_that_is_neither_pinned_nor_busy() -> None:
    slots = [ready(0, "a", 1.0, busy=True), ready(1, "b", 3.0), ready(2, "c", 2.0), Slot(3)]
    assert policy.relief(slots) is slots[2]
    slots[2].pinned = True
    assert policy.relief(slots) is slots[1]
    assert policy.relief(slots[:1]) is None


def test_what_is_forced_takes_all_that_may_go() -> None:
    slots = [ready(0, "a", 20.0), ready(1, "b", 10.0)]
    forced = placed(slots, budget=500, force=True)
    assert forced is not None
    assert set(forced.victims) == {0, 1}
    assert placed([ready(0, "a"), Slot(1)], budget=500, pinned="a", force=True) == Placement(1, ())


def test_of_two_empty_slots_the_one_without_a_past_is_used() -> None:
    slots = [Slot(0, restore=model_spec("a")), Slot(1)]
    assert placed(slots) == Placement(1, ())


ALONE = Batch(settings=None)


@pytest.mark.parametrize(
    ("alone", "others", "goes"),
    [(False, [], True), (True, [], True), (False, [False], True),
     (True, [False], False), (False, [True], False)],
)  # fmt: skip
def test_a_request_that_must_be_alone_is_alone(alone: bool, others: list[bool], goes: bool) -> None:
    in_flight = [Request("other", batch=ALONE if each else ANY_BATCH) for each in others]
    slot = Slot(0, spec=model_spec("a"), requests=in_flight)
    assert policy.may_go(Request("one", batch=ALONE if alone else ANY_BATCH), slot) is goes


def test_after_its_patience_a_request_that_must_be_alone_is_not_overtaken() -> None:
    slot = Slot(0, spec=model_spec("a"), requests=[Request("other")], batch_since=90.0)
    alone, other = Request("one", batch=ALONE, since=100.0), Request("other", since=100.0)
    assert not policy.is_batch_closed(slot, [other, alone], 110.0)
    assert policy.is_batch_closed(slot, [other, alone], 110.5)
    assert not policy.is_batch_closed(slot, [other], 200.0)


def test_a_batch_that_has_begun_late_is_joined_for_as_long_as_any() -> None:
    slot = Slot(0, spec=model_spec("a"), requests=[Request("other")], batch_since=120.0)
    alone = Request("one", batch=ALONE, since=100.0)
    assert not policy.is_batch_closed(slot, [alone], 130.0)
    assert policy.is_batch_closed(slot, [alone], 130.5)


def test_a_ttl_of_zero_is_for_ever_and_none_is_the_setting() -> None:
    assert policy.idle_deadline(100.0, None, 60.0) == 160.0
    assert policy.idle_deadline(100.0, 5.0, 60.0) == 105.0
    assert policy.idle_deadline(100.0, 0.0, 60.0) is None
    assert policy.idle_deadline(100.0, None, 0.0) is None


def test_three_exits_in_five_minutes_are_a_crash_loop() -> None:
    exits = policy.recent_exits(policy.recent_exits([], 0.0), 200.0)
    assert not policy.is_crash_loop(exits)
    assert policy.is_crash_loop(policy.recent_exits(exits, 299.0))
    assert not policy.is_crash_loop(policy.recent_exits(exits, 301.0))
