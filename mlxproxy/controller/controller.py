"""The lock around the core: takes an event, asks the core, releases the lock, performs the effects.

Nothing is logged, sent or waited for under the lock. Slow work (starting a backend until it
answers, stopping it) is done by one worker thread per slot, which reports back with an event; one
more thread, the timer, brings the events of deadlines. Two threads may perform the effects of two
events out of order: the core's state is the truth, and effects that must stay in order (the jobs of
a slot; the messages to subscribers and the log) go through a queue.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue

from mlxproxy.backend.orphan import ChildRecord
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.controller.history import History
from mlxproxy.controller.lease import Claim, Lease
from mlxproxy.controller.plan import Scheduler
from mlxproxy.controller.state import (
    Abort,
    Cancel,
    Closed,
    Effect,
    Emit,
    Event,
    Fallback,
    Finish,
    Forget,
    Grant,
    Limits,
    Log,
    Moment,
    Operation,
    Phase,
    Process,
    Progress,
    Reject,
    Remember,
    Snapshot,
    Start,
    Stop,
)
from mlxproxy.disconnect import Disconnect
from mlxproxy.errors import InternalError, ProxyError, TooManyRequests
from mlxproxy.text import without_paths

log = logging.getLogger("mlxproxy.controller")

# What a shutdown may take beyond its drain and two stops: Python's start of a process, a kill.
SHUTDOWN_MARGIN_SECONDS = 30.0
WATCH_SECONDS = 2.0  # between two checks of the memory, which cost a few system calls

Launch = Callable[[int, ModelSpec, Callable[[str], None]], Process]
Subscriber = Callable[[Event], None]
Available = Callable[[int], int]
Measured = tuple[int, Mapping[int, int]]


class Controller:
    """Loads, unloads, and leases of the backends.

    Args:
        limits: the timeouts and counts.
        launch: makes the (not yet started) backend for a slot and a load; its last argument is
            called when the backend exits.
        records: one for each slot, which records its child in case the proxy is killed.
        history: remembers what was loaded and how long it took.
        emit: called with every change, for events and metrics; must not block.
        available: returns the bytes that all models together may use, given the bytes that the
            loaded ones hold; None: there is no bound.
        shortage: returns why memory is running out; None while it is not.
    """

    def __init__(
        self,
        limits: Limits,
        launch: Launch,
        records: Sequence[ChildRecord],
        history: History,
        emit: Subscriber = lambda event: None,
        available: Available | None = None,
        shortage: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.limits = limits
        self._launch = launch
        self._records = records
        self._history = history
        self._emit = emit
        self._available = available
        self._shortage = shortage

        self._lock = threading.Lock()
        self._sooner = threading.Condition(self._lock)  # a new earliest deadline
        self._core = Scheduler(limits, len(records), unix=time.time())
        self._cancels: dict[int, threading.Event] = {}  # by slot, of the start in progress
        self._timer_wakes: float | None = None
        self._outbox: deque[Emit | Log] = deque()
        self._telling = threading.Lock()
        self._closed = threading.Event()
        self._jobs: list[SimpleQueue[Callable[[], None] | None]] = [
            SimpleQueue() for _ in self._core.slots
        ]
        self.threads = [
            threading.Thread(target=self._work, args=(jobs,), name=f"slot-{number}", daemon=True)
            for number, jobs in enumerate(self._jobs)
        ]
        for target, name in ((self._time, "timer"), (self._watch_memory, "memory")):
            self.threads.append(threading.Thread(target=target, name=name, daemon=True))
        for thread in self.threads:
            thread.start()

    # -- loads and unloads

    def load(self, spec: ModelSpec, claim: Claim | None = None) -> Claim:
        """Ask for a load, or join an equal one; the claim's `wait` returns when the load has ended.

        Raises:
            ShuttingDown: the proxy is shutting down.
            TooManyRequests: the client waits for too many loads, or too many clients wait.
            InsufficientMemory: the model cannot fit, and the load is not forced.
        """
        claim = claim or Claim()
        measured = self._measure()
        self._decide(lambda core, now: core.on_load(claim, spec, now), measured)
        return claim

    def unload(self, claim: Claim | None = None, path: str | None = None) -> Claim:
        """Ask for the unload of a model; cancel earlier loads of it.

        Args:
            path: the model's; None: the model that answers requests without a model name.

        Raises:
            ShuttingDown: the proxy is shutting down.
            TooManyRequests: too many clients wait for an unload.
        """
        claim = claim or Claim()
        self._decide(lambda core, now: core.on_unload(claim, now, path))
        return claim

    def leave(self, claim: Claim) -> None:
        """Drop a claim whose client has left; may be called repeatedly, from any thread."""
        self._decide(lambda core, now: core.on_leave(claim, now))

    def progress(self, claim: Claim) -> Progress:
        """Return the progress of a claim's load."""
        assert claim.operation is not None
        return self._progress(claim.operation)

    def loads(self) -> list[Progress]:
        """Return the progress of every load that is queued or under way."""
        with self._lock:
            operations = [each for each in self._core.operations if each.spec is not None]
        return [self._progress(each) for each in operations]

    # -- leases

    def lease(
        self,
        client: str,
        disconnect: Disconnect,
        target: Callable[[], ModelSpec | None] = lambda: None,
        exclusive: bool = False,
        fallback: Callable[[], Fallback] = Fallback,
    ) -> Lease:
        """Return a lease for one request; it is granted immediately if model and place are there.

        Args:
            client: whose request it is, for fair sharing.
            disconnect: the client's; when the client disconnects, the place is given up.
            target: finds the load for the model that the request names (None: whatever is
                loaded). Called without the lock, and only if it matters.
            exclusive: whether the request must have the backend to itself.
            fallback: finds what to load for a request that names no model while nothing is
                loaded. Called without the lock, and only then.

        Raises:
            ShuttingDown, TooManyRequests.
        """
        lease = Lease(self, None, client, disconnect, exclusive)
        resolved = False
        measured: Measured | None = None

        def enqueue(core: Scheduler, now: Moment) -> list[Effect] | None:
            if not resolved and not core.closing and core.needs_target():
                return None
            return core.on_request(lease, now)

        while not self._decide(enqueue, measured):
            lease.target, resolved = target(), True
            residents = self.residents()
            if lease.target is None and not residents:
                lease.fallback, lease.advice = fallback()
            if not residents or lease.target not in (None, *residents):
                measured = self._measure()  # this may lead to a load
        if isinstance(lease.error, TooManyRequests):
            raise lease.error
        disconnect.on_leave(lambda: self._left(lease))
        return lease

    def release(self, lease: Lease) -> None:
        """Give a lease's place back: see Lease.release."""
        self._decide(lambda core, now: core.on_released(lease, now))

    def abort(self, lease: Lease, error: ProxyError) -> None:
        """End a request with this error, whether it is answered or still waits."""
        self._decide(lambda core, now: core.on_aborted(lease, error, now))

    def waiting_for(self, lease: Lease) -> str:
        """Return what a lease waits for: see Lease.waiting_for."""
        seconds = int(time.monotonic() - lease.since)
        with self._lock:
            current = self._core.awaited(lease)
            place = self._core.position(lease)
        if current is not None and current.spec is not None:
            what = f"{'draining for' if current.phase is Phase.DRAINING else 'loading'} "
            what += current.spec.model_id
        else:
            what = f"waiting for a place, number {place} in the queue"
        return f"{what} {seconds}s"

    def _left(self, lease: Lease) -> None:
        self._decide(lambda core, now: core.on_disconnected(lease, now))

    # -- the end

    def shutdown(self) -> None:
        """Reject new work, let answers finish (`shutdown_timeout`), stop the processes, return.

        This returns in bounded time, even if the system cannot end a process.
        """
        self._decide(lambda core, now: core.on_shutdown(now))
        limits = self.limits
        bound = (
            limits.shutdown_timeout
            + limits.ended_grace
            + 2 * limits.stop_timeout
            + SHUTDOWN_MARGIN_SECONDS
        )
        if not self._closed.wait(bound):
            pids = ", ".join(str(process.pid) for process in self._processes().values())
            log.error("stopped without the end of the backend (pid %s)", pids or "unknown")
            return
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(SHUTDOWN_MARGIN_SECONDS)

    def force_stop(self) -> None:
        """End the wait for answers in flight, because the stop was requested twice."""
        self._decide(lambda core, now: core.on_force_stop(now))

    # -- queries

    def current(self) -> ModelSpec | None:
        """Return the main slot's model, if it answers; without the lock: every request asks."""
        slot = self._core.main_slot()
        return slot.spec if slot.answers else None

    def residents(self) -> tuple[ModelSpec, ...]:
        """Return all models that answer; without the lock, because every request asks."""
        return tuple(slot.spec for slot in self._core.slots if slot.answers and slot.spec)

    def has(self, feature: str) -> bool:
        """Return whether every backend that answers has a feature enabled."""
        answering = [slot.process for slot in self._core.slots if slot.answers and slot.process]
        return bool(answering) and all(process.has(feature) for process in answering)

    def process_of(self, spec: ModelSpec) -> Process | None:
        """Return the backend that answers for a model; None if it is not loaded."""
        for slot in self._core.slots:
            if slot.answers and slot.spec is not None and slot.spec.path == spec.path:
                return slot.process
        return None

    def never_asked(self) -> bool:
        """Return whether nobody has asked for a load or unload yet, and nothing is loaded."""
        with self._lock:
            return self._core.is_untouched()

    def memory(self) -> dict[int, int]:
        """Return the bytes that each slot's process holds, and that its exit would free."""
        return {slot: backend.memory() or 0 for slot, backend in self._processes().items()}

    def describe(self) -> Snapshot:
        """Return the whole state."""
        with self._lock:
            return self._core.snapshot(_moment())

    def budget(self) -> int:
        """Return the bytes for all models together."""
        measured = self._measure()
        return sys.maxsize if measured is None else measured[0]

    def _measure(self) -> Measured | None:
        """Return the bytes for all models together, and those that each slot's process holds; None
        if there is no bound."""
        if self._available is None:
            return None
        held = self.memory()
        return self._available(sum(held.values())), held

    # -- events in, effects out

    def _decide(
        self,
        event: Callable[[Scheduler, Moment], list[Effect] | None],
        measured: Measured | None = None,
    ) -> bool:
        """Let the core decide about an event, and act; return False if the event was postponed.

        Raises:
            ProxyError: the core rejects the event.
        """
        effects: list[Effect] = []
        try:
            with self._lock:
                now = _moment()
                if measured is not None:
                    self._core.on_memory(*measured)
                try:
                    effects += self._exits(now)
                    decided = event(self._core, now)
                    effects += decided or ()
                finally:
                    self._note(effects)
        finally:
            self._perform(effects)
        return decided is not None

    def _note(self, effects: list[Effect]) -> None:
        """Do what must be atomic with the decision: a few assignments, no more."""
        for effect in effects:
            if isinstance(effect, Grant):
                _lease(effect).backend = effect.process
            elif isinstance(effect, Start):
                self._cancels[effect.slot] = threading.Event()
            elif isinstance(effect, Cancel):
                self._cancels[effect.slot].set()
            elif isinstance(effect, (Emit, Log)):
                self._outbox.append(effect)
        deadline = self._core.next_deadline()
        if deadline is not None and (self._timer_wakes is None or deadline < self._timer_wakes):
            self._timer_wakes = deadline
            self._sooner.notify()

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Grant):
                _lease(effect).grant()
            elif isinstance(effect, (Reject, Abort)):
                _lease(effect).end()
            elif isinstance(effect, Finish):
                assert isinstance(effect.claim, Claim)
                effect.claim.end(effect.error)
            elif isinstance(effect, Start):
                self._queue_start(effect)
            elif isinstance(effect, Stop):
                self._queue_stop(effect)
            elif isinstance(effect, Remember):
                self._history.loaded(effect.spec, effect.seconds)
            elif isinstance(effect, Forget):
                self._history.unloaded(effect.path)
            elif isinstance(effect, Closed):
                self._close()
        self._tell()

    def _tell(self) -> None:
        """Deliver the outbox to the subscribers and the log, in order. A thread that arrives while
        another one delivers leaves it to that one."""
        while self._outbox and self._telling.acquire(blocking=False):
            try:
                while self._outbox:
                    self._tell_one(self._outbox.popleft())
            finally:
                self._telling.release()

    def _tell_one(self, effect: Emit | Log) -> None:
        if isinstance(effect, Log):
            log.log(effect.level, "%s", effect.line)
            return
        try:
            self._emit(effect.event)
        except Exception:
            log.exception("a subscriber has failed")

    def _publish(self, event: Event) -> None:
        self._outbox.append(Emit(event))
        self._tell()

    # -- exits of processes

    def notice_exits(self) -> None:
        """Report the processes that have exited to the core, whichever thread noticed."""
        self._decide(lambda core, now: [])

    def _exits(self, now: Moment) -> list[Effect]:
        effects: list[Effect] = []
        for slot in self._core.slots:
            backend = slot.process
            if backend is None or backend.ended is None or slot.exited or not slot.answers:
                continue
            reason = without_paths(backend.ended.replace(backend.spec.path, backend.spec.model_id))
            effects += self._core.on_exited(
                slot.id, reason, now, backend.hung, backend.last_words()
            )
        return effects

    # -- the workers

    def _work(self, jobs: SimpleQueue[Callable[[], None] | None]) -> None:
        while (job := jobs.get()) is not None:
            try:
                job()
            except Exception:
                log.exception("a job failed unexpectedly")

    def _queue_start(self, effect: Start) -> None:
        cancelled = self._cancels[effect.slot]
        self._jobs[effect.slot].put(lambda: self._start(effect.slot, effect.spec, cancelled))

    def _queue_stop(self, effect: Stop) -> None:
        self._jobs[effect.slot].put(lambda: self._stop(effect.slot, effect.process))

    def _start(self, slot: int, spec: ModelSpec, cancelled: threading.Event) -> None:
        """Start a backend and wait until it has answered; report the outcome to the core."""
        began = time.monotonic()
        backend: Process | None = None
        error: ProxyError | None = None
        try:
            backend = launched = self._launch(slot, spec, lambda reason: self.notice_exits())
            self._decide(lambda core, now: core.on_launched(slot, launched))
            command = backend.command()
            self._records[slot].starting(command)
            backend.start()
            self._records[slot].started(command, backend.pid or 0)
            backend.wait_ready(cancelled, lambda phase: self._on_phase(slot, Phase(phase)))
            seconds = time.monotonic() - began
            self._decide(lambda core, now: core.on_started(slot, launched, seconds, now))
            self.notice_exits()  # it may have exited since its first answer
            return
        except ProxyError as failure:
            error = failure
        except Exception:
            log.exception("a start failed unexpectedly")
            error = InternalError("The load failed for an internal reason; see the log.")
        failed = error
        self._end_process(slot, backend)
        self._decide(lambda core, now: core.on_failed(slot, failed, now))

    def _on_phase(self, slot: int, phase: Phase) -> None:
        operation = self._core.slots[slot].operation
        self._decide(lambda core, now: core.on_phase(slot, phase))
        if operation is not None:
            self._publish(self._progress(operation))

    def _stop(self, slot: int, process: Process) -> None:
        self._end_process(slot, process)
        self._decide(lambda core, now: core.on_stopped(slot, now))

    def _end_process(self, slot: int, backend: Process | None) -> None:
        try:
            if backend is not None:
                backend.stop()
            self._records[slot].stopped()
        except Exception:
            log.exception("a stop failed unexpectedly")

    def _progress(self, operation: Operation) -> Progress:
        slot = None if operation.slot is None else self._core.slots[operation.slot]
        backend = slot.process if slot is not None and slot.operation is operation else None
        spec = operation.spec
        starting = operation.phase in (Phase.STARTING, Phase.LOADING, Phase.WARMING)
        read = backend.bytes_read() if backend is not None and starting else None
        total = spec.model.size_bytes if spec else None
        return Progress(
            operation.slot,
            spec,
            operation.phase,
            time.monotonic() - operation.since,
            min(read, total) if read is not None and total else None,
            total,
            self._history.seconds(spec) if spec else None,
        )

    def _processes(self) -> dict[int, Process]:
        """Return the process of each slot that has one."""
        found = [(slot.id, slot.process) for slot in self._core.slots]
        return {slot: process for slot, process in found if process is not None}

    # -- the timer

    def _time(self) -> None:
        while True:
            with self._lock:
                if self._closed.is_set():
                    return
                self._timer_wakes = self._core.next_deadline()
                wait = None if self._timer_wakes is None else self._timer_wakes - time.monotonic()
                if wait is None or wait > 0:
                    self._sooner.wait(wait)
                    continue
            try:
                self._decide(lambda core, now: core.on_tick(now))
            except Exception:
                log.exception("a deadline failed unexpectedly")
                time.sleep(1.0)  # the deadline is still due: do not spin

    def _watch_memory(self) -> None:
        while not self._closed.wait(WATCH_SECONDS):
            if not self._processes():
                continue
            try:
                why = self._shortage()
                self._decide(lambda core, now, why=why: core.on_pressure(why, now), self._measure())  # type: ignore[misc]
            except Exception:
                log.exception("a look at the memory failed unexpectedly")

    def _close(self) -> None:
        self._closed.set()
        for jobs in self._jobs:
            jobs.put(None)
        with self._lock:
            self._sooner.notify_all()


def _moment() -> Moment:
    return Moment(time.monotonic(), time.time())


def _lease(effect: Grant | Reject | Abort) -> Lease:
    assert isinstance(effect.request, Lease)
    return effect.request
