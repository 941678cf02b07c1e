"""The core under random histories, over one to three slots; `House` checks the rules at each step.

No thread, no clock, no sleep: a failing history is replayed as it was.
"""

from __future__ import annotations

import contextlib

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule

from mlxproxy.backend.batch import ANY_BATCH, Batch
from mlxproxy.controller.state import Claim, Request, SlotState
from mlxproxy.errors import InsufficientMemory, ShuttingDown, TooManyRequests
from tests.support.house import House

WARM, COLD, ALONE = Batch(settings=(1,)), Batch(settings=(0,)), Batch(settings=None)
BATCHES = st.sampled_from([ANY_BATCH, WARM, WARM, COLD, ALONE])
NAMES = st.sampled_from(["a", "b", "c", "d", "big"])
CLIENTS = st.sampled_from("xyz")
REFUSALS = (TooManyRequests, InsufficientMemory, ShuttingDown)


class Histories(RuleBasedStateMachine):
    requests: Bundle[Request] = Bundle("requests")
    claims: Bundle[Claim] = Bundle("claims")

    @initialize(
        slots=st.integers(1, 3),
        budget=st.sampled_from([1000, 2000, 3000, 4500, 10_000]),
        max_loaded=st.integers(1, 3),
        swap=st.booleans(),
        places=st.integers(1, 3),
        idle=st.sampled_from([0.0, 60.0]),
    )
    def begin(
        self,
        slots: int,
        budget: int,
        max_loaded: int,
        swap: bool,
        places: int,
        idle: float,
    ) -> None:
        self.house = House(
            slots,
            budget,
            max_loaded=max_loaded,
            swap_on_request=swap,
            max_concurrent=places,
            max_queue=4,
            idle_ttl=idle,
        )

    @rule(target=requests, name=st.none() | NAMES, client=CLIENTS, batch=BATCHES)
    def ask(self, name: str | None, client: str, batch: Batch) -> Request:
        try:
            return self.house.request(name, client, batch)
        except ShuttingDown:
            return Request(client)

    @rule(target=claims, name=NAMES, client=CLIENTS, waits=st.booleans(),
          thinking=st.booleans(), ttl=st.sampled_from([None, None, 30.0]),
          pin=st.sampled_from([False, False, True]))  # fmt: skip
    def load(
        self, name: str, client: str, waits: bool, thinking: bool, ttl: float | None, pin: bool
    ) -> Claim:
        options = {"enable_thinking": thinking, "ttl": ttl, "pin": pin}
        try:
            return self.house.load(name, client, waits, **options)
        except REFUSALS:
            return Claim(client)

    @rule(client=CLIENTS, name=st.none() | NAMES)
    def unload(self, client: str, name: str | None) -> None:
        with contextlib.suppress(*REFUSALS):
            self.house.unload(client, name)

    @rule(data=st.data(), size=st.sampled_from([500, 1500, 2500]))
    def a_process_grows(self, data: st.DataObject, size: int) -> None:
        alive = [slot for slot, each in self.house.processes.items() if each.ready]
        if alive:
            self.house.grow(data.draw(st.sampled_from(alive)), size)

    @rule()
    def memory_runs_out(self) -> None:
        self.house.pressure()

    @rule(which=requests)
    def release(self, which: Request) -> None:
        self.house.release(which)

    @rule(which=requests)
    def disconnect(self, which: Request) -> None:
        self.house.leave(which)

    @rule(which=claims)
    def leave(self, which: Claim) -> None:
        self.house.leave(which)

    @rule(data=st.data(), well=st.booleans())
    def a_process_moves(self, data: st.DataObject, well: bool) -> None:
        house = self.house
        moving = [slot for slot in house.processes if house._is_at_work(slot)]
        if moving:
            slot = data.draw(st.sampled_from(moving))
            if house.processes[slot].stopping:
                house.gone(slot)
            elif well:
                house.ready(slot)
            else:
                house.fail(slot)

    @rule()
    def all_comes_to_rest(self) -> None:
        self.house.settle()

    @rule(data=st.data(), hung=st.booleans())
    def die(self, data: st.DataObject, hung: bool) -> None:
        alive = [slot for slot, each in self.house.processes.items() if each.ready]
        if alive:
            self.house.die(data.draw(st.sampled_from(alive)), hung)

    @rule(seconds=st.sampled_from([0.0, 1.0, 6.0, 31.0, 61.0, 121.0]))
    def wait(self, seconds: float) -> None:
        self.house.wait(seconds)

    @rule(often=st.integers(0, 30))
    def stop(self, often: int) -> None:
        if not often:  # else few histories would have a middle
            self.house.shutdown()

    def teardown(self) -> None:
        if not hasattr(self, "house"):
            return
        house = self.house
        house.finish()
        house.nobody_waits()
        house.shutdown()
        house.finish()
        house.nobody_waits()
        assert house.closed
        assert not house.processes
        assert all(slot.state is SlotState.EMPTY for slot in house.core.slots)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
