"""The curves of the last minutes."""

from __future__ import annotations

from typing import Any

import pytest

from mlxproxy.observability.curves import MODELS, SECONDS, Curves
from mlxproxy.observability.metrics import Metrics
from mlxproxy.relay.statistics import AnswerStats

NOW = 10_000.0


def answer(
    first: float, ended: float, tokens: int, model: str = "a", waited: float = 0.5
) -> AnswerStats:
    """An answer; its times are seconds from NOW."""
    begin = NOW + first
    return AnswerStats(
        started=begin - waited,
        granted=begin - waited,
        first_byte=begin,
        prompt_read=begin,
        ended=NOW + ended,
        model=model,
        tokens_out=tokens,
    )


def shown(*ended: AnswerStats) -> dict[str, Any]:
    curves = Curves()
    for each in ended:
        curves.add(each)
    return curves.describe(NOW)


def test_an_answer_is_spread_over_its_time_and_counts_in_the_second_of_its_first_token() -> None:
    curve = shown(answer(-3.5, -1.5, 40, waited=0.25))["a"]
    assert len(curve["tokens_per_second"]) == len(curve["first_token"]) == SECONDS
    assert curve["tokens_per_second"][-5:] == [0.0, 10.0, 20.0, 10.0, 0.0]
    assert curve["first_token"][-5:] == [None, 0.25, None, None, None]
    assert sum(curve["tokens_per_second"]) == 40


def test_answers_at_the_same_time_add_up_and_their_waits_are_averaged() -> None:
    both = answer(-4, -1, 30, waited=0.2), answer(-4, -1, 60, waited=0.4)
    curve = shown(*both)["a"]
    assert curve["tokens_per_second"][-4:] == [30.0, 30.0, 30.0, 0.0]
    assert curve["first_token"][-4] == pytest.approx(0.3)


def test_each_model_has_its_own() -> None:
    told = shown(answer(-4, -1, 30), answer(-2, 0, 10, model="b"))
    assert told["a"]["tokens_per_second"][-3:] == [10.0, 10.0, 0.0]
    assert told["b"]["tokens_per_second"][-3:] == [0.0, 5.0, 5.0]


def test_an_answer_that_comes_all_at_once_took_its_time_before() -> None:
    stats = answer(-1, -1, 100, waited=4.0)
    assert shown(stats)["a"]["tokens_per_second"][-6:] == [0.0, 25.0, 25.0, 25.0, 25.0, 0.0]


def test_what_is_older_than_the_curve_is_gone_and_nothing_grows() -> None:
    curves = Curves()
    curves.add(answer(0, 2, 20, model="old"))
    for hour in range(3):
        curves.add(answer(3600.0 * hour, 3600.0 * hour + 3000, 3000))
    told = curves.describe(NOW + 7200 + 3000)
    assert list(told) == ["a"]
    assert told["a"]["tokens_per_second"] == [1.0] * SECONDS
    for number in range(3 * MODELS):
        curves.add(answer(20_000, 20_001, 5, model=f"m{number}"))
    assert len(curves.describe(NOW + 20_001)) == MODELS


def test_an_answer_that_ends_late_does_not_disturb_newer_seconds() -> None:
    """Long ago by the time it is added: its place in the ring belongs to a newer second."""
    curves = Curves()
    curves.add(answer(0, 1, 7))
    curves.add(answer(-SECONDS, -SECONDS + 1, 9))
    assert curves.describe(NOW + 1)["a"]["tokens_per_second"][-1] == 7.0


@pytest.mark.parametrize("stats", [AnswerStats(ended=NOW), AnswerStats(model="a", ended=NOW)])
def test_an_answer_without_a_model_or_a_token_is_nothing(stats: AnswerStats) -> None:
    assert not any(any(curve["tokens_per_second"]) for curve in shown(stats).values())


def test_a_request_that_ends_is_on_the_curve() -> None:
    metrics = Metrics()
    metrics.request("/v1/chat/completions", 200, answer(-3, -1, 20))
    metrics.request("/v1/models", 200, None)
    curves = metrics.curves.describe(NOW)
    assert curves["a"]["tokens_per_second"][-3:] == [10.0, 10.0, 0.0]
