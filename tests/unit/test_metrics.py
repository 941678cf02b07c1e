"""What is counted."""

from __future__ import annotations

from dataclasses import replace

from mlxproxy.controller.plan import Scheduler
from mlxproxy.controller.state import Limits, Moment, SlotState
from mlxproxy.observability.metrics import Metrics
from mlxproxy.relay.statistics import AnswerStats
from tests.support.fake_backend import model_spec


def told(metrics: Metrics, *states: str) -> int:
    """The swaps counted after these states: of the first slot, and after a / of the second."""
    for state in states:
        pair = state.partition("/")
        snapshot = Scheduler(Limits(), slots=2).snapshot(Moment(0.0, 0.0))
        slots = [
            replace(slot, state=SlotState(now or "empty"), spec=model_spec(name))
            for slot, now, name in zip(snapshot.slots, (pair[0], pair[2]), "ab", strict=True)
        ]
        metrics.event(replace(snapshot, slots=tuple(slots)))
    swaps = metrics.counts().swaps
    return sum(sum(swaps[name].counts) for name in list(swaps))


def test_only_one_model_replacing_another_is_a_swap() -> None:
    metrics = Metrics()
    assert told(metrics, "loading", "ready") == 0
    assert told(metrics, "stopping", "empty", "loading", "ready") == 0
    assert told(metrics, "draining", "ready") == 0
    assert told(metrics, "stopping", "loading", "empty", "loading", "ready") == 0
    assert told(metrics, "draining", "stopping", "loading", "ready", "ready") == 1
    assert told(metrics, "stopping", "loading", "ready") == 2


def test_a_swap_is_counted_for_its_slot_whatever_another_slot_does() -> None:
    metrics = Metrics()
    assert told(metrics, "ready/ready", "stopping/ready", "empty/ready", "loading/ready") == 0
    assert told(metrics, "ready/ready", "ready/draining", "ready/stopping", "ready/loading") == 0
    assert told(metrics, "draining/loading", "ready/ready") == 1
    swaps = metrics.counts().swaps
    assert {name: sum(each.counts) for name, each in swaps.items()} == {"b": 1}


def test_the_tokens_of_a_failed_answer_are_counted() -> None:
    metrics = Metrics()
    metrics.request(
        "/v1/chat/completions", 502, AnswerStats(model="a", outcome="backend_failed", tokens_out=3)
    )
    counts = metrics.counts()
    assert counts.requests["/v1/chat/completions", 502] == 1
    assert counts.tokens_out == {"a": 3}
    assert not counts.first_token
