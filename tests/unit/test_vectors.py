"""Embeddings and rankings: the groups, and the shapes of the answers."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

import pytest

from mlxproxy.dialects import vectors
from mlxproxy.errors import BackendFailed, InvalidRequest


def test_every_text_is_in_one_group_with_others_of_its_length() -> None:
    sizes = [10, 4000, 12, 11, 3900, 9, 4100]
    found = vectors.groups(sizes, limit=8192)
    assert sorted(index for group in found for index in group) == list(range(7))
    assert found == [[5, 0, 3, 2], [4, 1, 6]]


def test_a_group_is_never_larger_than_a_step_should_be() -> None:
    for size in (1, 100, 1000, 20_000):
        for group in vectors.groups([size] * 200, limit=1 << 20):
            assert len(group) <= vectors.GROUP_TEXTS
            assert len(group) == 1 or len(group) * size <= vectors.GROUP_BYTES


def test_a_text_that_may_be_too_long_is_alone() -> None:
    assert vectors.groups([10, 600, 700, 20], limit=512) == [[0, 3], [1], [2]]


@pytest.mark.parametrize("text", ["", "bread", "œuvre", "北京", "\ufdfa" * 3])
def test_no_text_has_more_tokens_than_its_normalized_bytes(text: str) -> None:
    assert vectors.longest(text) >= len(text.encode()) + vectors.MARKERS


def test_the_bytes_are_counted_after_normalization() -> None:
    assert vectors.longest("\ufdfa") > 18  # one character, which is a sentence when taken apart


def test_vectors_come_in_the_order_of_their_texts() -> None:
    data = [{"index": 1, "embedding": [2.0]}, {"index": 0, "embedding": [1.0]}]
    assert vectors.vectors({"data": data}, 2) == [[1.0], [2.0]]


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"data": []},
        {"data": None},
        {"data": [{"index": 0}]},
        {"data": [{"index": 0, "embedding": [math.nan]}]},
        {"data": [{"index": 0, "embedding": "AAAA"}]},
    ],
)
def test_what_is_no_vector_is_the_backends_failure(answer: dict[str, Any]) -> None:
    with pytest.raises(BackendFailed):
        vectors.vectors(answer, 1)


@pytest.mark.parametrize(
    "results",
    [
        [],
        None,
        [{"index": 1, "relevance_score": 0.5}],
        [{"index": 0, "relevance_score": math.nan}],
        [{"index": 0}],
    ],
)
def test_what_is_no_score_is_the_backends_failure(results: Any) -> None:
    with pytest.raises(BackendFailed):
        vectors.scores({"results": results}, 1)


def test_fewer_dimensions_have_length_one_again() -> None:
    assert vectors.shortened([3.0, 4.0, 12.0], 2) == [0.6, 0.8]
    assert vectors.shortened([0.0, 0.0, 1.0], 2) == [0.0, 0.0]
    assert vectors.shortened([3.0], None) == [3.0]
    with pytest.raises(InvalidRequest, match="at most 3"):
        vectors.shortened([1.0, 0.0, 0.0], 4)


def test_base64_is_of_small_floats_in_intels_order() -> None:
    text = vectors.encoded([1.0, -2.5], "base64")
    assert struct.unpack("<2f", base64.b64decode(text)) == (1.0, -2.5)
    assert vectors.encoded([1.0], "float") == [1.0]


def test_the_best_come_first_and_equal_ones_in_their_order() -> None:
    told = vectors.ranking("m", [0.1, 0.9, 0.5, 0.5], ["a", "b", "c", "d"], 3, True, 7)
    assert [item["index"] for item in told["results"]] == [1, 2, 3]
    assert told["results"][0]["document"] == {"text": "b"}
    assert told["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert told["meta"]["tokens"]["input_tokens"] == 7
