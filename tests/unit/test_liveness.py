"""A long silence is told from a hang by the backend's beats."""

from __future__ import annotations

import pytest

from mlxproxy.engines.mlx_lm.liveness import Beat, Liveness

STALL, LOAD = 300.0, 600.0


def beats(
    seconds: int,
    *,
    doing: str | None = "step",
    cpu: float = 0.0,
    steps: float = 0.0,
    faults: float = 0.0,
    gpu: bool = False,
) -> Liveness:
    """The beats of so many seconds, with processor seconds and steps per second."""
    liveness = Liveness(computes_on_cpu=not gpu)
    for second in range(seconds + 1):
        beat = Beat(
            int(second * steps), doing, busy=True, cpu=second * cpu, faults=int(second * faults)
        )
        liveness.take(beat, float(second))
    return liveness


def hang(liveness: Liveness, now: float, waiting_since: float = 0.0) -> str | None:
    return liveness.hang(now, waiting_since, STALL, LOAD)


def test_a_silent_answer_of_an_hour_is_no_hang_while_steps_are_made() -> None:
    assert hang(beats(3600, steps=5, cpu=1), 3600) is None


def test_a_generation_thread_that_stands_still_is_a_hang_within_seconds() -> None:
    for doing in ("step", "tokenize", None):
        assert hang(beats(9, doing=doing), 9) is None
        assert "stalled for 11 s" in str(hang(beats(11, doing=doing), 11))


def test_a_step_that_computes_may_take_until_the_stall_limit() -> None:
    assert hang(beats(299, cpu=1), 299) is None
    assert "STALL_TIMEOUT" in str(hang(beats(302, cpu=1), 302))


def test_a_long_step_on_a_gpu_without_processor_time_is_no_hang() -> None:
    assert hang(beats(299, gpu=True), 299) is None
    assert "STALL_TIMEOUT" in str(hang(beats(302, gpu=True), 302))
    assert "stalled" in str(hang(beats(11, gpu=True, doing="tokenize"), 11))
    assert hang(beats(29, gpu=True, doing=None), 29) is None, "it may wait for the GPU"
    assert "stalled" in str(hang(beats(31, gpu=True, doing=None), 31))


def test_a_process_that_waits_for_pages_from_the_disk_does_not_hang() -> None:
    assert hang(beats(200, faults=3), 200) is None


def test_a_beat_that_is_a_little_late_is_no_hang_however_short_the_stall_limit() -> None:
    liveness = beats(10, steps=5, cpu=1)
    assert liveness.hang(12.5, 0.0, stall_timeout=1, load_timeout=LOAD) is None
    assert "no sign of life" in str(liveness.hang(13.5, 0.0, stall_timeout=1, load_timeout=LOAD))


def test_an_hour_without_requests_is_no_hang() -> None:
    liveness = beats(3)  # the last beat came before the end of the step
    liveness.take(Beat(0, "step", busy=True, cpu=0, faults=0), 3600.0)
    assert hang(liveness, 3601, waiting_since=3599) is None


def test_a_slow_read_of_an_adapter_is_no_hang() -> None:
    assert hang(beats(590, doing="load"), 590) is None
    assert "LOAD_TIMEOUT" in str(hang(beats(602, doing="load"), 602))


def test_a_process_without_heartbeats_is_a_hang() -> None:
    liveness = beats(100, steps=5, cpu=1)
    assert hang(liveness, 119) is None
    assert "no sign of life for 21 s" in str(hang(liveness, 121))
    assert hang(liveness, 121, waiting_since=110) is None, "it may have been idle until then"


def test_nothing_is_expected_of_an_idle_thread() -> None:
    liveness = Liveness(computes_on_cpu=True)
    for second in range(1000):
        liveness.take(Beat(7, None, busy=False, cpu=0, faults=0), float(second))
    assert hang(liveness, 1000) is None
    liveness.take(Beat(7, "step", busy=True, cpu=0, faults=0), 1000.0)
    assert hang(liveness, 1005) is None


@pytest.mark.parametrize("report", [None, {}, {"steps": "x"}, {"steps": 1, "doing": None}])
def test_a_report_that_is_no_heartbeat_is_rejected(report: object) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        Beat.from_json(report)
