"""The benchmark finds a slow relay, and what turns save."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import allin, load, several
from benchmarks.contestants import MODEL, Proxy, standin_in
from benchmarks.lifecycle import build_models
from benchmarks.load import Work
from benchmarks.part import Place
from tests.support import tiny_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_models.build(root / MODEL)
    return root


@pytest.fixture(params=[0.0, 5.0], ids=["as it is", "5 ms slower"])
def measured(
    request: pytest.FixtureRequest, tmp_path: Path, models: Path
) -> Iterator[tuple[float, load.Outcome, load.Outcome]]:
    """The delay, a direct connection's outcome, and the proxy's."""
    work = Work(streams=4, events=40, interval=10, settle=0.1)
    with Proxy(tmp_path, models, standin_in(tmp_path), request.param).running() as proxy:
        proxy.load(MODEL)
        direct = load.run(proxy.backend_port, (), work)
        yield request.param, direct, load.run(proxy.port, [proxy.pid], work)


def test_the_benchmark_shows_a_delay_in_the_relay(
    measured: tuple[float, load.Outcome, load.Outcome],
) -> None:
    delay, direct, proxied = measured
    assert direct.broken == proxied.broken == 0
    assert proxied.resident > 20
    assert proxied.cpu_per_event > 10
    added = (proxied.p50 - direct.p50) / 1000  # milliseconds
    assert (added > 4.5) is (delay == 5)


def test_the_benchmark_measures_whole_answers_and_first_bytes_through_the_proxy(
    tmp_path: Path, models: Path
) -> None:
    with Proxy(tmp_path, models, standin_in(tmp_path)).running() as proxy:
        proxy.load(MODEL)
        assert 0 < load.whole_answers(proxy.port, count=3, tokens=16, interval=0) < 1000
        paced = load.whole_answers(proxy.port, count=3, tokens=16, interval=5)
        assert 80 <= paced < 1000
        first = load.first_bytes(proxy.port, 4)
        assert 0 < first.p50 <= first.last < 1000


def test_the_benchmark_of_several_models_shows_what_turns_save_and_what_residents_cost(
    tmp_path: Path,
) -> None:
    models = build_models(tmp_path / "models")
    place = Place(tmp_path, models, tmp_path, lambda _: None)
    measured = several.Several.measure(place, quick=True)
    (by_turns,), (first_come,) = (measured.alternation[rule] for rule in several.RULES)
    assert first_come.swaps >= first_come.answers - 1 > 0, "each request of the other model swaps"
    assert 0 < by_turns.swaps < by_turns.answers / 2
    assert by_turns.swaps_per_answer < first_come.swaps_per_answer
    assert by_turns.longest_wait > several.LOAD_SECONDS < first_come.longest_wait
    assert list(measured.residents) == [1, 2, 4]
    for (cost,) in measured.residents.values():
        assert cost.cpu_per_event > 10
        assert 0 < cost.request < 1000
    stored = json.loads(json.dumps(asdict(measured)))
    assert several.Several.from_json(stored) == measured


def test_the_benchmark_counts_the_price_of_the_requests_themselves(
    tmp_path: Path, models: Path
) -> None:
    with Proxy(tmp_path, models, standin_in(tmp_path)).running() as proxy:
        proxy.load(MODEL)
        whole = allin.whole(proxy.port, [proxy.pid], tokens=20, answers=20)
        assert 100 < whole.cpu < 100_000
        assert 0 < whole.rate < 10_000
        work = Work(streams=4, events=5, interval=10)
        stream = allin.streamed(proxy.port, [proxy.pid], work, batches=2)
        assert 100 < stream.cpu < 100_000
        assert 0 < stream.rate <= 4 * 2 / (2 * 0.05)
