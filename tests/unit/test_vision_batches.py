"""Which requests `mlx_vlm.server` may answer at the same time."""

from __future__ import annotations

from typing import Any

import pytest

from mlxproxy.backend.batch import Batch
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.engines.mlx_lm.engine import MlxLm
from mlxproxy.engines.mlx_vlm.engine import MlxVlm
from mlxproxy.guard.check import check
from mlxproxy.guard.shapes import Limits
from tests.support import tiny_vision
from tests.support.fake_backend import model_spec

ENGINE = MlxVlm(None, 1000)
LIMITS = Limits(frozenset(), vocab_size=1000, max_context=4096, images=True)
IMAGE = {"type": "image_url", "image_url": {"url": tiny_vision.image()}}


def spec(path: str = "eye") -> ModelSpec:
    made = model_spec(path)
    made.model.engine = ENGINE.name
    return made


def batch(path: str = "eye", **fields: Any) -> Batch:
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    return ENGINE.batch(check(body, ENGINE.rules["chat"], LIMITS), spec(path), lambda _: False)


def together(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return batch(**one).admits(batch(**other), spec())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"temperature": 0}),
        ({}, {"temperature": 0, "top_p": 0.5, "top_k": 3, "seed": 7}),
        ({"max_tokens": 5}, {"repetition_penalty": 1.1, "logit_bias": {"5": 1}}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"temperature": 0.7}, {"temperature": 0.701, "top_p": 1, "top_k": -1}),
        (
            {"temperature": 1, "top_k": 5, "top_p": 0.5},
            {"top_p": 0.5, "top_k": 5, "temperature": 1},
        ),
        ({"logprobs": True}, {"logprobs": True, "top_logprobs": 3}),
        ({"temperature": 1, "seed": -1}, {"temperature": 1}),
    ],
)
def test_requests_that_are_sampled_alike_run_together(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert together(one, other)
    assert together(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"temperature": 0.7}),
        ({"temperature": 0.6}, {"temperature": 0.7}),
        ({"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.9}),
        ({"temperature": 0.7}, {"temperature": 0.7, "top_k": 40}),
        ({"temperature": 0.7}, {"temperature": 0.7, "logprobs": True}),
        ({}, {"logprobs": True}),
    ],
)
def test_requests_that_are_sampled_in_different_ways_do_not(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert not together(one, other)
    assert not together(other, one)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1, "seed": 7},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, IMAGE]}]},
    ],
)
def test_seeds_and_images_are_answered_alone(fields: dict[str, Any]) -> None:
    assert batch(**fields).is_alone
    assert not together(fields, fields)


def test_what_was_found_for_another_model_or_engine_or_for_none_does_not_count() -> None:
    assert not batch("other").admits(batch("other"), spec())
    assert ENGINE.batch({"messages": []}, None, lambda _: False).is_alone
    text = MlxLm(None, 1000, lambda size: size).batch({"messages": []}, None, lambda _: False)
    assert text.admits(text, model_spec("any"))
    assert not text.admits(text, spec())
