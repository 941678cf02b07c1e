"""Will it fit? The estimate is what mlx-lm takes, and the machine's share is what there is."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from mlxproxy.backend.memory import Fit, available, fit, working_set
from mlxproxy.catalog.model import DEFAULT_CONTEXT, KVCache, Model

GB = 1 << 30

MODEL = Model(id="a/b", path=Path("/a/b"), weights_bytes=1000, kv_cache=KVCache(10))


def test_a_model_takes_its_weights_and_its_context() -> None:
    assert MODEL.memory_bytes(0) == 1000
    assert MODEL.memory_bytes(50) == 1500
    assert MODEL.memory_bytes() == 1000 + 10 * DEFAULT_CONTEXT


def test_a_context_beyond_the_models_own_is_not_counted() -> None:
    assert replace(MODEL, max_context_length=100).memory_bytes(10**9) == 2000


def test_layers_with_a_window_stop_growing() -> None:
    cache = KVCache(per_token=10, windowed_per_token=5, window=100)
    assert [cache.bytes(context) for context in (0, 50, 100, 1000)] == [0, 750, 1500, 10500]


def test_a_cache_of_unknown_size_is_left_out() -> None:
    assert replace(MODEL, kv_cache=None).memory_bytes(50) == 1000


def test_whether_a_model_fits_is_said_with_the_numbers() -> None:
    assert fit(MODEL, available=1500, context=50) == Fit(needed=1500, available=1500)
    assert fit(MODEL, available=1500, context=50).fits
    assert not fit(MODEL, available=1499, context=50).fits
    sentence = Fit(needed=18_240_000_000, available=16_000_000_000).sentence()
    assert "18.2 GB" in sentence
    assert "16.0 GB" in sentence
    assert "estimate" in sentence


@pytest.mark.parametrize(
    ("total", "limit_mb", "expected"),
    [
        (16 * GB, 0, 16 * GB * 2 // 3),
        (32 * GB, 0, 32 * GB * 2 // 3),
        (36 * GB, 0, 27 * GB),
        (128 * GB, 0, 96 * GB),
        (64 * GB, 57344, 56 * GB),
        (64 * GB, 10**9, 64 * GB),
    ],
)
def test_a_macs_memory_for_models_is_metals_limit_or_the_users_own(
    total: int, limit_mb: int, expected: int
) -> None:
    assert working_set(total, limit_mb) == expected


@pytest.mark.skipif(
    sys.platform == "darwin", reason="a Mac's share does not depend on what is free"
)
def test_memory_that_the_loaded_model_gives_back_counts_as_free() -> None:
    total = psutil.virtual_memory().total
    assert 0 < available() < total
    assert available(returned=10**18) == total


@pytest.mark.skipif(sys.platform != "darwin", reason="Metal is a Mac's")
def test_a_macs_memory_for_models_is_less_than_its_memory() -> None:
    assert GB < available() <= psutil.virtual_memory().total
