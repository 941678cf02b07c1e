"""The load generator: many streams in one loop, with as little work as possible while they run.

It only records which bytes arrived when; they are examined after the run.
"""

from __future__ import annotations

import gc
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import wire
from benchmarks.figures import percentile
from benchmarks.processes import cpu_seconds, resident_bytes

RECV_BYTES = 1 << 16
DEADLINE = 30.0  # seconds beyond the streams' own length


@dataclass(frozen=True)
class Work:
    """Streams that start at the same time.

    Attributes:
        interval: milliseconds between two events of one stream.
        together: whether all streams have their events at the same moment, as from a batch that is
            generated step by step; otherwise they are spread evenly over the interval.
        settle: seconds from the start that count towards neither latency nor processor time.
        model: the model that the requests name.
    """

    streams: int
    events: int
    interval: float
    together: bool = False
    settle: float = 0.5
    model: str = "bench"

    @property
    def seconds(self) -> float:
        return self.events * self.interval / 1000


@dataclass(frozen=True)
class Outcome:
    """The result of a workload.

    Attributes:
        p50, p99: microseconds from the backend's sending of an event to its arrival (with
            `together`, from the moment at which all were due).
        cpu_per_event: microseconds of the contestant's processor time.
        resident: megabytes of the contestant's memory, with all streams open.
        broken: streams with an event lost, duplicated or out of order, or without a proper end.
    """

    p50: float
    p99: float
    cpu_per_event: float
    resident: float
    broken: int


@dataclass(frozen=True)
class FirstBytes:
    """The time from a request to the first byte of its answer, over requests that start together.

    Attributes:
        p50, last: milliseconds.
    """

    p50: float
    last: float


def run(port: int, pids: Sequence[int], work: Work) -> Outcome:
    """Run the streams against 127.0.0.1:`port`.

    Args:
        pids: the contestant's processes, whose processor time and memory are measured.
    """
    # The window in which the load is steady: all streams have begun, none has ended.
    meter = _Meter(pids, work.settle, work.seconds - 0.1)
    _, pieces = _streams(port, work, meter)
    answers = [wire.answer(kept) for kept in pieces]
    events = [event for answer in answers for event in answer.events]
    latencies = [event.latency / 1e3 for event in events if meter.covers(event.received)]
    return Outcome(
        p50=percentile(latencies, 50),
        p99=percentile(latencies, 99),
        cpu_per_event=meter.cpu_seconds / len(latencies) * 1e6 if latencies else float("nan"),
        resident=meter.resident / (1 << 20),
        broken=sum(
            not answer.is_whole(number, work.events) for number, answer in enumerate(answers)
        ),
    )


def first_bytes(port: int, streams: int) -> FirstBytes:
    """Return the time to the first byte of this many streams that start at the same time."""
    work = Work(streams=streams, events=4, interval=50.0)
    started, pieces = _streams(port, work, _Meter((), 0.0, 0.0))
    took = [
        (kept[0][0] - start) / 1e6 if kept else float("inf")
        for start, kept in zip(started, pieces, strict=True)
    ]
    return FirstBytes(p50=percentile(took, 50), last=max(took))


def whole_answers(port: int, count: int, tokens: int, interval: float) -> float:
    """Return the milliseconds to the last byte of a whole answer, the median of `count` in a row.

    Args:
        tokens: the length of each answer.
        interval: milliseconds that the backend takes for each token, from the request on.

    Raises:
        RuntimeError: an answer was missing or incomplete.
    """
    return whole_answers_in_turns((port,), count, tokens, interval)[0]


def whole_answers_in_turns(
    ports: Sequence[int], count: int, tokens: int, interval: float, model: str = "bench"
) -> list[float]:
    """Return the same for each port, where each request goes to the next port."""
    wish = {"events": tokens, "interval": interval, "from_now": True}
    took: dict[int, list[float]] = {port: [] for port in ports}
    for number in range(count):
        first = number % len(ports)
        for port in (*ports[first:], *ports[:first]):
            request = wire.request(port, wish, stream=False, model=model)
            start = time.monotonic_ns()
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(request)
                raw = b""
                while not wire.is_answered(raw):
                    if not (data := connection.recv(RECV_BYTES)):
                        raise RuntimeError(f"no whole answer: {raw[:300]!r}")
                    raw += data
                took[port].append((time.monotonic_ns() - start) / 1e6)
    return [percentile(some, 50) for some in took.values()]


def streams(port: int, work: Work) -> list[list[wire.Piece]]:
    """Return the pieces of each stream, with the times of their arrival."""
    return _streams(port, work, _Meter((), 0.0, 0.0))[1]


class _Meter:
    """The processor time and memory of some processes, between two moments of a run."""

    def __init__(self, pids: Sequence[int], opens: float, closes: float) -> None:
        self._pids = pids
        now = time.monotonic_ns()
        self._due = [now + int(opens * 1e9), now + int(closes * 1e9)]
        self._moments: list[int] = []
        self._cpu: list[float] = []
        self.resident = 0

    def look(self) -> None:
        """Record what is due by now."""
        if len(self._cpu) < 2 and time.monotonic_ns() >= self._due[len(self._cpu)]:
            self._cpu.append(cpu_seconds(self._pids))
            self._moments.append(time.monotonic_ns())
            self.resident = resident_bytes(self._pids)

    @property
    def cpu_seconds(self) -> float:
        return self._cpu[1] - self._cpu[0] if len(self._cpu) == 2 else float("nan")

    def covers(self, moment: int) -> bool:
        return len(self._moments) == 2 and self._moments[0] <= moment < self._moments[1]


def _streams(port: int, work: Work, meter: _Meter) -> tuple[list[int], list[list[wire.Piece]]]:
    """Run the streams; return when each was requested, and its pieces with their times."""
    selector = selectors.DefaultSelector()
    pieces: list[list[wire.Piece]] = [[] for _ in range(work.streams)]
    started = []
    clock = time.monotonic_ns
    gc.disable()  # its pauses would count as latency
    for number in range(work.streams):
        wish = {
            "stream": number,
            "events": work.events,
            "interval": work.interval,
            "phase": 0.0 if work.together else work.interval * number / work.streams,
            "together": work.together,
        }
        request = wire.request(port, wish, stream=True, model=work.model)
        started.append(clock())
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(request)
        selector.register(connection, selectors.EVENT_READ, (connection, pieces[number]))
    left = work.streams
    deadline = started[0] + int((work.seconds + DEADLINE) * 1e9)
    while left and clock() < deadline:
        for key, _ in selector.select(0.1):
            connection, kept = key.data
            try:
                data = connection.recv(RECV_BYTES)
            except OSError:
                data = b""
            if data:
                kept.append((clock(), data))
            else:
                left -= 1
                selector.unregister(connection)
                connection.close()
        meter.look()
    gc.enable()
    for key in list(selector.get_map().values()):
        key.data[0].close()
    selector.close()
    return started, pieces
