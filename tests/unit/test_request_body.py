"""A request's body: checked for what is loaded, and again for another model that answers."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from mlxproxy.errors import InvalidRequest
from mlxproxy.guard import body as module
from mlxproxy.guard.body import RequestBody
from mlxproxy.guard.check import Limits
from tests.support.fake_backend import model_spec

GIVEN: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "top_k": 900}
SMALL, LARGE = model_spec("small"), model_spec("large")


def limits_of(spec: Any) -> Limits:
    sizes = {"small": 1000, "large": 100_000}
    return Limits(frozenset(), vocab_size=sizes[spec.model_id] if spec else None)


def test_what_was_loaded_when_it_came_is_checked_for_once() -> None:
    with mock.patch.object(module, "check", wraps=module.check) as check:
        body = RequestBody(GIVEN, "chat", LARGE, limits_of)
        assert body.for_spec(LARGE) is body.fields
        assert check.call_count == 1
        assert body.for_spec(SMALL)["top_k"] == 900
        assert check.call_count == 2


@pytest.mark.parametrize("known", [None, LARGE])
def test_a_model_that_comes_later_may_refuse_it(known: Any) -> None:
    body = RequestBody({**GIVEN, "logit_bias": {"50000": 1}}, "chat", known, limits_of)
    assert body.for_spec(LARGE)["logit_bias"]
    with pytest.raises(InvalidRequest):
        body.for_spec(SMALL)


def test_what_no_model_takes_is_refused_at_once() -> None:
    with pytest.raises(InvalidRequest):
        RequestBody({}, "chat", None, limits_of)
