"""The controller under random sequences of everything that can happen to it.

Rule-based, over fake backends: what must hold is checked after each step, and at the end nothing
may be left: no backend, no lease, no thread.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from mlxproxy.backend.batch import ANY_BATCH, Batch
from mlxproxy.controller import Claim, Lease
from mlxproxy.controller.plan import LEAST_ROOM
from mlxproxy.disconnect import Disconnect
from mlxproxy.errors import ProxyError, TooManyRequests
from tests.support.fake_backend import World, model_spec
from tests.support.waiting import until

NAMES = st.sampled_from(["a", "b", "broken"])


class Interleavings(RuleBasedStateMachine):
    leases: Bundle[tuple[Lease, Disconnect]] = Bundle("leases")
    claims: Bundle[Claim] = Bundle("claims")

    @initialize(swap_on_request=st.booleans(), places=st.integers(1, 3))
    def begin(self, swap_on_request: bool, places: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.world = World(
            self.folder,
            swap_on_request=swap_on_request,
            max_concurrent=places,
            max_queue=3,
            drain_timeout=0.02,
            shutdown_timeout=0.02,
        )
        self.world.broken.add("broken")
        self.open: list[tuple[Lease, Disconnect]] = []
        self.transitions: list[Claim] = []
        self.waiting: list[Claim] = []

    @rule(
        target=claims,
        name=NAMES,
        thinking=st.booleans(),
        client=st.sampled_from("xyz"),
        waits=st.booleans(),
    )
    def load(self, name: str, thinking: bool, client: str, waits: bool) -> Claim:
        wanted = model_spec(name, enable_thinking=thinking)
        claim = Claim(client, waits)
        try:
            self.transitions.append(self.world.controller.load(wanted, claim))
        except TooManyRequests:
            return claim
        if waits:
            self.waiting.append(claim)
        return claim

    @rule()
    def unload(self) -> None:
        claim = Claim("x")
        with contextlib.suppress(TooManyRequests):
            self.transitions.append(self.world.controller.unload(claim))
            self.waiting.append(claim)

    @rule(which=claims)
    def leave_a_load(self, which: Claim) -> None:
        if which.waits:
            self.world.controller.leave(which)

    @rule(target=leases, name=st.none() | NAMES, client=st.sampled_from("xy"), alone=st.booleans())
    def ask(self, name: str | None, client: str, alone: bool) -> tuple[Lease, Disconnect]:
        disconnect = Disconnect()
        try:
            lease = self.world.lease(
                name,
                client,
                disconnect=disconnect,
                batch=Batch(settings=None) if alone else ANY_BATCH,
            )
        except TooManyRequests:
            lease = self.open[0][0] if self.open else self._refused()
            return lease, disconnect
        self.open.append((lease, disconnect))
        return lease, disconnect

    def _refused(self) -> Lease:
        raise AssertionError("refused although nobody waits")

    @rule(which=leases)
    def finish(self, which: tuple[Lease, Disconnect]) -> None:
        lease, _ = which
        granted = lease.backend is not None
        lease.release()
        if granted or lease.error is not None:
            self.open = [each for each in self.open if each[0] is not lease]

    @rule(which=leases)
    def leave(self, which: tuple[Lease, Disconnect]) -> None:
        which[1].leave()

    @rule()
    def die(self) -> None:
        for backend in list(self.world.running):
            backend.die()

    @rule(hold=st.booleans())
    def hold_loads(self, hold: bool) -> None:
        (self.world.may_load.clear if hold else self.world.may_load.set)()

    @rule()
    def settle(self) -> None:
        self.world.may_load.set()
        self._all_done()

    @invariant()
    def there_is_never_more_than_one_backend(self) -> None:
        assert self.world.most <= 1

    @invariant()
    def the_places_are_not_exceeded_and_a_lone_request_is_alone(self) -> None:
        controller = self.world.controller
        with controller._lock:
            leases = set(controller._core.slots[0].requests)
            waiting = len(controller._core.queue)
        assert len(leases) <= controller.limits.max_concurrent
        assert waiting <= controller.limits.max_queue
        if any(lease.batch.is_alone for lease in leases):
            assert len(leases) == 1

    @invariant()
    def a_lease_without_an_error_is_on_a_backend_that_lives(self) -> None:
        controller = self.world.controller
        with controller._lock:
            for lease in controller._core.slots[0].requests:
                assert lease.backend is not None
                assert lease.error or lease.backend in self.world.running

    @invariant()
    def the_loads_that_wait_are_bounded(self) -> None:
        controller = self.world.controller
        with controller._lock:
            claims = [it for item in controller._core.operations if item.spec for it in item.claims]
            pending = len(controller._core.operations)
        for client in "xyz":
            mine = [claim for claim in claims if claim.client == client]
            assert sum(not claim.waits for claim in mine) <= 1
        assert len(claims) <= LEAST_ROOM
        assert pending <= LEAST_ROOM + 4  # what is under way, an unload, and a load for requests

    def _all_done(self) -> None:
        for transition in self.transitions:
            assert transition.done.wait(5), f"{transition.operation} does not end"
        for claim in self.waiting:
            with contextlib.suppress(ProxyError):
                assert claim.wait(5), "nobody tells a client of the end"
        self.waiting.clear()
        self.transitions.clear()

    def teardown(self) -> None:
        world = self.world
        world.may_load.set()
        self._all_done()
        for lease, _ in self.open:
            lease.release()
        controller = world.controller
        until(lambda: not world.describe()["in_flight"], what="the return of the leases")
        assert world.describe()["waiting"] == 0
        world.close()
        assert not world.running
        assert not any(thread.is_alive() for thread in controller.threads)
        for lease, _ in self.open:  # decided one way or the other: nobody waits for ever
            if lease.backend is None and lease.error is not None:
                assert isinstance(lease.error, ProxyError)
        shutil.rmtree(self.folder)


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
