"""A model's own sampling, read from its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxproxy.catalog.sampling import chosen, sampling

QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1]}


def test_the_models_own_values_are_taken() -> None:
    assert chosen(QWEN3, 151_936) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}


def test_a_model_that_only_says_that_it_samples_has_the_usual_temperature() -> None:
    assert chosen({"do_sample": True, "top_k": 64}, 1000) == {"temperature": 1.0, "top_k": 64}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_sample": False, "temperature": 0.7},
        {"temperature": 0},
        {"temperature": 0.0, "top_p": 0.9},
        {"top_p": 0.9},
        {"eos_token_id": 2},
    ],
)
def test_a_model_that_says_nothing_of_it_is_decoded_greedily(config: dict[str, Any]) -> None:
    assert chosen(config, 1000) == {}


@pytest.mark.parametrize(
    "hurts",
    [
        {"top_k": 1000},
        {"top_k": 100_000},
        {"top_k": 0},
        {"top_k": -1},
        {"top_k": 20.5},
        {"top_k": True},
        {"top_p": 1.1},
        {"top_p": "0.9"},
        {"min_p": float("nan")},
        {"min_p": -1},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("inf")},
        {"top_p": [0.9]},
    ],
)
def test_a_value_that_would_hurt_the_backend_is_left_out(hurts: dict[str, Any]) -> None:
    assert chosen({"temperature": 0.5, **hurts}, 1000) == {"temperature": 0.5}


def test_without_a_known_vocabulary_no_top_k_is_taken() -> None:
    assert chosen({"temperature": 0.5, "top_k": 20}, None) == {"temperature": 0.5}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"temperature": 1e999}', "null"])
def test_a_broken_file_costs_no_request(text: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    assert sampling(str(tmp_path), {"generation_config.json"}, 1000) == {}


def test_the_file_is_read_where_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(QWEN3))
    assert sampling(str(tmp_path), {"generation_config.json"}, 1000)["temperature"] == 0.6
    assert sampling(str(tmp_path), set(), 1000) == {}
