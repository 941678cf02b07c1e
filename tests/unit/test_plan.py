"""Loads, swaps and waiting, as their clients see them, decided without a thread or a sleep.

Time stands still until a test moves it (`House.wait`), and a process starts and stops when the
test says so (`ready`, `fail`, `gone`, `die`).
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from mlxproxy import controller
from mlxproxy.controller.plan import LEAST_ROOM, MAX_LOADS
from mlxproxy.controller.policy import LONGEST_TURN_SECONDS, RELIEF_PAUSE_SECONDS
from mlxproxy.controller.state import (
    NEXT_STATES,
    Abort,
    Cancel,
    Cause,
    Claim,
    Emit,
    Forget,
    Grant,
    Limits,
    Moment,
    Phase,
    Remember,
    Request,
    Slot,
    SlotState,
    Snapshot,
    Start,
    Stop,
)
from mlxproxy.errors import (
    AnswerEnded,
    BackendFailed,
    BackendTimeout,
    InsufficientMemory,
    LoadCancelled,
    LoadFailed,
    ModelSwapped,
    ModelUnloaded,
    NoModelLoaded,
    ShuttingDown,
    TooManyRequests,
)
from tests.support.house import DRAIN, GRACE, PAUSE, STOP, TURN, House


def with_model(name: str = "a", **options: object) -> House:
    house = House(**options)  # type: ignore[arg-type]
    house.load(name)
    house.ready()
    return house


# -- loads


def test_a_request_for_the_loaded_model_is_granted_at_once() -> None:
    house = with_model()
    assert house.request() in house.granted


def test_a_load_is_told_when_the_model_has_answered() -> None:
    house = House()
    claim = house.load("a")
    assert claim not in house.ended
    house.ready()
    assert house.ended[claim] is None
    assert [effect.spec.model_id for effect in house.effects if isinstance(effect, Remember)] == [
        "a"
    ]


def test_equal_loads_join() -> None:
    house = House()
    claims = [house.load("a", f"client{number}") for number in range(5)]
    house.ready()
    assert [house.ended[claim] for claim in claims] == [None] * 5
    assert house.starts == ["a"]
    again = house.load("a")
    assert house.ended[again] is None
    assert again.operation is not None
    assert not again.operation.changed
    assert house.starts == ["a"]


def test_different_loads_go_one_after_the_other_in_one_slot() -> None:
    house = House()
    for name in "abc":
        house.load(name, name)
    house.settle()
    assert house.starts == ["a", "b", "c"]
    assert house.loaded == ["c"]


def test_loads_that_do_not_compete_go_side_by_side() -> None:
    house = House(slots=2, budget=2000)
    house.load("a")
    house.load("b")
    assert house.starts == ["a", "b"]
    house.ready(1)
    house.ready(0)
    assert house.loaded == ["a", "b"]


def test_loads_that_compete_for_memory_go_one_after_the_other() -> None:
    house = House(slots=2, budget=1500)
    house.load("a")
    house.load("b")
    assert house.starts == ["a"]
    house.ready(0)
    assert house.stops == ["a"]
    assert house.starts == ["a"]
    house.gone(0)
    assert house.starts == ["a", "b"]


def test_a_failed_load_tells_why_and_what_was_loaded_before() -> None:
    house = with_model()
    claim = house.load("b")
    waiting = house.request()
    house.gone()
    house.fail()
    assert isinstance(house.ended[claim], LoadFailed)
    assert isinstance(waiting.error, LoadFailed)
    failure = house.core.failure
    assert failure is not None
    assert (failure.spec.model_id, failure.previous) == ("b", "a")
    later = house.request()
    assert isinstance(later.error, NoModelLoaded)
    assert "b is broken" in later.error.message


def test_the_failure_is_forgotten_with_the_next_success() -> None:
    house = House()
    house.load("b")
    house.fail()
    house.load("a")
    house.ready()
    assert house.core.failure is None


def test_the_ttl_of_the_last_load_that_joined_counts() -> None:
    house = House()
    house.load("a", ttl=1000.0)
    house.load("a", "other", ttl=5.0)
    house.ready()
    assert house.core.slots[0].ttl == 5.0
    house.load("a", ttl=7.0)
    assert house.core.slots[0].ttl == 7.0


def test_a_model_comes_back_with_the_ttl_that_counted_last() -> None:
    house = with_model()
    house.load("a", ttl=50.0)
    house.die()
    house.gone()
    house.request()
    house.ready()
    assert house.core.slots[0].ttl == 50.0


# -- memory


def test_a_model_that_cannot_fit_is_refused_before_anything_is_stopped() -> None:
    house = with_model(budget=1500)
    house.core.on_memory(900)
    answering = house.request()
    with pytest.raises(InsufficientMemory, match="estimate"):
        house.load("b")
    assert answering.error is None
    assert house.stops == []


def test_a_chat_is_refused_with_the_same_words_as_a_load() -> None:
    house = with_model(budget=1500, swap_on_request=True)
    house.core.on_memory(900)
    with pytest.raises(InsufficientMemory) as caught:
        house.load("b")
    asked = house.request("b")
    assert isinstance(asked.error, InsufficientMemory)
    assert asked.error.body() == caught.value.body()
    assert house.loaded == ["a"]


def test_what_is_forced_is_loaded_all_the_same() -> None:
    house = House(budget=900)
    claim = house.load("a", force=True)
    house.ready()
    assert house.ended[claim] is None
    house.die()
    house.gone()
    assert house.request().error is None  # it comes back as it was asked for
    assert house.starts == ["a", "a"]


def test_what_is_loaded_already_is_not_refused_for_want_of_memory() -> None:
    house = with_model(budget=1500)
    house.core.on_memory(900)
    assert house.ended[house.load("a")] is None


def test_the_longest_unused_model_is_evicted_and_the_other_answers_on() -> None:
    house = House(slots=2, budget=2000)
    house.load("a")
    house.load("b")
    house.settle()
    house.wait(5)
    house.release(house.request("a"))
    house.load("c")
    assert house.stops == ["b"]
    assert house.request("a") in house.granted
    house.settle()
    assert sorted(house.loaded) == ["a", "c"]


def test_an_idle_model_is_evicted_before_a_busy_one_that_was_asked_for_longer_ago() -> None:
    house = House(slots=2, budget=2000)
    for name in "ab":
        house.load(name)
        house.settle()
        house.wait(1)
    on_a = house.request("a")
    house.load("c")
    assert house.stops == ["b"]
    assert on_a.error is None


def test_a_load_does_not_take_the_memory_that_an_earlier_one_was_given() -> None:
    house = House(slots=3, budget=3000)
    for name in "ab":
        house.load(name)
        house.settle()
    house.load("big")
    house.load("c")
    assert house.starts == ["a", "b"]
    house.gone(0)
    assert house.starts == ["a", "b", "big"]


def outgrowing(**options: Any) -> tuple[House, Claim]:
    """A load of c for which a is stopped, while b grows to more than they may hold together."""
    house = House(slots=3, budget=2500)
    for name, given in (("a", {}), ("b", options)):
        house.load(name, **given)
        house.settle()
        house.wait(1)
    claim = house.load("c")
    assert house.stops == ["a"]
    house.grow(1, 1800)
    house.gone(0)
    return house, claim


def test_a_model_that_grew_while_another_was_stopped_for_a_load_is_evicted_too() -> None:
    house, claim = outgrowing()
    assert house.stops == ["a", "b"]
    assert house.starts == ["a", "b"], "both would hold more than the budget"
    house.settle()
    assert house.loaded == ["c"]
    assert house.ended[claim] is None


def test_a_load_that_no_longer_fits_beside_a_pinned_model_is_refused_and_names_that() -> None:
    house, claim = outgrowing(pin=True)
    error = house.ended[claim]
    assert isinstance(error, InsufficientMemory)
    assert error.details["pinned"] == ["b"]
    assert house.loaded == ["b"]


def test_a_request_for_a_model_that_no_longer_fits_beside_another_waits_for_its_turn() -> None:
    house = House(slots=3, budget=2500, swap_on_request=True)
    for name in "ab":
        house.load(name)
        house.settle()
    house.wait(PAUSE)
    house.release(house.request("b"))
    wants_c = house.request("c")
    assert house.stops == ["a"]
    on_b = house.request("b")
    house.grow(1, 1800)
    house.gone(0)
    more = house.request("b")
    assert more in house.granted, "the turn of b is not over"
    house.wait(TURN)
    assert house.request("b") not in house.granted
    for each in (on_b, more):
        assert each.error is None
        house.release(each)
    house.settle()
    assert house.granted[wants_c].spec.model_id == "c"


def test_the_memory_of_a_model_that_is_leaving_is_waited_for() -> None:
    house = House(slots=2, budget=2000)
    for name in "ab":
        house.load(name)
    house.settle()
    on_b = house.request("b")
    house.die(0)
    house.load("c")
    assert on_b.error is None
    house.gone(0)
    assert house.starts == ["a", "b", "c"]
    assert house.stops == ["a"]


# -- swaps


def test_a_swap_waits_for_answers_in_flight_and_lets_no_new_one_in() -> None:
    house = with_model()
    on_a = house.request()
    house.load("b")
    later = house.request()
    assert house.state() is SlotState.DRAINING
    assert on_a.error is None
    assert later not in house.granted
    house.release(on_a)
    house.settle()
    assert house.granted[later].spec.model_id == "b"


@pytest.mark.parametrize("unload", [False, True])
def test_past_the_drain_limit_the_rest_end_with_the_reason(unload: bool) -> None:
    house = with_model()
    on_a = house.request()
    if unload:
        house.unload()
    else:
        house.load("b")
    house.wait(DRAIN - 1)
    assert on_a.error is None
    house.wait(1)
    assert isinstance(on_a.error, ModelUnloaded if unload else ModelSwapped)
    assert house.stops == []  # the answer has a moment to notice its end
    house.wait(GRACE)
    assert house.stops == ["a"]


def test_a_swap_whose_only_client_left_is_withdrawn_and_the_old_model_answers_on() -> None:
    house = with_model(swap_on_request=True)
    house.wait(TURN)
    on_a, wants_b = house.request("a"), house.request("b")
    assert house.state() is SlotState.DRAINING
    house.leave(wants_b)
    assert house.state() is SlotState.READY
    assert on_a.error is None
    assert house.request("a") in house.granted
    assert house.starts == ["a"]


def test_a_swap_goes_on_once_answers_were_cut_for_it() -> None:
    house = with_model(swap_on_request=True)
    house.wait(TURN)
    cut, wants_b = house.request("a"), house.request("b")
    house.wait(DRAIN)
    assert cut.error is not None
    house.leave(wants_b)
    house.release(cut)
    house.settle()
    assert house.loaded == ["b"]


def test_a_load_that_has_begun_goes_on_when_its_client_leaves() -> None:
    house = House()
    claim = house.load("a")
    house.leave(claim)
    assert isinstance(house.ended[claim], LoadCancelled)
    house.ready()
    assert house.loaded == ["a"]


def test_a_load_of_what_is_loaded_takes_back_the_load_before_it() -> None:
    house = with_model()
    on_a = house.request()
    house.load("b", waits=False)
    back = house.load("a", waits=False, ttl=60.0)
    assert house.ended[back] is None
    assert house.core.slots[0].ttl == 60.0
    assert on_a.error is None
    assert house.starts == ["a"]


# -- turns, where two models do not fit together


def test_a_request_for_another_model_waits_for_the_end_of_the_turn() -> None:
    house = with_model(swap_on_request=True)
    house.request("a")
    wants_b = house.request("b")
    house.wait(TURN - 0.1)
    assert house.request("a") in house.granted  # answered together with the first
    house.wait(0.1)
    assert house.state() is SlotState.DRAINING
    late = house.request("a")
    house.wait(1)
    assert late not in house.granted
    house.finish()
    assert house.granted_on == {"a": 3, "b": 1}
    assert wants_b in house.released
    assert house.starts == ["a", "b", "a"]


def test_a_model_that_is_not_in_use_is_swapped_out_before_the_end_of_its_turn() -> None:
    house = House(swap_on_request=True)
    house.load("a")
    house.ready(seconds=20.0)
    house.wait(0.5)
    house.release(house.request("a"))
    house.request("b")
    house.wait(0.9)
    assert house.stops == []  # who has read one answer may ask the next
    house.wait(0.1)
    assert house.stops == ["a"]


def test_a_model_that_nobody_uses_is_swapped_out_at_once() -> None:
    house = with_model(swap_on_request=True)
    house.wait(PAUSE)
    house.request("b")
    assert house.stops == ["a"]


def test_a_turn_is_no_longer_than_a_minute_however_long_the_load_took() -> None:
    house = House(swap_on_request=True)
    house.load("a")
    house.ready(seconds=500.0)
    house.request("a")
    house.request("b")
    house.wait(LONGEST_TURN_SECONDS)
    assert house.state() is SlotState.DRAINING


def test_a_load_that_somebody_asks_for_waits_for_no_turn() -> None:
    house = with_model(swap_on_request=True)
    house.request("a")
    house.load("b")
    assert house.state() is SlotState.DRAINING


def alternate(house: House, seconds: float) -> tuple[int, float]:
    """Two clients ask for a and b, again and again; return the answers and the longest wait."""
    answers, longest = 0, 0.0
    asked = {name: (house.request(name, name), house.time) for name in "ab"}
    end = house.time + seconds
    while house.time < end:
        house.settle()
        for name, (request, since) in list(asked.items()):
            assert request.error is None
            if request in house.granted:
                longest = max(longest, house.time - since)
                house.wait(0.1)
                house.release(request)
                answers += 1
                asked[name] = (house.request(name, name), house.time)
        house.wait(0.1)
    return answers, longest


def test_two_clients_that_alternate_between_two_models_do_not_thrash_and_nobody_starves() -> None:
    house = with_model(swap_on_request=True)
    answers, longest = alternate(house, 60.0)
    swaps = len(house.starts) - 1
    assert answers / swaps > 5
    assert longest < TURN + 1.0
    assert house.granted_on["a"] / house.granted_on["b"] == pytest.approx(1, abs=0.3)


def test_a_client_that_never_pauses_does_not_keep_another_out() -> None:
    house = with_model(swap_on_request=True)
    for _ in range(3):
        busy = house.request("a", "greedy")
        waits = house.request("b", "modest")
        for _ in range(100):
            if waits in house.granted:
                break
            house.wait(0.05)
            overlapping = house.request("a", "greedy")
            house.release(busy)
            house.settle()
            busy = overlapping
        assert waits in house.granted
        house.release(waits)
        house.finish()


def test_requests_that_wait_have_a_turn_between_two_loads() -> None:
    house = with_model(max_concurrent=1)
    for name in "bc":
        house.load(name)
    house.gone()
    own, modest = house.request(client="greedy"), house.request(client="modest")
    house.ready()
    assert house.granted[own].spec.model_id == "b"
    assert house.state() is SlotState.DRAINING
    house.release(own)
    house.settle()
    assert house.granted[modest].spec.model_id == "c"


def test_with_nothing_loaded_a_request_that_names_a_model_loads_it() -> None:
    house = House()
    assert isinstance(house.request().error, NoModelLoaded)
    asked = house.request("a")
    house.ready()
    assert asked in house.granted


def test_a_request_knows_how_much_of_its_wait_was_a_load() -> None:
    house = House()
    first = house.request("a")
    house.wait(4.0)
    late = house.request("a")
    house.wait(2.0)
    house.ready(seconds=6.0)
    assert (first.loaded, late.loaded, house.request("a").loaded) == (6.0, 2.0, 0.0)


def test_a_request_that_comes_while_a_model_is_being_stopped_gets_its_model() -> None:
    house = with_model()
    house.unload()
    asked, unnamed = house.request("a"), house.request()
    house.gone()
    assert unnamed.error is None
    house.ready()
    assert asked in house.granted
    assert unnamed in house.granted


def test_a_request_is_answered_by_the_slot_whose_model_it_names() -> None:
    house = House(slots=2, swap_on_request=False)
    house.load("a")
    house.load("b")
    house.settle()
    assert house.granted[house.request("a")].spec.model_id == "a"
    assert house.granted[house.request("b")].spec.model_id == "b"


# -- several models


def with_models(*names: str, **options: object) -> House:
    """A house in which these were loaded, one after the other."""
    house = House(slots=3, **options)  # type: ignore[arg-type]
    for name in names:
        house.load(name)
        house.settle()
        house.wait(TURN)
    return house


def main(house: House) -> str:
    spec = house.core.snapshot(Moment(house.time, house.time)).main.spec
    return spec.model_id if spec is not None else "none"


@pytest.mark.parametrize("swap_on_request", [False, True])
def test_a_request_without_a_name_is_answered_by_what_a_load_named_last(
    swap_on_request: bool,
) -> None:
    house = with_models("a", "b", swap_on_request=swap_on_request)
    house.release(house.request("a"))  # which is the last used now
    assert house.granted[house.request()].spec.model_id == "b"
    assert main(house) == "b"
    house.load("a")
    assert house.granted[house.request()].spec.model_id == "a"
    assert main(house) == "a"


def test_a_model_that_a_request_has_brought_does_not_answer_requests_without_a_name() -> None:
    house = with_models("a", swap_on_request=True)
    asked = house.request("b")
    house.settle()
    assert house.granted[asked].spec.model_id == "b"
    assert house.granted[house.request()].spec.model_id == "a"
    assert main(house) == "a"
    house.unload(name="a")
    house.finish()
    assert house.granted[house.request()].spec.model_id == "b"


def test_the_old_model_answers_on_while_the_new_one_loads_beside_it() -> None:
    house = with_models("a", budget=2000)
    house.load("b")
    assert house.granted[house.request()].spec.model_id == "a"
    house.settle()
    assert house.granted[house.request()].spec.model_id == "b"
    assert house.stops == []


def test_a_request_waits_for_the_places_of_its_own_model() -> None:
    house = with_models("a", "b", max_concurrent=1)
    house.request("a")
    waiting = house.request("a")
    assert house.request("b") in house.granted
    assert waiting not in house.granted
    told = house.core.snapshot(Moment(house.time, house.time)).slots
    assert [slot.waiting for slot in told] == [1, 0, 0]


def test_an_unload_without_a_name_is_about_what_answers_requests_without_a_name() -> None:
    house = with_models("a", "b")
    house.release(house.request("a"))
    claim = house.unload()
    house.settle()
    assert house.ended[claim] is None
    assert house.loaded == ["a"]
    assert [effect.path for effect in house.effects if isinstance(effect, Forget)] == ["/models/b"]


def test_an_unload_without_a_name_cancels_the_load_that_was_asked_for_last() -> None:
    house = with_models("a")
    loading = house.load("b")
    claim = house.unload()
    house.settle()
    assert isinstance(house.ended[loading], LoadCancelled)
    assert house.ended[claim] is None
    assert claim.operation is not None
    assert claim.operation.changed
    assert house.loaded == ["a"]


def test_an_unload_of_a_model_that_is_not_loaded_says_so_and_leaves_the_others() -> None:
    house = with_models("a", "b")
    claim = house.unload(name="c")
    assert claim.operation is not None
    assert not claim.operation.changed
    assert house.loaded == ["a", "b"]


def test_an_unloaded_model_does_not_come_back_though_another_does() -> None:
    house = with_models("a", "b", idle_ttl=60.0)
    house.wait(60)
    house.settle()
    assert house.loaded == []
    house.unload(name="b")
    asked = house.request()
    house.settle()
    assert house.granted[asked].spec.model_id == "a"


def test_a_load_with_other_options_takes_the_place_of_the_same_model() -> None:
    house = with_models("a", "b")
    house.load("a", enable_thinking=True)
    assert house.stops == ["a"]
    house.settle()
    assert sorted(house.loaded) == ["a", "b"]


def test_a_model_that_fits_beside_does_not_wait_for_the_turn_of_one_that_does_not() -> None:
    house = House(slots=4, budget=4000, swap_on_request=True)
    for name in "ab":
        house.load(name)
        house.settle()
        house.request(name)
    house.grow(0, 1900)
    big, small, later = house.request("big"), house.request("c"), house.request("d")
    assert house.starts == ["a", "b", "c"]  # c fits beside b and big, d does not
    house.settle()
    assert small in house.granted
    assert house.stops == []
    house.wait(TURN)
    assert house.core.operations[0].spec == big.target
    house.finish()
    assert {big, later} <= house.released


def test_a_model_that_crashed_too_often_is_refused_though_another_is_loaded() -> None:
    house = with_models("a", "b", swap_on_request=True)
    for number in range(3):
        if number:
            house.request("a")
            house.finish()
        slot = next(each.id for each in house.core.slots if each.spec and each.spec.path[-1] == "a")
        house.die(slot)
        house.finish()
    refused = house.request("a")
    assert isinstance(refused.error, NoModelLoaded)
    assert "a is not loaded, because it has crashed too often" in refused.error.message
    assert house.request("b") in house.granted


# -- pins


def test_a_pinned_model_is_never_evicted_and_who_wants_its_place_reads_how_to_unpin_it() -> None:
    house = House(slots=2, budget=2000)
    house.load("a", pin=True)
    house.load("b")
    house.settle()
    house.wait(5)
    house.release(house.request("b"))
    house.load("c")
    house.settle()
    assert sorted(house.loaded) == ["a", "c"]  # though b was used after a
    with pytest.raises(InsufficientMemory, match=r'Pinned.*: a.*"pin": false') as caught:
        house.load("big")
    assert caught.value.details["pinned"] == ["a"]


def test_with_one_slot_a_pinned_model_keeps_its_place() -> None:
    house = House(swap_on_request=True)
    house.load("a", pin=True)
    house.settle()
    with pytest.raises(InsufficientMemory, match="b has no place: a stay"):
        house.load("b", force=True)
    assert isinstance(house.request("b").error, InsufficientMemory)
    assert house.request("a") in house.granted
    house.load("a", pin=False)
    house.load("b")
    house.finish()
    assert house.loaded == ["b"]


def test_the_last_load_says_whether_a_model_is_pinned() -> None:
    house = House(slots=2)
    house.load("a")
    house.load("a", "other", pin=True)
    house.ready()
    assert house.core.slots[0].pinned
    house.load("a")
    assert not house.core.slots[0].pinned
    house.load("a", pin=True)
    assert house.core.slots[0].pinned
    house.request()
    house.load("a", pin=True, enable_thinking=True)
    house.finish()
    assert house.core.slots[0].pinned


def test_a_pin_ends_with_its_model() -> None:
    house = House()
    house.load("a", pin=True)
    house.settle()
    house.unload()
    house.gone()
    house.load("b")
    house.load("c")  # which b, that is still loading, does not keep out
    house.settle()
    assert house.loaded == ["c"]


def test_a_pinned_model_is_idle_only_by_its_own_ttl_and_comes_back_pinned() -> None:
    house = House(slots=2, idle_ttl=60.0, swap_on_request=True)
    house.load("a", pin=True)
    house.load("b", pin=True, ttl=30.0)
    house.settle()
    house.wait(100)
    house.settle()
    assert house.loaded == ["a"]
    house.request("b")
    house.settle()
    assert [slot.pinned for slot in house.core.slots] == [True, True]


# -- memory that runs out


def test_where_memory_runs_out_the_longest_unused_idle_model_goes_one_at_a_time() -> None:
    house = with_models("a", "b", "c", swap_on_request=True)
    house.request("a")
    house.pressure()
    assert house.stops == ["b"]
    house.pressure()  # its memory is not back yet
    house.settle()
    house.wait(RELIEF_PAUSE_SECONDS - 1)
    house.pressure()  # what the system says is still of the time before
    assert house.stops == ["b"]
    house.wait(1)
    house.pressure()
    assert house.stops == ["b", "c"]
    house.settle()
    house.wait(RELIEF_PAUSE_SECONDS)
    house.pressure()
    assert house.loaded == ["a"]  # which answers
    asked = house.request("b")
    house.settle()
    assert house.granted[asked].spec.model_id == "b"


def test_with_one_slot_its_model_stays_although_memory_runs_out() -> None:
    house = with_model()
    house.wait(100)
    house.pressure()
    assert house.loaded == ["a"]


# -- unloads


def test_an_unload_cancels_the_load_in_progress_and_those_behind_it() -> None:
    house = House()
    first, second, waiting = house.load("a"), house.load("b"), house.request()
    unload = house.unload()
    assert any(isinstance(effect, Cancel) for effect in house.effects)
    assert isinstance(waiting.error, LoadCancelled)
    house.fail()
    assert isinstance(house.ended[first], LoadCancelled)
    assert isinstance(house.ended[second], LoadCancelled)
    assert house.ended[unload] is None
    assert house.core.failure is None


def test_a_load_that_ends_well_although_it_was_cancelled_is_unloaded() -> None:
    house = House()
    claim = house.load("a")
    house.unload()
    house.ready()
    assert isinstance(house.ended[claim], LoadCancelled)
    assert house.stops == ["a"]


def test_an_unload_of_nothing_says_so() -> None:
    house = House()
    claim = house.unload()
    assert claim.operation is not None
    assert not claim.operation.changed


def test_what_was_unloaded_does_not_come_back() -> None:
    house = with_model()
    on_a = house.request()
    house.unload()
    house.die()
    house.release(on_a)
    house.gone()
    assert any(isinstance(effect, Forget) for effect in house.effects)
    assert isinstance(house.request().error, NoModelLoaded)


def test_an_unload_of_one_model_leaves_the_other() -> None:
    house = House(slots=2)
    house.load("a")
    house.load("b")
    house.settle()
    house.unload(name="a")
    house.settle()
    assert house.loaded == ["b"]


# -- exits


def test_an_exit_ends_each_answer_and_the_next_request_brings_the_model_back() -> None:
    house = with_model()
    answers = [house.request(), house.request()]
    house.die()
    for request in answers:
        assert isinstance(request.error, BackendFailed)
        house.release(request)
    house.gone()
    again = house.request()
    house.ready()
    assert again in house.granted
    assert len(house.exits) == 1


def test_a_hang_is_told_as_a_timeout() -> None:
    house = with_model()
    answer = house.request()
    house.die(hung=True)
    assert isinstance(answer.error, BackendTimeout)


def test_an_exit_is_noticed_by_its_own_slot_alone() -> None:
    house = House(slots=2)
    house.load("a")
    house.load("b")
    house.settle()
    on_a, on_b = house.request("a"), house.request("b")
    house.die(0)
    assert on_a.error is not None
    assert on_b.error is None
    assert house.request("b") in house.granted


def test_an_exit_during_a_drain_does_not_stop_the_swap() -> None:
    house = with_model()
    house.request()
    claim = house.load("b")
    house.die()
    house.wait(GRACE)
    house.settle()
    assert house.ended[claim] is None
    assert house.loaded == ["b"]


def test_after_three_exits_it_stays_down_until_a_load_is_asked_for() -> None:
    house = with_model()
    for number in range(3):
        if number:
            house.request()
            house.ready()
            house.finish()
        house.die()
        house.finish()
    refused = house.request("a")
    assert isinstance(refused.error, NoModelLoaded)
    assert "3 times" in refused.error.message
    house.load("a")
    house.ready()
    assert house.request() in house.granted


def test_exits_long_ago_do_not_count() -> None:
    house = with_model()
    for _ in range(4):
        house.die()
        house.finish()
        house.wait(200)
        assert house.request().error is None
        house.ready()
        house.finish()


# -- places


def test_a_client_that_leaves_the_queue_frees_its_place() -> None:
    house = with_model(max_concurrent=1, max_queue=1)
    house.request()
    left = house.request()
    house.leave(left)
    assert isinstance(left.error, BackendFailed)
    assert house.request().error is None


def test_one_too_many_is_refused_and_it_is_the_greediest() -> None:
    house = with_model(max_concurrent=1, max_queue=2)
    house.request(client="greedy")
    waiting = [house.request(client="greedy") for _ in range(2)]
    modest = house.request(client="modest")
    assert modest.error is None
    assert isinstance(waiting[1].error, TooManyRequests)
    assert waiting[1].error.retry_after


def test_a_request_that_must_be_alone_is_overtaken_for_a_while_only() -> None:
    house = with_model()
    other, alone = house.request(), house.request(exclusive=True)
    assert house.request() in house.granted
    house.wait(11)
    assert house.request() not in house.granted
    for request in [other, *list(house.granted)]:
        house.release(request)
    assert alone in house.granted
    assert len(house.granted) == 1


def test_a_client_may_wait_for_few_loads_at_a_time() -> None:
    house = with_model()
    house.request()
    for number in range(MAX_LOADS):
        house.load(f"b{number}", "greedy")
    with pytest.raises(TooManyRequests, match="already waiting for"):
        house.load("one more", "greedy")
    house.load("one more", "modest")


def test_where_too_many_wait_for_loads_the_newest_of_the_greediest_goes() -> None:
    house = with_model(max_queue=1)
    house.request()
    greedy = [house.load("b", "greedy") for _ in range(LEAST_ROOM)]
    with pytest.raises(TooManyRequests):
        house.load("b", "greedy")
    house.load("c", "modest")
    assert isinstance(house.ended[greedy[-1]], TooManyRequests)


def test_of_the_loads_that_a_client_does_not_wait_for_only_the_last_counts() -> None:
    house = with_model()
    on_a = house.request()
    claims = [house.load(f"b{number}", "greedy", waits=False) for number in range(50)]
    assert len(house.core.operations) == 1
    assert all(isinstance(house.ended[claim], LoadCancelled) for claim in claims[:-1])
    house.release(on_a)
    house.settle()
    assert house.starts == ["a", "b49"]


# -- idle


def test_an_idle_model_is_unloaded_and_comes_back_with_the_next_request() -> None:
    house = with_model(idle_ttl=60.0)
    answer = house.request()
    house.wait(100)
    assert house.stops == []
    house.release(answer)
    house.wait(59)
    assert house.stops == []
    house.wait(1)
    assert house.stops == ["a"]
    house.gone()
    again = house.request()
    house.ready()
    assert again in house.granted


# -- the end


@pytest.mark.parametrize("when", ["empty", "loading", "ready", "in flight", "draining"])
def test_a_stop_in_any_state_leaves_nothing(when: str) -> None:
    house = House() if when == "empty" else with_model()
    claim = answer = None
    if when in ("in flight", "draining"):
        answer = house.request()
    if when in ("loading", "draining"):
        claim = house.load("b")
        house.settle()
    house.shutdown()
    if answer is not None:
        house.wait(STOP - 1)
        assert answer.error is None
        house.wait(1)
        assert isinstance(answer.error, ShuttingDown)
        house.wait(GRACE)
    house.settle()
    assert house.closed
    if when == "draining":
        assert claim is not None
        assert isinstance(house.ended[claim], ShuttingDown)
    for ask in (house.request, house.unload, lambda: house.load("a")):
        with pytest.raises(ShuttingDown):
            ask()


def test_a_stop_lets_answers_finish_and_a_second_signal_does_not() -> None:
    house = with_model()
    first, second = house.request(), house.request()
    house.shutdown()
    assert first.error is None
    house.release(first)
    house.force_stop()
    assert isinstance(second.error, ShuttingDown)


def test_a_stop_refuses_who_waits() -> None:
    house = with_model(max_concurrent=1)
    house.request()
    waiting = house.request()
    house.shutdown()
    assert isinstance(waiting.error, ShuttingDown)


# -- what is told


def test_the_state_of_a_swap_is_told_without_an_empty_moment() -> None:
    house = with_model()
    house.effects.clear()
    house.load("b")
    house.settle()
    told = [
        effect.event.main.state.value
        for effect in house.effects
        if isinstance(effect, Emit) and isinstance(effect.event, Snapshot)
    ]
    assert [each for each in told if each != "ready"] == ["stopping", "loading"]


def test_what_is_decided_is_given_back_in_order() -> None:
    house = with_model()
    on_a = house.request()
    house.load("b")
    house.effects.clear()
    house.release(on_a)
    house.gone()
    acts = [each for each in house.effects if isinstance(each, (Stop, Start, Grant, Abort))]
    assert [type(each) for each in acts] == [Stop, Start]
    (operation,) = house.core.operations
    assert (operation.cause, operation.phase) == (Cause.ASKED, Phase.STARTING)


# -- the core itself


def test_a_slot_changes_its_state_along_the_table_alone() -> None:
    for before in SlotState:
        for after in SlotState:
            slot = Slot(0, before)
            if after in NEXT_STATES[before]:
                slot.enter(after, 1.0)
                assert (slot.state, slot.state_since) == (after, 1.0)
            else:
                with pytest.raises(AssertionError):
                    slot.enter(after, 1.0)


@pytest.mark.parametrize("name", ["state", "policy", "plan"])
def test_the_core_has_no_thread_clock_log_socket_process_or_json(name: str) -> None:
    tree = ast.parse((Path(controller.__path__[0]) / f"{name}.py").read_text())
    typing_only = [
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in branch.body
    ]
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and node not in typing_only
        for alias in node.names
    }
    own = {
        "mlxproxy.controller", "mlxproxy.controller.state", "mlxproxy.errors",
        "mlxproxy.backend.spec",
        "mlxproxy.backend.protocol",
        "mlxproxy.backend.memory",  # for the sentence about what fits
    }  # fmt: skip
    library = {
        "__future__", "collections", "collections.abc", "dataclasses", "enum", "itertools",
        "sys", "typing",
    }  # fmt: skip
    assert imported <= own | library


def test_a_grant_names_the_process_that_answers() -> None:
    house = with_model()
    request = Request("someone")
    (grant,) = house.do(lambda now: house.core.on_request(request, now))
    assert grant == Grant(request, 0, house.processes[0])


def test_limits_have_the_defaults_of_one_slot() -> None:
    assert Limits().max_loaded >= 1


def test_however_long_one_clients_answers_are_another_finds_a_place() -> None:
    house = with_model(max_concurrent=16)
    mine = [house.request(client="one") for _ in range(20)]
    assert sum(request in house.granted for request in mine) == 14
    assert house.request(client="other") in house.granted


@pytest.mark.parametrize(("places", "most"), [(1, 1), (2, 2), (7, 7), (8, 7), (32, 28)])
def test_with_few_places_one_client_may_have_them_all(places: int, most: int) -> None:
    house = with_model(max_concurrent=places)
    mine = [house.request(client="one") for _ in range(places)]
    assert sum(request in house.granted for request in mine) == most


def test_a_model_that_only_embeds_never_answers_for_one_that_writes() -> None:
    house = House(slots=2, max_loaded=2)
    for slot, name in enumerate(("a", "encoder")):  # the latest load is the encoder's
        house.load(name)
        house.ready(slot)
    spec = house.core.main_slot().spec
    assert spec is not None
    assert spec.model_id == "a"


def test_an_answer_that_somebody_ends_keeps_its_place_until_the_backend_is_free() -> None:
    house = with_model(max_concurrent=1)
    answered, queued, last = house.request(), house.request(), house.request()
    error = AnswerEnded("Somebody has ended it.")
    for request in (answered, queued):
        house.do(lambda now, it=request: house.core.on_aborted(it, error, now))
        assert request.error is error
    assert last not in house.granted
    house.release(answered)
    assert last in house.granted
