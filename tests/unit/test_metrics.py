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


def test_an_answer_that_failed_counts_as_far_as_it_came() -> None:
    metrics = Metrics()
    metrics.request(
        "/v1/chat/completions", 502, AnswerStats(outcome="backend_failed", tokens_out=3)
    )
    counts = metrics.counts()
    assert counts.requests["/v1/chat/completions", 502] == 1
    assert counts.tokens_out == 3
    assert sum(counts.first_token.counts) == 0


def test_cached_tokens_are_counted_beside_all_of_the_prompt() -> None:
    metrics, stats = Metrics(), AnswerStats()
    for details in ({"cached_tokens": 30}, {"cached_tokens": 0}, {"cached_tokens": "many"}, None):
        stats.usage({"prompt_tokens": 34, "prompt_tokens_details": details})
        assert stats.figures()["tokens_in"] == 34
        assert stats.figures()["cached_tokens"] == (30 if details == {"cached_tokens": 30} else 0)
        metrics.request("/v1/chat/completions", 200, stats)
    counts = metrics.counts()
    assert (counts.tokens_in, counts.cached_tokens) == (4 * 34, 30)
