"""What is counted."""

from __future__ import annotations

from dataclasses import replace

from mlxproxy.controller.plan import Scheduler
from mlxproxy.controller.state import Limits, Moment, SlotState
from mlxproxy.observability.metrics import Metrics
from mlxproxy.relay.statistics import AnswerStats


def told(metrics: Metrics, *states: str) -> int:
    """The swaps counted after these states."""
    for state in states:
        snapshot = Scheduler(Limits()).snapshot(Moment(0.0, 0.0))
        metrics.event(replace(snapshot, main=replace(snapshot.main, state=SlotState(state))))
    return sum(metrics.counts().swaps.counts)


def test_only_one_model_replacing_another_is_a_swap() -> None:
    metrics = Metrics()
    assert told(metrics, "loading", "ready") == 0
    assert told(metrics, "stopping", "empty", "loading", "ready") == 0
    assert told(metrics, "draining", "ready") == 0
    assert told(metrics, "stopping", "loading", "empty", "loading", "ready") == 0
    assert told(metrics, "draining", "stopping", "loading", "ready", "ready") == 1
    assert told(metrics, "stopping", "loading", "ready") == 2


def test_the_tokens_of_a_failed_answer_are_counted() -> None:
    metrics = Metrics()
    metrics.request(
        "/v1/chat/completions", 502, AnswerStats(outcome="backend_failed", tokens_out=3)
    )
    counts = metrics.counts()
    assert counts.requests["/v1/chat/completions", 502] == 1
    assert counts.tokens_out == 3
    assert sum(counts.first_token.counts) == 0
