"""What is loaded: the state machine, the only lock, the leases.

All that gates a change is read and changed under one lock. One thread, the conductor, carries the
transitions out (drain, stop, start, wait until ready), always outside the lock, one after the
other: that is why there is never more than one backend, and why two loads cannot race. Nothing is
logged under the lock either: a handler of the log may be slow.

States: ``empty → loading → ready → draining → stopping → empty``; a swap goes from ``stopping`` on
to ``loading``, and a load that is withdrawn from ``draining`` back to ``ready``.

Loads are carried out in the order in which they were asked for. What bounds the wait behind them:

- A client may wait for MAX_LOADS loads at a time, and of those that it does not wait for
  (`"wait": false`) only the last counts.
- A load that nobody wants any more (its clients have left, or asked for another) is withdrawn, as
  long as nothing has been stopped for it.
- When a load has ended, the requests that wait and that the loaded model may answer get the free
  places, once, before the next load drains it. So a request waits for the load that is under way,
  and behind its own queue, but not for all the loads behind that one; and a load waits for the
  answers of one such turn at most.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlxproxy import fairness
from mlxproxy.backend import Backend, Load, without_paths
from mlxproxy.errors import (
    BackendFailed,
    BackendTimeout,
    InternalError,
    LoadCancelled,
    ModelSwapped,
    ModelUnloaded,
    NoModelLoaded,
    ProxyError,
    ShuttingDown,
    TooManyRequests,
)
from mlxproxy.history import History
from mlxproxy.ownership import Ownership
from mlxproxy.presence import Presence
from mlxproxy.upstream import Upstream

log = logging.getLogger("mlxproxy.controller")

DEATHS, DEATHS_WITHIN = 3, 300.0  # so many deaths in so many seconds, and it stays down
RETRY_AFTER = 5
# A request that must be alone (see guard) lets others overtake it for so long, then has its turn.
PATIENCE_OF_EXCLUSIVE = 10.0
# What was sent to the backend cannot be called back: until it has let go of it, but no longer.
RELEASE_SECONDS = 30.0
MAX_LOADS = 4  # that one client may wait for at a time
LEAST_ROOM = 8  # requests that may wait for loads at least, and for unloads at most
LONGEST = 12  # times the stall timeout that an answer in one piece may take

Launch = Callable[[Load, Callable[[str], None]], Backend]
Emit = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Limits:
    """The settings the controller decides by (seconds, counts): see settings.py."""

    drain_timeout: float = 120.0
    shutdown_timeout: float = 30.0
    stall_timeout: float = 300.0
    idle_ttl: float = 0.0
    max_concurrent: int = 32
    max_queue: int = 64
    swap_on_request: bool = False
    ended_grace: float = 5.0  # for answers that were ended to notice it; no setting


class Claim:
    """What one client wants of a load or an unload, from its request until the end.

    A load is carried out for its claims: one that has lost its last is withdrawn.

    Args:
        client: who asks, for a fair share.
        waits: whether its request waits for the end. A claim that nobody waits with lasts until the
            end, too, or until its client makes another such claim.
    """

    def __init__(self, client: str = "", waits: bool = True) -> None:
        self.client = client
        self.waits = waits
        self.since = time.monotonic()
        self.transition: Transition | None = None
        self._error: ProxyError | None = None
        self._decided = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most `timeout` seconds; return whether it has come.

        Raises:
            ProxyError: the load failed, or is not waited for any longer.
        """
        if not self._decided.wait(timeout):
            return False
        if self._error is not None:
            raise self._error
        return True

    def end(self, error: ProxyError | None) -> None:
        """Wake whoever waits. Only the first call counts."""
        if not self._decided.is_set():
            self._error = error
            self._decided.set()


@dataclass(eq=False)
class Transition:
    """A load or an unload that was asked for, and how far it is.

    Attributes:
        load: what is to be loaded; None for an unload.
        cause: ``asked``, ``request`` (a chat needs it), ``idle``, ``death`` or ``shutdown``.
        claims: of those who asked for it and still want it.
        changed: whether there was anything to do.
        previous: the model that was stopped for it.
        cancelled: set by others than the conductor, with the reason in `why` before.
        took: seconds from the start of the process until it answered.
    """

    load: Load | None
    cause: str = "asked"
    phase: str = "waiting"
    since: float = field(default_factory=time.monotonic)
    last_seconds: float | None = None
    claims: list[Claim] = field(default_factory=list)
    changed: bool = True
    previous: str | None = None
    error: ProxyError | None = None
    backend: Backend | None = None
    why: ProxyError | None = None
    took: float = 0.0
    cancelled: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)

    def serves(self, load: Load) -> bool:
        """Whether it ends with what that load asks for; its process reads what is on disk then."""
        backend = self.backend
        return self.load == load and (backend is None or load.is_met_by(backend.load))

    def may_be_withdrawn(self) -> bool:
        """Whether it is a load for which nothing has been stopped or started yet."""
        return self.load is not None and self.phase in ("waiting", "draining")

    def finish(self, error: ProxyError | None = None) -> None:
        self.error = error
        self.phase = "failed" if error else "done"
        self.backend = None
        self.done.set()
        for claim in self.claims:
            claim.end(error)

    def progress(self) -> dict[str, Any]:
        """How far it is: only what is known, never an invented percentage."""
        backend, load = self.backend, self.load
        read = backend.bytes_read() if backend else None
        total = load.model.size_bytes if load else None
        return {
            "model_id": load.path if load else None,
            "id": load.model_id if load else None,
            "phase": self.phase,
            "seconds": round(time.monotonic() - self.since, 1),
            "bytes_read": min(read, total) if read is not None and total else None,
            "bytes_total": total,
            "last_seconds": self.last_seconds,
        }


class Lease:
    """A request's place: first in the queue, then on the loaded model, until it is released."""

    def __init__(
        self,
        controller: Controller,
        target: Load | None,
        client: str,
        presence: Presence,
        exclusive: bool,
    ) -> None:
        self.target = target
        self.client = client
        self.presence = presence
        self.exclusive = exclusive
        self.turn = 0  # see fairness
        self.since = time.monotonic()
        self.granted = 0.0
        self.heard = 0.0  # when the last byte of this answer came
        self.in_one_piece = False  # nothing of it comes before all of it
        self.backend: Backend | None = None
        self.error: ProxyError | None = None
        self.upstream: Upstream | None = None
        self._controller = controller
        self._decided = threading.Event()

    @property
    def load(self) -> Load:
        """What answers this request; there once :meth:`wait` has returned True."""
        assert self.backend is not None
        return self.backend.load

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for the place, at most `timeout` seconds; whether it has been granted.

        Raises:
            ProxyError: it will not be granted (the load failed, shutdown, nothing loaded).
        """
        if not self._decided.wait(timeout):
            return False
        if self.error is not None:
            raise self.error
        return True

    def connect(self, interval: float) -> Upstream:
        """Opens the connection to the backend; whoever ends the lease ends it too.

        Raises:
            ProxyError: the lease has been ended, or the backend does not accept.
        """
        assert self.backend is not None
        try:
            stall = self._controller.limits.stall_timeout
            upstream = Upstream(
                self.backend.port,
                min(interval, stall / 4),
                lets_go=self.backend.has("departures"),
            )
        except BackendFailed as error:
            raise self.fault(error) from None
        self._controller.attach(self, upstream)
        return upstream

    def fault(self, seen: ProxyError) -> ProxyError:
        """Why an answer ended early: the reason the lease was ended for, else what was seen."""
        return self._controller.fault(self, seen)

    def stalled(self) -> ProxyError | None:
        """Called after a silence; the error if it has lasted too long."""
        return self._controller.stalled(self)

    def comment(self) -> bytes:
        """What a waiting stream tells its client, as an SSE comment."""
        return self._controller.comment(self)

    def release(self, finished: bool = True) -> None:
        """Give the place back, or leave the queue. May be called any number of times.

        Args:
            finished: whether the backend has sent all of its answer. Otherwise the place is taken
                until the backend has let go of the request: it may be in the middle of a step.
        """
        self.presence.on_leave(None)
        upstream, backend = self.upstream, self.backend
        if not finished and upstream is not None and backend is not None:
            upstream.abort(backend_lives=backend.ended is None)
            if backend.ended is None:
                upstream.wait_released(RELEASE_SECONDS)
        self._controller.release(self)

    # -- by the controller, under its lock

    def grant(self, backend: Backend) -> None:
        self.backend = backend
        self.granted = time.monotonic()
        self._decided.set()

    def end(self, error: ProxyError) -> None:
        if self.error is None:
            self.error = error
        self._decided.set()
        if self.upstream is not None:
            lives = self.backend is not None and self.backend.ended is None
            self.upstream.abort(backend_lives=lives)


class Controller:
    """Loads, unloads, and leases of the one backend on the port.

    Args:
        limits: how long and how many.
        launch: makes the (not yet started) backend for a load; told whom to call at its end.
        ownership: records the child for the case that we are killed.
        history: remembers what was loaded and how long it took.
        emit: told of every change, for events and metrics; must not block.
    """

    def __init__(
        self,
        limits: Limits,
        launch: Launch,
        ownership: Ownership,
        history: History,
        emit: Emit = lambda kind, data: None,
    ) -> None:
        self.limits = limits
        self._launch = launch
        self._ownership = ownership
        self._history = history
        self._emit = emit

        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # what the conductor waits on
        self._state = "empty"
        self._state_since = time.time()
        self._backend: Backend | None = None
        self._loaded_at = 0.0
        self._ttl: float | None = None  # of the last load that was asked for, equal ones included
        self._mourned: Backend | None = None  # whose death has been told and counted
        self._transitions: deque[Transition] = deque()  # the first is under way
        self._leases: set[Lease] = set()
        self._queue: deque[Lease] = deque()
        self._turns = itertools.count(1)
        self._last_use = time.monotonic()
        self._failure: dict[str, Any] | None = None
        self._deaths: list[float] = []
        self._resume: Load | None = None  # what the next request brings back
        self._down = False  # died too often: stays down until a load is asked for
        self._asked = False
        self._closing = False
        self._hurry = False
        self._conductor = threading.Thread(target=self._conduct, name="conductor", daemon=True)
        self._conductor.start()

    # -- loads and unloads

    def load(self, load: Load, claim: Claim | None = None) -> Transition:
        """Ask for a load, or join an equal one; the claim's `wait` returns when it has ended.

        Raises:
            ShuttingDown: the proxy is about to end.
            TooManyRequests: the client waits for too many loads, or too many clients wait.
        """
        claim = claim or Claim()
        with self._lock:
            self._refuse_if_closing()
            self._admit(claim, joins=self._equal(load) is not None)
            transition = self._equal(load)  # not before: what it joins may have been given up
            self._asked = True
            self._down = False
            self._deaths.clear()
            if transition is None:
                transition = self._add(self._transition(load, "asked"))
            elif transition.done.is_set():
                self._ttl = load.ttl
                self._changed.notify_all()
            else:
                transition.cause = "asked"
                transition.load = load  # equal, but for the ttl
            if not claim.waits:
                self._supersede(claim.client)
            self._claim(transition, claim)
            self._withdraw()
            return transition

    def _equal(self, load: Load) -> Transition | None:
        """What a load joins: the last to come, if it is equal, or else what is loaded."""
        if self._transitions:
            last = self._transitions[-1]
            return last if last.serves(load) and not last.cancelled.is_set() else None
        if not self._is_loaded(load):
            return None
        nothing = Transition(load, changed=False)
        nothing.finish()
        return nothing

    def _is_loaded(self, load: Load) -> bool:
        backend = self._backend
        if self._state != "ready" or backend is None or backend.ended is not None:
            return False
        return load.is_met_by(backend.load)

    def _transition(self, load: Load, cause: str) -> Transition:
        return Transition(load, cause, last_seconds=self._history.seconds(load))

    def unload(self, claim: Claim | None = None) -> Transition:
        """Ask for the unload of what is loaded; cancel the loads that were asked for before.

        Raises:
            ShuttingDown: the proxy is about to end.
            TooManyRequests: too many wait for an unload.
        """
        claim = claim or Claim()
        with self._lock:
            self._refuse_if_closing()
            waiting = [it for item in self._transitions if item.load is None for it in item.claims]
            self._make_room(claim, waiting, LEAST_ROOM)
            self._asked = True
            self._resume = None
            self._down = False
            error = LoadCancelled("The load was cancelled: an unload was asked for meanwhile.")
            for item in list(self._transitions):
                if item.load is not None:
                    self._fail_waiting(item.load, error)
                    name = item.load.model_id
                    why = LoadCancelled(f"The load of {name} was cancelled by an unload.")
                    self._cancel(item, why)
            last = self._transitions[-1] if self._transitions else None
            if last is not None and last.load is None:
                last.cause = "asked"
            elif last is None and self._backend is None:
                last = Transition(None, changed=False)
                last.finish()
            else:
                last = self._add(Transition(None))
            self._claim(last, claim)
            return last

    def leave(self, claim: Claim) -> None:
        """The client of a claim is gone. Called any number of times, from any thread."""
        with self._lock:
            self._drop(claim, LoadCancelled("The client has left."))

    def _claim(self, transition: Transition, claim: Claim) -> None:
        claim.transition = transition
        transition.claims.append(claim)
        if transition.done.is_set():
            claim.end(transition.error)

    def _drop(self, claim: Claim, error: ProxyError) -> None:
        if claim.transition is not None and claim in claim.transition.claims:
            claim.transition.claims.remove(claim)
            self._withdraw()
        claim.end(error)

    def _supersede(self, client: str) -> None:
        """Forgets what the client wanted without waiting for it: only its last word counts."""
        for transition in self._transitions:
            transition.claims = [it for it in transition.claims if it.waits or it.client != client]

    def _admit(self, claim: Claim, joins: bool) -> None:
        """Returns if the client may ask for one more load.

        Raises:
            TooManyRequests: it waits for too many, or too many wait and it has the most.
        """
        loads = [item for item in self._transitions if item.load is not None]
        mine = sum(
            any(it.waits and it.client == claim.client for it in item.claims) for item in loads
        )
        if claim.waits and not joins and mine >= MAX_LOADS:
            raise TooManyRequests(
                f"You wait for {mine} loads already. Wait for one of them, or unload.",
                retry_after=RETRY_AFTER,
            )
        claims = [it for item in loads for it in item.claims]
        self._make_room(claim, claims, max(LEAST_ROOM, self.limits.max_queue))

    def _make_room(self, claim: Claim, others: list[Claim], room: int) -> None:
        """Turns away the newest claim of whoever has the most, if there is one too many.

        Raises:
            TooManyRequests: that is the newcomer's.
        """
        if len(others) < room:
            return
        # Whoever does not wait has been told that the load goes on.
        waiting = sorted((it for it in others if it.waits), key=lambda it: it.since)
        refused = fairness.turned_away([*waiting, claim])
        error = TooManyRequests(
            "Too many requests wait for loads and unloads already. Try again in a few seconds.",
            retry_after=RETRY_AFTER,
        )
        if refused is claim:
            raise error
        self._drop(refused, error)

    def _add(self, transition: Transition) -> Transition:
        self._transitions.append(transition)
        self._changed.notify_all()
        return transition

    def _cancel(self, transition: Transition, why: ProxyError) -> None:
        """Ends a load that was asked for: at once, or where it is under way as soon as it can."""
        transition.why = transition.why or why
        transition.cancelled.set()
        if transition is not self._transitions[0]:
            self._transitions.remove(transition)
            transition.finish(why)
        self._changed.notify_all()

    def _refuse_if_closing(self) -> None:
        if self._closing:
            raise ShuttingDown("mlxproxy is stopping. Try again when it has been started anew.")

    # -- leases

    def lease(
        self,
        client: str,
        presence: Presence,
        target: Callable[[], Load | None] = lambda: None,
        exclusive: bool = False,
    ) -> Lease:
        """A place for one request: granted at once if the model is there and a place is free.

        Args:
            client: who asks, for a fair share.
            presence: the client's; when it leaves, the place is given up.
            target: finds the load for the model that the request names (None: whatever is
                loaded). Called without the lock, and only where it matters.
            exclusive: whether the request must have the backend to itself.

        Raises:
            ShuttingDown, TooManyRequests.
        """
        wanted: Load | None = None
        resolved = False
        while True:
            with self._lock:
                self._refuse_if_closing()
                if resolved or not self._needs_target():
                    lease = Lease(self, wanted, client, presence, exclusive)
                    self._enqueue(lease)
                    break
            wanted, resolved = target(), True
        presence.on_leave(lambda: self._left(lease))
        return lease

    def _enqueue(self, lease: Lease) -> None:
        lease.turn = next(self._turns)
        self._queue.append(lease)
        self._settle()
        if lease in self._queue and len(self._queue) > self.limits.max_queue:
            self._turn_away(lease)

    def _turn_away(self, newcomer: Lease) -> None:
        """The queue is too long by one: the newest of whoever has the most in it has to go.

        Raises:
            TooManyRequests: that is the newcomer.
        """
        refused = fairness.turned_away(self._queue)
        self._queue.remove(refused)
        error = TooManyRequests(
            f"{len(self._leases)} answers are in flight and {len(self._queue)} requests wait "
            "already. Try again in a few seconds.",
            retry_after=RETRY_AFTER,
        )
        if refused is newcomer:
            raise error
        refused.end(error)
        self._withdraw()

    def _needs_target(self) -> bool:
        settled = self._state == "ready" and not self._transitions
        return self.limits.swap_on_request or not settled

    def _settle(self, turn: bool = False) -> None:
        """Grants what can be granted; decides a load where the first in the queue needs one.

        Args:
            turn: a transition has just ended, so that who waits has a turn before the next load.
        """
        pending = self._transitions
        if self._closing or (pending and not (turn and pending[0].load is not None)):
            return
        backend = self._backend
        if self._state == "ready" and backend is not None and backend.ended is None:
            self._grant(backend)
            first = next((it for it in self._queue if not self._suits(it, backend.load)), None)
            if first is not None and first.target is not None and not pending:
                self._add(self._transition(first.target, "request"))
        elif self._state == "empty":
            while self._queue and not pending:
                wanted = None if self._down else self._wanted(self._queue[0])
                if wanted is not None:
                    self._add(self._transition(wanted, "request"))
                else:
                    self._queue.popleft().end(self._nothing_loaded())

    def _wanted(self, lease: Lease) -> Load | None:
        """What to load for a request while nothing is loaded: as it was, where it is the same."""
        before = self._resume
        return before if before is not None and self._suits(lease, before) else lease.target

    def _suits(self, lease: Lease, load: Load) -> bool:
        """Whether what is loaded may answer the request."""
        named = lease.target if self.limits.swap_on_request else None
        return named is None or named.path == load.path

    def _grant(self, backend: Backend) -> None:
        """Grants the free places, a fair share to each client."""
        held = Counter(lease.client for lease in self._leases)
        waiting = [lease for lease in self._queue if self._suits(lease, backend.load)]
        now = time.monotonic()
        while waiting and len(self._leases) < self.limits.max_concurrent:
            if any(lease.exclusive for lease in self._leases):
                return
            lease = fairness.next_in_turn(waiting, held)
            waiting.remove(lease)
            if lease.exclusive and self._leases:
                if now - lease.since > PATIENCE_OF_EXCLUSIVE:
                    return
                continue
            self._queue.remove(lease)
            self._leases.add(lease)
            held[lease.client] += 1
            fairness.served(self._queue, lease.client, next(self._turns))
            lease.grant(backend)

    def _nothing_loaded(self) -> ProxyError:
        failure = self._failure
        if failure is not None:
            return NoModelLoaded(
                f"No model is loaded: {failure['reason']} POST /v1/models/load loads one; "
                "GET /v1/models lists them."
            )
        return NoModelLoaded(
            "No model is loaded. POST /v1/models/load with a model_id from GET /v1/models first, "
            "or name one of them as the model."
        )

    def release(self, lease: Lease) -> None:
        """See Lease.release."""
        with self._lock:
            upstream, lease.upstream = lease.upstream, None
            if lease in self._leases:
                self._leases.remove(lease)
                self._last_use = time.monotonic()
                self._settle()
                if self._transitions or self._idle_left() is not None:
                    self._changed.notify_all()  # a drain, or the idle time, waits for this
            elif lease in self._queue:
                self._leave_queue(lease)
        if upstream is not None:
            upstream.close()

    def _left(self, lease: Lease) -> None:
        """The client is gone: out of the queue, or the backend's connection ended."""
        with self._lock:
            if lease in self._queue:
                self._leave_queue(lease)
            lease.end(BackendFailed("The client has left."))

    def _leave_queue(self, lease: Lease) -> None:
        self._queue.remove(lease)
        self._last_use = time.monotonic()
        self._withdraw()
        self._settle()

    def _withdraw(self) -> None:
        """Cancels the loads that nobody wants any more, if nothing is stopped for them."""
        for transition in list(self._transitions):
            if transition.may_be_withdrawn() and self._needless(transition):
                self._cancel(transition, LoadCancelled("Nobody waits for this load any more."))

    def _needless(self, transition: Transition) -> bool:
        """Whether it is a load without a claim, and without a request that needs it."""
        load = transition.load
        if load is None or transition.claims:
            return False
        before = self._before(transition)
        return not any(
            self._suits(lease, load) and not (before and self._suits(lease, before))
            for lease in self._queue
        )

    def _before(self, transition: Transition) -> Load | None:
        """What will be loaded when it is the transition's turn, as far as that is known."""
        backend = self._backend
        before = backend.load if backend is not None and backend.ended is None else None
        for earlier in self._transitions:
            if earlier is transition:
                break
            if not earlier.cancelled.is_set():
                before = earlier.load
        return before

    def attach(self, lease: Lease, upstream: Upstream) -> None:
        """See Lease.connect."""
        with self._lock:
            if lease.error is None:
                lease.upstream = upstream
                return
        upstream.close()
        raise lease.error

    def fault(self, lease: Lease, seen: ProxyError) -> ProxyError:
        """See Lease.fault."""
        if lease.error is None and lease.backend is not None and lease.backend.check():
            self._ended(lease.backend.ended or "")  # not told yet by the thread that saw it
        return lease.error or seen

    def stalled(self, lease: Lease) -> ProxyError | None:
        """See Lease.stalled. A backend that tells of its life is believed; of another one, a
        silent answer ends alone while the backend feeds others, and one that would be silent
        anyhow goes on while the backend answers anybody."""
        backend = lease.backend
        silence = self.limits.stall_timeout
        if lease.error is not None or backend is None:
            return lease.error
        tells = backend.has("heartbeat")
        if tells and (reason := backend.hang(lease.granted, silence)) is not None:
            return self._give_up(lease, backend, reason)
        now = time.monotonic()
        if now - max(lease.heard, lease.granted) < silence:
            return None
        silent_anyhow = tells or (lease.in_one_piece and not lease.exclusive)
        answers_others = tells or now - max(backend.heard, lease.granted) < silence
        if not answers_others and not (silent_anyhow and backend.generates(silence)):
            return self._give_up(
                lease, backend, f"it sent nothing for {silence:g} s (STALL_TIMEOUT)"
            )
        since = max(lease.heard, lease.granted) if tells else lease.granted
        if silent_anyhow and now - since < LONGEST * silence:
            if not tells:
                lease.heard = time.monotonic()
            return lease.error
        return BackendTimeout(
            f"The backend sent nothing for this answer for {silence:g} s (STALL_TIMEOUT), though "
            "it answers others. Ask again."
        )

    @staticmethod
    def _give_up(lease: Lease, backend: Backend, reason: str) -> ProxyError:
        backend.give_up(reason)
        return lease.error or BackendTimeout(
            f"The backend was taken for dead: {reason}. Ask again."
        )

    def comment(self, lease: Lease) -> bytes:
        """See Lease.comment."""
        seconds = int(time.monotonic() - lease.since)
        with self._lock:
            current = self._transitions[0] if self._transitions else None
            place = self._queue.index(lease) + 1 if lease in self._queue else 0
        if current is not None and current.load is not None:
            what = f"{'draining for' if current.phase == 'draining' else 'loading'} "
            what += current.load.model_id
        else:
            what = f"waiting for a place, number {place} in the queue"
        return f": {what} {seconds}s\n\n".encode()

    # -- what the conductor does

    def _conduct(self) -> None:
        while True:
            with self._lock:
                while (transition := self._next()) is None:
                    self._changed.wait(self._idle_left())
            try:
                error = self._perform(transition)
            except Exception:
                log.exception("a transition failed in a way that is not foreseen")
                error = InternalError("The load failed for an internal reason; see the log.")
                self._abandon()
            backend = transition.backend
            with self._lock:
                self._transitions.remove(transition)
                # Who waits for a load that was cancelled has come since, and waits for the next.
                if error is not None and not transition.cancelled.is_set():
                    self._fail_waiting(transition.load, error)
                if error is None and transition.load is not None:
                    self._loaded(transition, transition.load)
                transition.finish(error)
                self._settle(turn=True)
                self._emit("state", self._describe())
                if self._closing and transition.cause == "shutdown":
                    return
            if error is None and backend is not None and backend.ended is not None:
                self._ended(backend.ended)  # between its first answer and now

    def _next(self) -> Transition | None:
        backend = self._backend
        if not self._transitions and backend is not None:
            if backend.ended is not None:
                self._add(Transition(None, "death"))
            elif self._idle_left() == 0:
                self._resume = backend.load
                self._add(Transition(None, "idle"))
        while self._transitions:
            first = self._transitions[0]
            error: ProxyError | None = None
            if first.load is not None and self._needless(first):
                error = LoadCancelled("Nobody waits for this load any more.")
            elif first.load is not None and self._is_loaded(first.load):
                first.changed = False  # what was between has been withdrawn
                self._ttl = first.load.ttl
            else:
                return first
            self._transitions.popleft()
            first.finish(error)
            self._settle(turn=True)
        return None

    def _idle_left(self) -> float | None:
        """Seconds until the idle unload, or None while there is nothing to count."""
        backend = self._backend
        if self._state != "ready" or backend is None or self._leases or self._queue:
            return None
        ttl = self.limits.idle_ttl if self._ttl is None else self._ttl
        return max(0.0, self._last_use + ttl - time.monotonic()) if ttl else None

    def _perform(self, transition: Transition) -> ProxyError | None:
        if self._in_vain(transition):
            return self._cancelled(transition)
        if transition.cause == "idle" and self._backend is not None:
            log.info("%s has been idle: unloading it", self._backend.load.model_id)
        if self._backend is not None and not self._drain(transition):
            return self._cancelled(transition)
        self._stop_backend(transition)
        if transition.load is None:
            if transition.cause == "asked":
                self._history.unloaded()
            with self._lock:
                if transition.cause == "asked":
                    self._resume = None  # it may have died while it drained
                self._enter("empty")
            return None
        return self._start_backend(transition, transition.load)

    def _drain(self, transition: Transition) -> bool:
        """Waits for the answers in flight, then ends the rest; False if cancelled meanwhile."""
        backend = self._backend
        assert backend is not None
        limit = self.limits.drain_timeout
        if transition.cause == "shutdown":
            limit = self.limits.shutdown_timeout
        deadline = time.monotonic() + limit
        with self._lock:
            transition.phase = "draining"
            if self._leases:
                self._enter("draining")
            while self._leases and not (backend.ended or self._hurry or self._in_vain(transition)):
                if self._closing:  # since this drain began
                    deadline = min(deadline, time.monotonic() + self.limits.shutdown_timeout)
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
        if backend.ended is not None:
            self._ended(backend.ended)  # who saw it may not have told it yet
        with self._lock:
            if self._in_vain(transition):
                self._enter("ready")
                return False
            transition.phase = "stopping"  # answers are cut for it: too late to withdraw it
            error = self._ending_for(transition, limit)
            cut = [lease for lease in self._leases if lease.error is None]
            for lease in cut:
                lease.end(error)
        if cut:
            log.warning("%d answers in flight ended: %s", len(cut), error.message)
        with self._lock:
            grace = time.monotonic() + self.limits.ended_grace
            while self._leases and (left := grace - time.monotonic()) > 0:
                self._changed.wait(left)
        return True

    @staticmethod
    def _in_vain(transition: Transition) -> bool:
        return transition.load is not None and transition.cancelled.is_set()

    def _ending_for(self, transition: Transition, limit: float) -> ProxyError:
        if self._closing:
            return ShuttingDown("The answer was ended: mlxproxy is stopping.")
        if transition.load is None:
            return ModelUnloaded(
                f"The answer was ended: the model is being unloaded, and {limit:g} s "
                "(DRAIN_TIMEOUT) were not enough for it."
            )
        return ModelSwapped(
            f"The answer was ended: {transition.load.model_id} is being loaded, and {limit:g} s "
            "(DRAIN_TIMEOUT) were not enough for it. Ask again."
        )

    def _stop_backend(self, transition: Transition) -> None:
        backend = self._backend
        if backend is None:
            return
        transition.previous = backend.load.model_id
        self._become("stopping")
        backend.stop()
        self._ownership.stopped()
        with self._lock:
            self._backend = None
            self._leases.clear()  # whoever still writes to a slow client has no backend any more

    def _start_backend(self, transition: Transition, load: Load) -> ProxyError | None:
        """Starts the backend for the load and waits until it has answered."""
        with self._lock:
            if self._in_vain(transition):
                self._enter("empty")
                return self._cancelled(transition)
            transition.phase = "starting"
            self._resume = None
            self._enter("loading")
        started = time.monotonic()
        backend: Backend | None = None
        try:
            backend = self._launch(load, lambda reason: self._ended(reason))
            transition.backend = backend
            command = backend.command()
            self._ownership.starting(command)
            backend.start()
            self._ownership.started(command, backend.pid or 0)
            backend.wait_ready(transition.cancelled, lambda it: self._phase(transition, it))
        except ProxyError as error:
            self._give_back(backend)
            return self._load_failed(transition, load, error)
        transition.took = time.monotonic() - started
        load = transition.load or load  # an equal one may have joined, with a ttl of its own
        self._history.loaded(load, transition.took)
        log.info("%s loaded in %.1f s", load.model_id, transition.took)
        return None

    def _loaded(self, transition: Transition, load: Load) -> None:
        """What has answered is what is loaded. In one step with the transition's end: whoever joins
        it in between would be forgotten."""
        self._backend = transition.backend
        self._loaded_at = time.time()
        self._last_use = time.monotonic()
        self._ttl = load.ttl
        self._failure = None
        self._enter("ready")
        self._emit("loaded", {"id": load.model_id, "seconds": round(transition.took, 2)})

    def _give_back(self, backend: Backend | None) -> None:
        if backend is not None:
            backend.stop()
        self._ownership.stopped()

    def _abandon(self) -> None:
        """After an unforeseen error: no backend is left that we do not know of."""
        backend = self._backend or self._transitions[0].backend
        self._give_back(backend)
        with self._lock:
            self._backend = None
            self._enter("empty")

    def _load_failed(self, transition: Transition, load: Load, error: ProxyError) -> ProxyError:
        if transition.cancelled.is_set():
            error = self._cancelled(transition)
        else:
            log.error("%s was not loaded: %s", load.model_id, error.message)
            self._fail(load, error.message, error.code, error.details.get("log", []), transition)
        self._become("empty")
        return error

    def _cancelled(self, transition: Transition) -> ProxyError:
        if self._closing or transition.why is None:
            return ShuttingDown("mlxproxy is stopping: the load was given up.")
        return transition.why

    def _phase(self, transition: Transition, phase: str) -> None:
        transition.phase = phase
        self._emit("load", transition.progress())

    def _ended(self, reason: str) -> None:
        """The backend's own end, told by the thread that saw it."""
        with self._lock:
            backend = self._backend
            if backend is None or backend.ended is None or backend is self._mourned:
                return  # a load in progress sees it by itself
            self._mourned = backend
            load = backend.load
            reason = without_paths(reason.replace(load.path, load.model_id))
            now = time.monotonic()
            self._deaths = [it for it in self._deaths if now - it < DEATHS_WITHIN] + [now]
            self._down = len(self._deaths) >= DEATHS
            self._resume = None if self._down else load
            sentence = f"The backend with {load.model_id} has ended: {reason}."
            if self._down:
                sentence += (
                    f" That was {DEATHS} times in {DEATHS_WITHIN / 60:g} minutes, so it stays down "
                    "until a load is asked for."
                )
            self._emit("death", {"id": load.model_id, "reason": reason})
            error: ProxyError = (BackendTimeout if backend.hung else BackendFailed)(
                f"The backend has ended in the middle of the answer: {reason}. Ask again."
            )
            for lease in list(self._leases):
                lease.end(error)
            self._changed.notify_all()  # the conductor reaps it
        log.error("%s", sentence)
        self._fail(load, sentence, "backend_failed", backend.last_words())

    def _fail(
        self, load: Load, reason: str, code: str, lines: list[str], during: Transition | None = None
    ) -> None:
        with self._lock:
            self._failure = {
                "model_id": load.path,
                "id": load.model_id,
                "code": code,
                "reason": reason,
                "at": time.time(),
                "previous": during.previous if during else None,
                "log": lines,
            }

    def _fail_waiting(self, load: Load | None, error: ProxyError) -> None:
        for lease in self._waiting_for(load):
            self._queue.remove(lease)
            lease.end(error)

    def _waiting_for(self, load: Load | None) -> list[Lease]:
        return [lease for lease in self._queue if load is not None and self._suits(lease, load)]

    def _become(self, state: str) -> None:
        with self._lock:
            self._enter(state)

    def _enter(self, state: str) -> None:
        if state != self._state:
            self._state, self._state_since = state, time.time()
            self._emit("state", self._describe())

    # -- the end

    def shutdown(self) -> None:
        """Refuses new work, lets answers finish (`shutdown_timeout`), stops the child, returns."""
        with self._lock:
            if not self._closing:
                self._closing = True
                error = ShuttingDown("mlxproxy is stopping. Try again when it has been started.")
                for lease in list(self._queue):
                    lease.end(error)
                self._queue.clear()
                for transition in self._transitions:
                    transition.cancelled.set()
                self._add(Transition(None, "shutdown"))
        self._conductor.join()

    def hurry(self) -> None:
        """Ends the wait for answers in flight: somebody asked twice for the stop."""
        with self._lock:
            self._hurry = True
            self._changed.notify_all()

    # -- what others may know

    def current(self) -> Load | None:
        """What is loaded and answers."""
        backend = self._backend
        return (
            backend.load if backend is not None and self._state in ("ready", "draining") else None
        )

    def has(self, feature: str) -> bool:
        """Return whether the loaded backend has a feature of `engines/mlx_lm/inside/`."""
        backend = self._backend
        return backend is not None and backend.has(feature)

    def untouched(self) -> bool:
        """Whether nobody has asked for a load or unload yet, and nothing is loaded."""
        with self._lock:
            return not (self._asked or self._closing or self._transitions or self._backend)

    def memory(self) -> int:
        """Bytes that an end of the present backend would give back."""
        backend = self._backend
        return (backend.memory() or 0) if backend is not None else 0

    def describe(self) -> dict[str, Any]:
        """The whole state as JSON: what `/health` and `/v1/models/loaded` are made of."""
        with self._lock:
            return self._describe()

    def _describe(self) -> dict[str, Any]:
        backend = self._backend
        transition = self._transitions[0] if self._transitions else None
        shown = backend if self._state in ("ready", "draining") else None
        left = self._idle_left()
        return {
            "state": self._state,
            "state_since": self._state_since,
            "model_id": shown.load.path if shown else None,
            "id": shown.load.model_id if shown else None,
            "enable_thinking": shown.load.enable_thinking if shown else None,
            "options": {**shown.load.options(), "ttl": self._ttl} if shown else None,
            "loaded_at": self._loaded_at if shown else None,
            "pid": backend.pid if backend else None,
            "port": backend.port if backend else None,
            "in_flight": len(self._leases),
            "waiting": len(self._queue),
            "idle_unload_in": None if left is None else round(left, 1),
            "transition": None
            if transition is None
            else {
                "kind": "load" if transition.load else "unload",
                "cause": transition.cause,
                "model_id": transition.load.path if transition.load else None,
                "id": transition.load.model_id if transition.load else None,
                "phase": transition.phase,
                "seconds": round(time.monotonic() - transition.since, 1),
            },
            "last_failure": self._failure,
        }
