"""Loads, swaps and waiting, as their clients see them; no processes, no luck."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxproxy.backend.batch import ANY_BATCH, Batch
from mlxproxy.backend.orphan import Record
from mlxproxy.controller import Claim, History, controller
from mlxproxy.controller.plan import LEAST_ROOM, MAX_LOADS, Scheduler
from mlxproxy.disconnect import Disconnect
from mlxproxy.errors import (
    BackendFailed,
    InsufficientMemory,
    InternalError,
    LoadCancelled,
    LoadFailed,
    ModelSwapped,
    ModelUnloaded,
    NoModelLoaded,
    ShuttingDown,
    TooManyRequests,
)
from tests.support.fake_backend import FakeBackend, World, model_spec
from tests.support.waiting import until


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(**limits: Any) -> World:
        made.append(World(tmp_path, **limits))
        return made[-1]

    yield make
    for each in made:
        each.close()
        assert not each.running
        assert not any(thread.is_alive() for thread in each.controller.threads)


def state(world: World) -> str:
    return str(world.describe()["state"])


# -- loads


def test_a_load_is_ready_when_it_says_so(world: Callable[..., World]) -> None:
    it = world()
    assert it.load("a") is None
    assert it.lease().wait(0)
    assert state(it) == "ready"


def test_twenty_equal_loads_at_once_start_one_process(world: Callable[..., World]) -> None:
    it = world()
    it.may_load.clear()
    asked = [it.controller.load(model_spec("a")) for _ in range(20)]
    it.may_load.set()
    assert all(transition.done.wait(5) for transition in asked)
    assert it.starts == ["a"]
    assert it.load("a") is None
    assert it.starts == ["a"]


def test_another_value_of_thinking_is_another_load(world: Callable[..., World]) -> None:
    it = world()
    it.load("a")
    it.load("a", enable_thinking=True)
    assert it.starts == ["a", "a"]
    assert it.most == 1


def test_different_loads_go_one_after_the_other_in_order(world: Callable[..., World]) -> None:
    it = world()
    it.may_load.clear()
    asked = [it.controller.load(model_spec(name)) for name in "abc"]
    it.may_load.set()
    assert all(transition.done.wait(5) for transition in asked)
    assert it.starts == ["a", "b", "c"]
    assert it.most == 1
    assert it.describe()["id"] == "c"


def test_a_failed_load_tells_why_and_what_was_loaded_before(world: Callable[..., World]) -> None:
    it = world()
    it.broken.add("b")
    it.load("a")
    assert isinstance(it.load("b"), LoadFailed)
    told = it.describe()
    assert told["state"] == "empty"
    assert told["last_failure"]["reason"] == "b is broken"
    assert told["last_failure"]["previous"] == "a"
    assert not it.running
    with pytest.raises(NoModelLoaded, match="b is broken"):
        it.lease().wait(1)


def test_the_failure_is_forgotten_with_the_next_success(world: Callable[..., World]) -> None:
    it = world()
    it.broken.add("b")
    it.load("b")
    it.load("a")
    assert it.describe()["last_failure"] is None


def test_an_unload_cancels_a_load_in_progress_and_those_behind_it(
    world: Callable[..., World],
) -> None:
    it = world()
    it.may_load.clear()
    first, second = it.controller.load(model_spec("a")), it.controller.load(model_spec("b"))
    waiting = it.lease()
    until(lambda: it.running, what="the start")
    unload = it.controller.unload()
    assert unload.done.wait(5)
    assert isinstance(first.error, LoadCancelled)
    assert isinstance(second.error, LoadCancelled)
    assert it.starts == ["a"]
    with pytest.raises(LoadCancelled):
        waiting.wait(1)
    assert state(it) == "empty"


def test_an_unload_of_nothing_says_so(world: Callable[..., World]) -> None:
    it = world()
    assert not it.controller.unload().changed
    it.load("a")
    assert it.controller.unload().changed


# -- swaps


def test_a_swap_waits_for_answers_in_flight_and_lets_no_new_one_in(
    world: Callable[..., World],
) -> None:
    it = world()
    it.load("a")
    on_a = it.lease()
    swap = it.controller.load(model_spec("b"))
    later = it.lease()
    assert not later.wait(0.05)
    assert not swap.done.is_set()
    assert on_a.error is None
    on_a.release()
    assert later.wait(5)
    assert later.spec.model_id == "b"
    assert it.most == 1


def test_requests_that_came_during_a_swap_are_answered_in_their_order(
    world: Callable[..., World],
) -> None:
    it = world(max_concurrent=1)
    it.load("a")
    on_a = it.lease()
    it.controller.load(model_spec("b"))
    later = [it.lease() for _ in range(4)]
    on_a.release()
    for lease in later:
        assert lease.wait(5)
        assert not any(other.backend for other in later[later.index(lease) + 1 :])
        lease.release()


def test_past_the_drain_limit_the_rest_end_with_the_reason(world: Callable[..., World]) -> None:
    it = world(drain_timeout=0.05)
    it.load("a")
    lease = it.lease()
    swap = it.controller.load(model_spec("b"))
    until(lambda: lease.error, what="the end of the answer")
    assert isinstance(lease.error, ModelSwapped)
    lease.release()
    assert swap.done.wait(5)
    lease = it.lease()
    unload = it.controller.unload()
    until(lambda: lease.error, what="the end of the answer")
    assert isinstance(lease.error, ModelUnloaded)
    lease.release()
    assert unload.done.wait(5)


def test_a_client_that_keeps_asking_does_not_starve_the_swap(world: Callable[..., World]) -> None:
    it = world()
    it.load("a")
    asking = True

    def ask() -> None:
        while asking:
            lease = it.lease()
            lease.wait(5)
            lease.release()

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        assert it.load("b") is None
    finally:
        asking = False
        for thread in threads:
            thread.join(5)


def test_a_request_for_another_model_swaps_only_where_that_is_set(
    world: Callable[..., World], tmp_path: Path
) -> None:
    loaded, requested = world(), World(tmp_path / "other", swap_on_request=True)
    try:
        for it in (loaded, requested):
            it.load("a")
            assert (lease := it.lease("b")).wait(5)
            assert lease.spec.model_id == ("b" if it is requested else "a")
            lease.release()
    finally:
        requested.close()


def test_two_clients_that_want_two_models_take_turns_without_a_swap_for_each_request(
    world: Callable[..., World],
) -> None:
    it = world(swap_on_request=True)
    it.load("a")
    first = it.lease("a")
    mixed = [it.lease(name) for name in "babababa"]
    first.release()
    while mixed:
        granted = until(lambda: [lease for lease in mixed if lease.wait(0)], what="a place")
        for lease in granted:
            lease.release()
            mixed.remove(lease)
    assert it.starts in (["a", "b"], ["a", "b", "a"])  # as the first turn was long enough, or not


def test_with_nothing_loaded_a_request_that_names_a_model_loads_it(
    world: Callable[..., World],
) -> None:
    it = world()
    with pytest.raises(NoModelLoaded, match="POST /v1/models/load"):
        it.lease().wait(1)
    lease = it.lease("a")
    assert lease.wait(5)
    assert lease.spec.model_id == "a"


# -- places and the queue


def test_so_many_are_served_at_once_so_many_wait_and_the_rest_is_refused(
    world: Callable[..., World],
) -> None:
    it = world(max_concurrent=2, max_queue=1)
    it.load("a")
    served, waiting = [it.lease(), it.lease()], it.lease()
    assert not waiting.wait(0.02)
    with pytest.raises(TooManyRequests) as caught:
        it.lease()
    assert caught.value.retry_after
    served[0].release()
    assert waiting.wait(1)


def test_a_client_that_leaves_the_queue_frees_its_place_at_once(
    world: Callable[..., World],
) -> None:
    it = world(max_concurrent=1, max_queue=1)
    it.load("a")
    it.lease()
    disconnect = Disconnect()
    left = it.lease(disconnect=disconnect)
    disconnect.leave()
    assert it.describe()["waiting"] == 0
    with pytest.raises(BackendFailed):
        left.wait(0)
    it.lease()  # takes the place in the queue


def test_a_waiting_client_that_left_starts_no_load(world: Callable[..., World]) -> None:
    it = world(swap_on_request=True)
    it.load("a")
    on_a = it.lease("a")
    disconnect = Disconnect()
    it.lease("b", disconnect=disconnect)
    disconnect.leave()
    on_a.release()
    assert it.lease("a").wait(5)
    assert it.starts == ["a"]


def test_a_place_that_becomes_free_goes_to_who_holds_the_fewest(
    world: Callable[..., World],
) -> None:
    it = world(max_concurrent=2)
    it.load("a")
    greedy = [it.lease(client="greedy") for _ in range(5)]
    modest = it.lease(client="modest")
    greedy[0].release()
    assert modest.wait(1)
    assert not greedy[2].wait(0)


@pytest.mark.parametrize("exclusive", [False, True])
def test_with_one_place_clients_take_turns_however_many_requests_one_has(
    world: Callable[..., World], exclusive: bool
) -> None:
    it = world(max_concurrent=2 if exclusive else 1)
    it.load("a")
    greedy = [
        it.lease(client="greedy", batch=Batch(settings=None) if exclusive else ANY_BATCH)
        for _ in range(30)
    ]
    modest = [
        it.lease(client="modest", batch=Batch(settings=None) if exclusive else ANY_BATCH)
        for _ in range(2)
    ]
    waiting, order = greedy + modest, []
    while waiting:
        (served,) = (lease for lease in waiting if lease.backend is not None)
        order.append(served.client)
        waiting.remove(served)
        served.release()
    assert order == ["greedy", *["greedy", "modest"] * 2, *["greedy"] * 27]


def test_a_request_that_must_be_alone_waits_for_the_others_and_is_alone(
    world: Callable[..., World],
) -> None:
    it = world()
    it.load("a")
    other, alone = it.lease(), it.lease(batch=Batch(settings=None))
    assert not alone.wait(0.02)
    overtaking = it.lease()
    assert overtaking.wait(0)
    other.release()
    overtaking.release()
    assert alone.wait(1)
    behind = it.lease()
    assert not behind.wait(0.02)
    alone.release()
    assert behind.wait(1)


# -- death


def test_a_death_ends_each_answer_and_the_next_request_brings_the_model_back(
    world: Callable[..., World],
) -> None:
    it = world()
    it.load("a", enable_thinking=True)
    leases = [it.lease(), it.lease()]
    it.running[0].die("it was ended by SIGKILL")
    for lease in leases:
        assert isinstance(lease.error, BackendFailed)
        lease.release()
    until(lambda: state(it) == "empty", what="the reaping")
    assert "SIGKILL" in it.describe()["last_failure"]["reason"]
    again = it.lease()
    assert again.wait(5)
    assert again.spec == model_spec("a", enable_thinking=True)


def test_after_three_deaths_it_stays_down_until_a_load_is_asked_for(
    world: Callable[..., World],
) -> None:
    it = world()
    it.load("a")
    for _ in range(3):
        assert (lease := it.lease()).wait(5)
        it.running[0].die()
        lease.release()
        until(lambda: state(it) == "empty", what="the reaping")
    with pytest.raises(NoModelLoaded, match="3 times"):
        it.lease("a").wait(1)
    assert it.load("a") is None
    assert it.lease().wait(1)


def test_a_death_that_two_threads_see_counts_once(world: Callable[..., World]) -> None:
    it = world()
    it.load("a")
    dead = it.running[0]
    for _ in range(3):
        dead.die()
    until(lambda: state(it) == "empty", what="the reaping")
    assert it.lease().wait(5)


def test_a_backend_that_dies_while_it_drains_does_not_stop_the_swap(
    world: Callable[..., World],
) -> None:
    it = world()
    it.load("a")
    lease = it.lease()
    swap = it.controller.load(model_spec("b"))
    it.running[0].die()
    lease.release()
    assert swap.done.wait(5)
    assert it.describe()["id"] == "b"


def test_a_failed_return_is_not_tried_again_by_itself(world: Callable[..., World]) -> None:
    it = world()
    it.load("a")
    it.broken.add("a")
    it.running[0].die()
    with pytest.raises(LoadFailed):
        it.lease().wait(5)
    with pytest.raises(NoModelLoaded):
        it.lease().wait(5)
    assert it.starts == ["a", "a"]


def test_the_record_has_the_command_line_that_the_process_really_shows(
    world: Callable[..., World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A standby was started with another one than the load that it carries out."""

    def command(self: FakeBackend) -> list[str]:
        return ["fake", "--standby", "1~1"] if self.running else ["fake", self.spec.path]

    monkeypatch.setattr(FakeBackend, "command", command)
    it = world()
    it.load("a")
    assert Record.read(tmp_path / "backend-1.json").command == ("fake", "--standby", "1~1")


# -- several slots


def test_each_slot_has_its_port_its_record_and_its_events(
    world: Callable[..., World], tmp_path: Path
) -> None:
    it = world(slots=2)
    it.load("a")
    it.load("b")
    assert [(each.slot, each.address.port) for each in it.running] == [(0, 1), (1, 2)]
    records = [Record.read(tmp_path / f"backend-{port}.json").command for port in (1, 2)]
    assert records == [("fake", "/models/a"), ("fake", "/models/b")]
    on_a = it.lease("a")
    it.running[1].die("it was ended by SIGKILL")
    until(lambda: not (tmp_path / "backend-2.json").exists(), what="the end of the record")
    assert on_a.error is None
    assert Record.read(tmp_path / "backend-1.json").command == ("fake", "/models/a")
    loaded = [data for kind, data in it.events if kind == "loaded"]
    assert [(data["slot"], data["id"]) for data in loaded] == [(0, "a"), (1, "b")]
    deaths = [data for kind, data in it.events if kind == "death"]
    assert [(data["slot"], data["id"]) for data in deaths] == [(1, "b")]
    loads = {(data["slot"], data["id"]) for kind, data in it.events if kind == "load"}
    assert loads == {(0, "a"), (1, "b")}


def test_a_resident_model_is_answered_by_whatever_else_is_selected(
    world: Callable[..., World],
) -> None:
    it = world(slots=2)
    it.load("a")
    it.load("b")
    for name, wanted in (("a", "a"), ("b", "b"), (None, "b"), ("c", "b")):
        assert (lease := it.lease(name)).wait(0)
        assert lease.spec.model_id == wanted
        lease.release()


def test_what_a_process_has_grown_to_counts_for_the_next_load(
    world: Callable[..., World],
) -> None:
    it = world(slots=2, available=lambda held: 2500)
    it.load("a")
    it.running[0].held = 1600
    it.load("b")
    assert [each.spec.model_id for each in it.running] == ["b"]
    assert it.most == 1


def test_where_memory_runs_out_an_idle_model_is_unloaded_and_says_so(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(controller, "WATCH_SECONDS", 0.02)
    told: list[str] = []
    it = world(slots=2, available=lambda held: 10_000, shortage=lambda: told[-1] if told else None)
    it.load("a")
    it.load("b")
    on_a = it.lease("a")
    told.append("only 0.1 GB of memory are left")
    until(lambda: [each.spec.model_id for each in it.running] == ["a"], what="the unload")
    assert on_a.error is None
    assert "only 0.1 GB of memory are left: unloading b" in caplog.text
    told.clear()
    assert (lease := it.lease("b")).wait(0)  # with MODEL_SELECTION=loaded, a answers
    lease.release()


def test_models_that_outgrow_their_budget_are_fewer(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller, "WATCH_SECONDS", 0.02)
    it = world(slots=2, available=lambda held: 3000)
    it.load("a")
    it.load("b")
    it.running[1].held = 2900
    it.running[0].held = 900
    until(lambda: [each.spec.model_id for each in it.running] == ["b"], what="the unload")


# -- idle


def test_an_idle_model_is_unloaded_and_comes_back_with_the_next_request(
    world: Callable[..., World],
) -> None:
    it = world(idle_ttl=0.1)
    it.load("a")
    until(lambda: state(it) == "empty", what="the idle unload")
    assert it.lease().wait(5)


def test_a_busy_model_is_not_idle(world: Callable[..., World]) -> None:
    it = world(idle_ttl=0.1)
    it.load("a")
    lease = it.lease()
    assert it.describe()["idle_unload_in"] is None
    with pytest.raises(pytest.fail.Exception):
        until(lambda: state(it) != "ready", 0.4)
    lease.release()
    until(lambda: state(it) == "empty", what="the idle unload")


def test_a_loads_own_ttl_beats_the_setting_and_a_joined_load_renews_it(
    world: Callable[..., World],
) -> None:
    it = world(idle_ttl=0.05)
    it.load("a", ttl=0.0)
    with pytest.raises(pytest.fail.Exception):
        until(lambda: state(it) != "ready", 0.3)
    it.load("a", ttl=0.05)
    until(lambda: state(it) == "empty", what="the idle unload")
    assert it.starts == ["a"]


# -- the end


@pytest.mark.parametrize("when", ["empty", "loading", "ready", "in flight", "draining"])
def test_a_stop_in_any_state_leaves_nothing(world: Callable[..., World], when: str) -> None:
    it = world(shutdown_timeout=0.1)
    asked, lease = None, None
    if when != "empty":
        it.load("a")
    if when == "loading":
        it.may_load.clear()
        asked = it.controller.load(model_spec("b"))
        until(lambda: it.starts == ["a", "b"], what="the start of b")
    if when in ("in flight", "draining"):
        lease = it.lease()
    if when == "draining":
        asked = it.controller.load(model_spec("b"))
    waiting = it.lease() if when in ("loading", "draining") else None
    stop = threading.Thread(target=it.controller.shutdown)
    stop.start()
    if lease is not None:
        until(lambda: lease.error, what="the end of the answer")
        assert isinstance(lease.error, ShuttingDown)
        lease.release()
    stop.join(5)
    assert not stop.is_alive()
    assert not it.running
    if asked is not None:
        assert isinstance(asked.error, ShuttingDown)
    if waiting is not None:
        with pytest.raises(ShuttingDown):
            waiting.wait(0)
    with pytest.raises(ShuttingDown):
        it.lease()
    with pytest.raises(ShuttingDown):
        it.controller.load(model_spec("a"))


def test_a_stop_lets_answers_finish(world: Callable[..., World]) -> None:
    it = world(shutdown_timeout=10)
    it.load("a")
    lease = it.lease()
    stop = threading.Thread(target=it.controller.shutdown)
    stop.start()
    until(lambda: state(it) == "draining", what="the drain")
    assert lease.error is None
    lease.release()
    stop.join(5)
    assert not stop.is_alive()


def test_a_second_signal_ends_the_wait(world: Callable[..., World]) -> None:
    it = world(shutdown_timeout=60)
    it.load("a")
    lease = it.lease()
    stop = threading.Thread(target=it.controller.shutdown)
    stop.start()
    until(lambda: state(it) == "draining", what="the drain")
    it.controller.force_stop()
    until(lambda: lease.error, what="the end of the answer")
    lease.release()
    stop.join(5)
    assert not stop.is_alive()


# -- what a soak found


def test_a_stop_during_the_drain_of_an_unload_waits_no_longer_than_a_stop(
    world: Callable[..., World],
) -> None:
    it = world(drain_timeout=30, shutdown_timeout=0.1)
    it.load("a")
    lease = it.lease()
    it.controller.unload()
    until(lambda: state(it) == "draining", what="the drain")
    stop = threading.Thread(target=it.controller.shutdown)
    stop.start()
    try:
        until(lambda: lease.error, 2, "the end of the answer")
    finally:
        lease.release()
        stop.join(5)
    assert isinstance(lease.error, ShuttingDown)


def test_what_was_unloaded_does_not_come_back_because_it_died_meanwhile(
    world: Callable[..., World],
) -> None:
    it = world()
    it.load("a")
    lease = it.lease()
    unload = it.controller.unload()
    until(lambda: state(it) == "draining", what="the drain")
    it.running[0].die()
    lease.release()
    assert unload.done.wait(5)
    with pytest.raises(NoModelLoaded):
        it.lease().wait(5)


def test_a_request_that_comes_after_an_unload_is_not_cancelled_by_it(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = world()
    it.may_load.clear()
    it.controller.load(model_spec("a"))
    until(lambda: it.running, what="the start")
    go, stopping = threading.Event(), threading.Event()
    stop = FakeBackend.stop

    def slow(backend: FakeBackend) -> None:
        stopping.set()
        go.wait(5)
        stop(backend)

    monkeypatch.setattr(FakeBackend, "stop", slow)
    it.controller.unload()
    assert stopping.wait(5)
    later = it.lease("b")
    it.may_load.set()
    go.set()
    assert later.wait(5)
    assert later.spec.model_id == "b"


def test_a_death_is_told_as_one_even_before_its_witness_has_spoken(
    world: Callable[..., World],
) -> None:
    it = world(drain_timeout=30)
    it.load("a")
    lease = it.lease()
    it.running[0].ended = "its generation thread has died"  # seen, and not told yet
    it.controller.load(model_spec("b"))
    until(lambda: lease.error, 2, "the end of the answer")
    lease.release()
    assert isinstance(lease.error, BackendFailed)


def test_what_comes_back_is_as_it_was_where_requests_choose_the_model(
    world: Callable[..., World],
) -> None:
    it = world(swap_on_request=True)
    it.load("a", enable_thinking=True)
    it.running[0].die()
    until(lambda: state(it) == "empty", what="the reaping")
    again = it.lease("a")
    assert again.wait(5)
    assert again.spec == model_spec("a", enable_thinking=True)


def test_the_ttl_of_a_load_that_joined_counts(world: Callable[..., World]) -> None:
    it = world()
    it.may_load.clear()
    it.controller.load(model_spec("a"))
    until(lambda: it.running, what="the start")
    joined = it.controller.load(model_spec("a", ttl=0.05))
    it.may_load.set()
    assert joined.done.wait(5)
    until(lambda: state(it) == "empty", 2, what="the idle unload")


def test_a_swap_that_only_who_was_turned_away_wanted_is_withdrawn(
    world: Callable[..., World],
) -> None:
    it = world(swap_on_request=True, max_concurrent=1, max_queue=2)
    it.load("a")
    on_a = it.lease("a", client="greedy")
    waiting = it.lease("a", client="greedy")
    wants_b = it.lease("b", client="greedy")
    until(lambda: state(it) == "draining", what="the drain")
    it.lease("a", client="modest")
    assert isinstance(wants_b.error, TooManyRequests)
    on_a.release()
    assert waiting.wait(5)
    assert it.starts == ["a"]


# -- the lock


def test_nothing_is_logged_under_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler of the log that waits would hold everybody who needs the lock, `/health` too."""
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Lock", threading.RLock)  # which can tell whether it is ours
        it = World(tmp_path, drain_timeout=0.0, idle_ttl=0.05)
    lock: Any = it.controller._lock
    said: list[str] = []
    under: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())
            if lock._is_owned():
                under.append(said[-1])

    root, handler = logging.getLogger(), Handler()
    level = root.level
    root.setLevel(logging.DEBUG)
    root.addHandler(handler)
    try:
        it.broken.add("broken")
        assert it.load("broken") is not None
        it.load("a", ttl=0)
        it.running[0].die()
        until(lambda: state(it) == "empty", what="its end")
        it.load("a")
        it.lease()
        it.load("b")  # ends the answer in flight
        until(lambda: state(it) == "empty", what="the idle unload")
    finally:
        it.close()
        root.removeHandler(handler)
        root.setLevel(level)
    for words in ("was not loaded", "loaded in", "crashed", "in flight aborted", "idle"):
        assert any(words in line for line in said), words
    assert under == []


# -- a share of the loads for each client, and an end to those that nobody wants


def background(it: World, client: str, name: str, **options: Any) -> None:
    it.controller.load(model_spec(name, **options), Claim(client, waits=False))


def waiting_load(it: World, client: str, name: str, **options: Any) -> Claim:
    it.controller.load(model_spec(name, **options), claim := Claim(client))
    return claim


def pending(it: World) -> int:
    return len(it.controller._core.operations)


def test_of_the_loads_that_a_client_does_not_wait_for_only_the_last_counts(
    world: Callable[..., World],
) -> None:
    it = world()
    it.load("a")
    on_a = it.lease()
    for number in range(300):
        background(it, "greedy", f"b{number}")
        assert pending(it) <= 2, "the one that drains, and the last"
    background(it, "modest", "c")
    on_a.release()
    until(lambda: it.starts == ["a", "b299", "c"], what="the last load of each")


def test_equal_loads_that_a_client_does_not_wait_for_are_one(world: Callable[..., World]) -> None:
    it = world()
    it.load("a")
    on_a = it.lease()
    for _ in range(300):
        background(it, "greedy", "b")
    (operation,) = it.controller._core.operations
    assert len(operation.claims) == 1
    on_a.release()
    until(lambda: it.starts == ["a", "b"] and state(it) == "ready", what="the load")


def test_a_load_that_another_client_waits_for_is_not_superseded(
    world: Callable[..., World],
) -> None:
    it = world()
    it.load("a")
    on_a = it.lease()
    background(it, "one", "b")
    other = waiting_load(it, "other", "b")
    background(it, "one", "c")
    on_a.release()
    assert other.wait(5)
    until(lambda: it.starts == ["a", "b", "c"] and state(it) == "ready", what="both loads")


def test_a_load_whose_only_client_has_left_is_given_up_and_the_old_model_answers_on(
    world: Callable[..., World],
) -> None:
    it = world()
    it.load("a")
    on_a = it.lease()
    left = [waiting_load(it, f"client{number}", f"b{number}") for number in range(60)]
    waiting = it.lease()
    for claim in left:
        it.controller.leave(claim)
    assert waiting.wait(5)
    until(lambda: not pending(it), what="the end of the loads")
    assert on_a.error is None
    assert it.starts == ["a"]
    for claim in left:
        with pytest.raises(LoadCancelled, match="disconnected"):
            claim.wait(0)


def test_a_load_is_carried_out_as_long_as_one_of_its_clients_is_there(
    world: Callable[..., World],
) -> None:
    it = world()
    it.load("a")
    on_a = it.lease()
    left, stays = waiting_load(it, "one", "b"), waiting_load(it, "other", "b")
    it.controller.leave(left)
    on_a.release()
    assert stays.wait(5)
    assert it.starts == ["a", "b"]


def test_a_load_that_has_begun_goes_on_when_its_client_leaves(world: Callable[..., World]) -> None:
    it = world()
    it.load("a")
    it.may_load.clear()
    claim = waiting_load(it, "one", "b")
    until(lambda: it.starts == ["a", "b"], what="the start")
    it.controller.leave(claim)
    it.may_load.set()
    assert it.lease().wait(5)
    assert it.describe()["id"] == "b"


def test_with_nothing_loaded_a_load_whose_client_has_left_goes_on_for_a_request_that_waits(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = world()
    go = threading.Event()
    stop = FakeBackend.stop

    def slow(backend: FakeBackend) -> None:
        go.wait(5)
        stop(backend)

    monkeypatch.setattr(FakeBackend, "stop", slow)
    it.load("a")
    it.controller.unload()
    until(lambda: state(it) == "stopping", what="the stop")
    wanted, unwanted = waiting_load(it, "one", "b"), waiting_load(it, "two", "c")
    waiting = it.lease()
    it.controller.leave(wanted)
    it.controller.leave(unwanted)
    go.set()
    assert waiting.wait(5)
    assert waiting.spec.model_id == "b"
    until(lambda: not pending(it), what="the end of the other load")
    assert it.starts == ["a", "b"]


def test_a_load_of_what_is_loaded_takes_back_the_load_before_it(
    world: Callable[..., World],
) -> None:
    it = world()
    it.load("a")
    on_a = it.lease()
    background(it, "one", "b")
    until(lambda: state(it) == "draining", what="the drain")
    back = it.controller.load(model_spec("a", ttl=60.0), Claim("one", waits=False))
    assert back.done.wait(5)
    assert not back.changed
    assert it.describe()["options"]["ttl"] == 60
    assert on_a.error is None
    assert it.starts == ["a"]


def test_a_client_may_wait_for_few_loads_at_a_time_and_others_get_in(
    world: Callable[..., World],
) -> None:
    it = world()
    it.load("a")
    on_a = it.lease()
    mine = [waiting_load(it, "greedy", f"b{number}") for number in range(MAX_LOADS)]
    with pytest.raises(TooManyRequests, match="already waiting for") as caught:
        waiting_load(it, "greedy", "one more")
    assert caught.value.retry_after
    joined = waiting_load(it, "greedy", f"b{MAX_LOADS - 1}")
    theirs = waiting_load(it, "modest", "c")
    it.controller.leave(mine[0])
    waiting_load(it, "greedy", "a place is free again")
    on_a.release()
    assert all(claim.wait(5) for claim in (*mine[1:], joined, theirs))


def test_where_too_many_wait_for_loads_the_newest_of_the_greediest_is_turned_away(
    world: Callable[..., World],
) -> None:
    it = world(max_queue=1)
    it.load("a")
    on_a = it.lease()
    greedy = [waiting_load(it, "greedy", "b") for _ in range(LEAST_ROOM)]
    with pytest.raises(TooManyRequests):
        waiting_load(it, "greedy", "b")
    modest = waiting_load(it, "modest", "c")
    with pytest.raises(TooManyRequests) as caught:
        greedy[-1].wait(0)
    assert caught.value.retry_after
    on_a.release()
    assert all(claim.wait(5) for claim in (*greedy[:-1], modest))
    assert it.starts == ["a", "b", "c"]


def test_a_load_that_joins_what_the_one_turned_away_for_it_wanted_is_carried_out(
    world: Callable[..., World],
) -> None:
    it = world(max_queue=1)
    it.load("a")
    on_a = it.lease()
    for _ in range(LEAST_ROOM - 1):
        waiting_load(it, "greedy", "b")
    last = waiting_load(it, "greedy", "c")
    modest = waiting_load(it, "modest", "c")
    with pytest.raises(TooManyRequests):
        last.wait(0)
    on_a.release()
    assert modest.wait(5)
    assert it.describe()["id"] == "c"


def test_loads_and_unloads_by_turns_do_not_pile_up(world: Callable[..., World]) -> None:
    it = world()
    it.load("a")
    on_a = it.lease()
    for number in range(100):
        background(it, "greedy", f"b{number}")
        it.controller.unload(claim := Claim("greedy"))
        it.controller.leave(claim)
        assert pending(it) <= 2
    on_a.release()
    until(lambda: state(it) == "empty", what="the unload")


def test_requests_that_wait_have_a_turn_between_two_loads(world: Callable[..., World]) -> None:
    it = world(max_concurrent=1)
    it.load("a")
    it.may_load.clear()
    loads = [waiting_load(it, "greedy", name) for name in "bcd"]
    until(lambda: it.starts == ["a", "b"], what="the start")
    own, modest = it.lease(client="greedy"), it.lease(client="modest")
    it.may_load.set()
    for lease, name in ((own, "b"), (modest, "c")):
        assert lease.wait(5)
        assert lease.spec.model_id == name
        assert it.describe()["id"] == name
        lease.release()
    assert all(claim.wait(5) for claim in loads)
    assert it.starts == ["a", "b", "c", "d"]


def test_a_request_that_comes_after_its_turn_waits_for_the_next_load(
    world: Callable[..., World],
) -> None:
    it = world()
    it.load("a")
    it.may_load.clear()
    waiting_load(it, "one", "b")
    until(lambda: it.starts == ["a", "b"], what="the start")
    other = waiting_load(it, "other", "c")
    first = it.lease()
    it.may_load.set()
    assert first.wait(5)
    late = it.lease()
    assert not late.wait(0.05)
    first.release()
    assert other.wait(5)
    assert late.wait(5)
    assert late.spec.model_id == "c"


def test_loads_that_are_taken_back_again_and_again_do_not_keep_requests_out(
    world: Callable[..., World],
) -> None:
    it = world(max_concurrent=2)
    it.load("a")
    it.lease(client="long")
    background(it, "greedy", "b")
    until(lambda: state(it) == "draining", what="the drain")
    modest = it.lease(client="modest")
    background(it, "greedy", "c")
    assert modest.wait(5)
    assert modest.spec.model_id == "a"


# -- what is on disk


def test_a_model_that_has_changed_on_disk_is_loaded_again(world: Callable[..., World]) -> None:
    it = world()
    before, after = ("/models/a", ()), ("/models/other", ())
    it.load("a", files=before)
    same, unknown = (it.controller.load(model_spec("a", files=files)) for files in (before, None))
    assert not same.changed
    assert not unknown.changed
    assert it.starts == ["a"]
    it.may_load.clear()
    changed = it.controller.load(model_spec("a", files=after))
    until(lambda: it.starts == ["a", "a"], what="the start")
    joined = it.controller.load(model_spec("a", files=after))
    again = it.controller.load(model_spec("a", files=before))
    assert joined.operation is changed.operation
    assert again.operation is not changed.operation
    it.may_load.set()
    assert again.done.wait(5)
    assert changed.changed
    assert it.starts == ["a", "a", "a"]


def test_a_load_that_has_not_begun_will_read_what_is_on_disk_then(
    world: Callable[..., World],
) -> None:
    it = world()
    it.load("a")
    on_a = it.lease()
    first = it.controller.load(model_spec("b", files=("/models/b", ())))
    second = it.controller.load(model_spec("b", files=("/models/other", ())))
    assert second.operation is first.operation
    on_a.release()
    assert first.done.wait(5)
    assert it.starts == ["a", "b"]


# -- what a review found


def test_the_model_of_a_swap_whose_client_left_after_answers_were_cut_for_it_is_loaded(
    world: Callable[..., World],
) -> None:
    it = world(swap_on_request=True, drain_timeout=0.05, ended_grace=30)
    it.load("a")
    cut, disconnect = it.lease("a"), Disconnect()
    it.lease("b", disconnect=disconnect)
    until(lambda: cut.error, what="the end of the answer")
    disconnect.leave()
    cut.release()
    until(lambda: state(it) == "ready", what="the swap")
    assert it.describe()["id"] == "b"
    assert (lease := it.lease()).wait(5)
    lease.release()


def test_the_ttl_of_a_load_that_joined_in_the_last_moment_counts(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = world()
    loaded = it.controller._history.loaded
    joined: list[Claim] = []

    def remember(*arguments: Any) -> None:
        loaded(*arguments)
        if not joined:
            joined.append(waiting_load(it, "other", "a", ttl=0.05))

    monkeypatch.setattr(it.controller._history, "loaded", remember)
    it.load("a")
    assert joined[0].wait(5)
    until(lambda: state(it) == "empty", 2, "the idle unload")


def test_a_swap_for_a_request_knows_how_long_the_model_took_last_time(
    world: Callable[..., World],
) -> None:
    it = world(swap_on_request=True)
    it.load("b")
    it.load("a")
    assert it.lease("b").wait(5)
    last = [data for kind, data in it.events if kind == "load"][-1]
    assert last["id"] == "b"
    assert last["last_seconds"] is not None


def test_what_a_request_needs_is_decided_in_one_step_with_its_place(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = world()
    it.load("a")

    needs_target = Scheduler.needs_target

    def unload() -> None:
        with contextlib.suppress(ShuttingDown):  # where it comes after the test's end
            it.controller.unload()

    def slow(core: Scheduler) -> bool:
        needed = needs_target(core)
        thread = threading.Thread(target=unload)
        thread.start()
        thread.join(0.2)  # as far as it gets now
        return needed

    monkeypatch.setattr(Scheduler, "needs_target", slow)
    assert it.lease("a").wait(5)


# -- what must not stop the controller


def test_a_subscriber_that_fails_stops_nothing(
    world: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    it = world()

    def fail(event: object) -> None:
        raise RuntimeError("a subscriber of the test")

    it.controller._emit = fail
    assert it.load("a") is None
    assert it.load("b") is None
    lease = it.lease()
    assert lease.wait(5)
    lease.release()
    assert it.controller.unload().wait(5)
    assert "a subscriber has failed" in caplog.text


def test_what_is_told_is_told_in_order_however_many_threads_decide(
    world: Callable[..., World],
) -> None:
    it = world()
    slow = threading.Event()
    told: list[str] = []

    def tell(event: object) -> None:
        if not told:
            slow.wait(5)  # and all others come meanwhile
        told.append(type(event).__name__)

    it.controller._emit = tell
    first = threading.Thread(target=it.controller.load, args=(model_spec("a"),))
    first.start()
    until(lambda: it.describe()["state"] == "ready", what="the load, told to nobody yet")
    assert it.lease().wait(5)
    slow.set()
    first.join(5)
    until(lambda: told[-2:] == ["Loaded", "Snapshot"], what="the end of the load, told last")


def test_a_stop_ends_although_a_process_cannot_be_ended(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    it = world(shutdown_timeout=0.0, stop_timeout=0.0)
    monkeypatch.setattr(controller, "SHUTDOWN_MARGIN_SECONDS", 0.2)
    it.load("a")
    go, stop = threading.Event(), FakeBackend.stop

    def hangs(backend: FakeBackend) -> None:
        go.wait(30)
        stop(backend)

    monkeypatch.setattr(FakeBackend, "stop", hangs)
    began = time.monotonic()
    it.controller.shutdown()
    assert time.monotonic() - began < 10
    assert "pid 1" in caplog.text
    go.set()
    until(lambda: not it.running, what="the end after all")


def test_a_start_that_fails_unforeseen_is_told_and_leaves_nothing(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = world()
    with monkeypatch.context() as patch:
        patch.setattr(FakeBackend, "wait_ready", lambda *_: 1 / 0)
        assert isinstance(it.load("a"), InternalError)
    assert not it.running
    assert it.load("a") is None


# -- memory


def test_a_chat_that_needs_a_model_that_does_not_fit_is_refused_as_a_load_is(
    tmp_path: Path,
) -> None:
    asked: list[int] = []

    def available(returned: int) -> int:
        asked.append(returned)
        return 1500

    it = World(tmp_path, available, swap_on_request=True)
    try:
        assert it.load("a") is None
        with pytest.raises(InsufficientMemory) as spec:
            it.load("big")
        with pytest.raises(InsufficientMemory) as chat:
            it.lease("big").wait(5)
        assert chat.value.message == spec.value.message
        assert it.load("big", force=True) is None
        seen = len(asked)
        assert it.lease("big").wait(5)
        assert it.lease().wait(5)
        assert len(asked) == seen, "asked for a request that needs no load"
    finally:
        it.close()


def test_a_model_that_was_forced_is_forced_again_after_the_next_start(
    world: Callable[..., World], tmp_path: Path
) -> None:
    it = world()
    it.load("a", force=True)
    last = History(tmp_path / "history.json").last()
    assert last is not None
    assert last["force"] is True
    it.load("b")
    assert "force" not in (History(tmp_path / "history.json").last() or {})
