"""The benchmark reads the bytes as they are, and counts right."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import picture, wire
from benchmarks.__main__ import RESULTS
from benchmarks.figures import Figure, Goal, percentile
from benchmarks.lifecycle import generate
from benchmarks.report import Report
from tests.support import tiny_models
from tests.support.model_folders import catalog_of

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

CLOSED = b"HTTP/1.0 200 OK\r\n\r\n"

DONE = b"data: [DONE]\n\n"


def event(number: int, sent: int = 0, stream: int = 3) -> bytes:
    return b'data: {"delta": {"content": "%d %d %d "}}\n\n' % (stream, number, sent)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def chunked(*parts: bytes) -> list[wire.Piece]:
    return [(1, HEAD), *((2, chunk(part)) for part in parts), (3, b"0\r\n\r\n")]


# -- what came back


def test_an_event_counts_as_received_with_its_last_byte() -> None:
    raw = chunk(b": keepalive 1/1\n\n") + chunk(event(0, sent=5)) + chunk(event(1, sent=40))
    cut = raw.index(b'content": "3 1')
    answer = wire.answer(
        [(10, HEAD), (20, raw[:cut]), (50, raw[cut:]), (60, chunk(DONE) + b"0\r\n\r\n")]
    )
    assert answer.first_byte == 10
    assert [(it.number, it.received, it.latency) for it in answer.events] == [
        (0, 20, 15),
        (1, 50, 10),
    ]
    assert answer.is_whole(stream=3, events=2)


def test_the_cuts_between_chunks_do_not_matter() -> None:
    data = event(0) + event(1) + DONE
    answer = wire.answer(
        [(1, HEAD), *((2, chunk(bytes([byte]))) for byte in data), (3, b"0\r\n\r\n")]
    )
    assert answer.is_whole(stream=3, events=2)
    assert wire.answer(chunked(data)).is_whole(stream=3, events=2)


def test_a_stream_without_chunks_is_complete_if_it_ends_with_done() -> None:
    assert wire.answer([(1, CLOSED), (2, event(0) + DONE)]).is_whole(stream=3, events=1)
    assert not wire.answer([(1, CLOSED), (2, event(0))]).is_whole(stream=3, events=1)


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param(chunked(event(0), DONE), id="an event lost"),
        pytest.param(chunked(event(0), event(1), event(1), DONE), id="an event doubled"),
        pytest.param(chunked(event(1), event(0), DONE), id="out of order"),
        pytest.param(chunked(event(0), event(1, stream=4), DONE), id="of another stream"),
        pytest.param(chunked(event(0), event(1)), id="no [DONE]"),
        pytest.param(chunked(event(0), event(1), DONE)[:-1], id="no last chunk"),
        pytest.param([*chunked(event(0), event(1), DONE), (4, b"more")], id="bytes after the end"),
        pytest.param([(1, HEAD.replace(b"200", b"502")), *chunked(DONE)[1:]], id="an error"),
        pytest.param([(1, b"HTTP/1.1 2")], id="half a head"),
        pytest.param([], id="nothing"),
    ],
)
def test_an_incomplete_stream_counts_as_broken(pieces: list[wire.Piece]) -> None:
    assert not wire.answer(pieces).is_whole(stream=3, events=2)


# -- the arithmetic


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert percentile(values, 50) == 50
    assert percentile(values, 99) == 99
    assert percentile([7.0], 99) == 7
    assert math.isnan(percentile([], 50))


def test_differences_are_taken_round_by_round() -> None:
    added = Figure([110.0, 130.0, 500.0]).above(Figure([50.0, 60.0, 400.0]))
    assert added.rounds == [60, 70, 100]
    assert (added.median, added.low, added.high) == (70, 60, 100)
    assert added.ratio(Figure([35.0, 35.0, 99.0])) == 2
    assert math.isnan(added.ratio(Figure([])))


def test_a_goal_is_passed_missed_or_not_measured() -> None:
    assert Goal("CPU", 2.0, 2.0, "x nginx").verdict == "PASS"
    assert Goal("CPU", 2.01, 2.0, "x nginx").verdict == "MISS"
    assert Goal("CPU", math.nan, 2.0, "x nginx").verdict == "-"


# -- the whole of it


def test_the_generated_library_has_only_loadable_models(tmp_path: Path) -> None:
    model = tiny_models.build(tmp_path / "model")
    generate(tmp_path / "library", model, 50)
    listed = catalog_of((tmp_path / "library",)).models()
    assert len(listed) == 50
    assert all(model.loadable for model in listed)


# -- what is shown of it


@pytest.fixture
def stored() -> Report:
    return Report.from_json(json.loads(RESULTS.read_text()))


def test_stored_results_are_read_as_they_were_written(stored: Report) -> None:
    assert json.loads(json.dumps(stored.to_json())) == json.loads(RESULTS.read_text())


def test_the_picture_shows_what_is_added_in_milliseconds_beside_what_the_model_takes(
    stored: Report,
) -> None:
    rounds = stored.rounds
    (_, token), (_, answer) = picture.panels(stored)
    ours, direct = (rounds.of(1, name, "p50") for name in ("mlxproxy", "direct"))
    assert token["mlxproxy adds"] * 1000 == pytest.approx(ours.above(direct).median)
    whole, alone = (rounds.whole_answer(name) for name in ("mlxproxy", "direct"))
    assert answer["mlxproxy adds"] == pytest.approx(whole.above(alone).median)
    assert list(token) == list(answer) == ["the model takes", "mlxproxy adds", "nginx would add"]
    assert answer["the model takes"] == 64 * token["the model takes"]


def test_without_nginx_there_is_a_picture_all_the_same(stored: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    fewer = Report(["direct", "mlxproxy"], stored.rounds, stored.lifecycle, stored.parts)
    picture.draw(fewer, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5_000
