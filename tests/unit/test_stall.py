"""How long a silence is borne, and what is given up after it."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxproxy.backend.connection import BrokenConnection, ReadTimeout
from mlxproxy.backend.process import Backend
from mlxproxy.backend.protocol import Address
from mlxproxy.engines.mlx_lm.engine import MlxLm
from mlxproxy.errors import BackendTimeout, ModelSwapped
from mlxproxy.relay.stall import INTERVAL_SECONDS, SILENT_FACTOR, Patience, Silence, Verdict, judge
from tests.support.fake_backend import World, model_spec
from tests.support.fake_connection import FakeConnection, Scene
from tests.support.waiting import until

LIMIT = 10.0
GRANTED = 1000.0
STREAM = Silence(
    granted=GRANTED,
    last_byte_at=0.0,
    backend_last_byte_at=0.0,
    alive=False,
    unstreamed=False,
    exclusive=False,
)
ONE_PIECE = dataclasses.replace(STREAM, unstreamed=True)
ALIVE = dataclasses.replace(STREAM, alive=True)


def verdicts(silence: Silence, **changes: Any) -> list[tuple[float, Verdict]]:
    """Each verdict of a silence that begins when the place is granted, with its first second."""
    found: list[tuple[float, Verdict]] = []
    for second in range(int(LIMIT * (SILENT_FACTOR + 2))):
        now = GRANTED + second
        at = {name: now - ago for name, ago in changes.items()}
        verdict = judge(dataclasses.replace(silence, **at), now, LIMIT)
        if not found or found[-1][1] is not verdict:
            found.append((second, verdict))
    return found


def test_a_stream_of_a_silent_backend_hangs_with_it_after_the_timeout() -> None:
    assert verdicts(STREAM) == [(0, Verdict.WAIT), (10, Verdict.HUNG)]


def test_a_stream_that_is_silent_alone_ends_alone() -> None:
    assert verdicts(STREAM, backend_last_byte_at=1) == [(0, Verdict.WAIT), (10, Verdict.ABANDON)]


def test_bytes_of_the_answer_itself_put_its_end_off() -> None:
    assert verdicts(STREAM, last_byte_at=9) == [(0, Verdict.WAIT)]


def test_the_bytes_of_others_before_its_time_count_for_nothing() -> None:
    """A backend that was idle for an hour has not been silent towards a request that came now."""
    asleep = dataclasses.replace(STREAM, backend_last_byte_at=GRANTED - 3600)
    assert verdicts(asleep) == verdicts(STREAM)


def test_an_answer_in_one_piece_is_waited_for_while_the_backend_answers_anybody() -> None:
    limit = LIMIT * SILENT_FACTOR
    assert verdicts(ONE_PIECE) == [(0, Verdict.WAIT), (10, Verdict.PROBE)]
    fed = verdicts(ONE_PIECE, backend_last_byte_at=1)
    assert fed == [(0, Verdict.WAIT), (limit, Verdict.ABANDON)]


def test_an_answer_that_has_the_backend_to_itself_is_not_probed() -> None:
    """The probe would wait for it to end."""
    alone = dataclasses.replace(ONE_PIECE, exclusive=True)
    assert verdicts(alone) == [(0, Verdict.WAIT), (10, Verdict.HUNG)]


def test_a_backend_that_says_it_is_alive_is_believed_for_a_long_time() -> None:
    limit = LIMIT * SILENT_FACTOR
    assert verdicts(ALIVE) == [(0, Verdict.WAIT), (limit, Verdict.ABANDON)]


# -- applied


def patience(scene: Scene, stall_timeout: float, unstreamed: bool = False) -> Patience:
    return Patience(scene.lease, scene.backend, stall_timeout, unstreamed)


@pytest.fixture
def scene() -> Scene:
    return Scene(FakeConnection()).grant()


def test_a_silence_is_looked_at_often_enough(scene: Scene) -> None:
    assert patience(scene, 300).interval == INTERVAL_SECONDS
    assert patience(scene, 2).interval == 0.5


def test_the_reason_why_a_lease_was_ended_comes_before_any_silence(scene: Scene) -> None:
    scene.end(ModelSwapped("swapped"))
    with pytest.raises(ModelSwapped):
        patience(scene, 300).check()


def test_a_hang_that_the_backend_reports_counts_at_once(scene: Scene) -> None:
    scene.backend.features = {"heartbeat"}
    patience(scene, 300).check()
    scene.backend.hangs = "its generation thread has been stalled for 10 s"
    with pytest.raises(BackendTimeout, match="considered dead: its generation thread"):
        patience(scene, 300).check()
    assert scene.backend.hung


def test_an_answer_that_ends_alone_leaves_the_backend_alone(scene: Scene) -> None:
    scene.lease.granted -= 5
    scene.backend.last_byte_at = time.monotonic()
    with pytest.raises(BackendTimeout, match="answers others"):
        patience(scene, 1).check()
    assert not scene.backend.hung


def test_an_answer_in_one_piece_goes_on_while_a_probe_is_answered(scene: Scene) -> None:
    scene.lease.granted -= 5
    scene.backend.last_byte_at -= 5
    patience(scene, 1, unstreamed=True).check()
    scene.backend.deaf = True
    with pytest.raises(BackendTimeout, match="STALL_TIMEOUT"):
        patience(scene, 1, unstreamed=True).check()
    assert scene.backend.hung


def test_a_hang_ends_every_answer_and_the_process(tmp_path: Path) -> None:
    world = World(tmp_path)
    try:
        world.load("a")
        lease, other = world.lease(), world.lease()
        backend = world.running[0]
        with pytest.raises(BackendTimeout):
            Patience(lease, backend, -1.0, False).check()
        assert isinstance(other.error, BackendTimeout)
        lease.release()
        other.release()
        until(lambda: backend not in world.running, what="the stop")
    finally:
        world.close()


# -- the probe


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Backend, list[Any]]]:
    """A backend whose answers to probes are given, and what it was asked."""

    def make(answer: Callable[[], int]) -> tuple[Backend, list[Any]]:
        nothing: Any = None
        address = Address("127.0.0.1", 1)
        engine = MlxLm(None, max_tokens=1, cache_bytes=lambda needed: 1)
        backend = Backend(model_spec("a"), engine, address, nothing, lambda reason: None)
        backend.last_byte_at = 0.0
        asked: list[Any] = []

        def exchange(*arguments: Any) -> tuple[int, bytes]:
            asked.append(arguments)
            return answer(), b'{"choices": [{"message": {"role": "assistant"}}]}'

        monkeypatch.setattr(backend, "_exchange", exchange)
        return backend, asked

    return make


def test_a_probe_that_is_answered_is_a_sign_of_life(probed: Any) -> None:
    backend, _ = probed(lambda: 200)
    assert backend.answers_probe(1)
    assert backend.last_byte_at > 0


@pytest.mark.parametrize("status", [404, ReadTimeout(), BrokenConnection("is gone")])
def test_a_probe_that_fails_is_none(probed: Any, status: Any) -> None:
    def answer() -> int:
        if isinstance(status, Exception):
            raise status
        return int(status)

    backend, asked = probed(answer)
    for count in (1, 2):
        assert not backend.answers_probe(1)
        assert len(asked) == count
    assert backend.last_byte_at == 0.0


def test_one_probe_is_under_way_at_a_time(probed: Any) -> None:
    """Others that ask meanwhile do not wait for it: they look again after their next silence."""
    began, may_answer = threading.Event(), threading.Event()

    def answer() -> int:
        began.set()
        assert may_answer.wait(10)
        return 200

    backend, asked = probed(answer)
    prober = threading.Thread(target=backend.answers_probe, args=(1,))
    prober.start()
    assert began.wait(10)
    assert backend.answers_probe(1)
    assert backend.last_byte_at == 0.0
    assert len(asked) == 1
    may_answer.set()
    prober.join(10)
    assert backend.last_byte_at > 0
