"""A request's body: checked for what is loaded, and again for another model that answers."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from mlxproxy.engines.mlx_lm.rules import RULES
from mlxproxy.errors import InvalidRequest
from mlxproxy.guard import check as module
from mlxproxy.guard.check import Terms
from mlxproxy.guard.shapes import Limits
from mlxproxy.relay.body import RequestBody
from tests.support.fake_backend import model_spec

GIVEN: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "top_k": 900}
SMALL, LARGE = model_spec("small"), model_spec("large")


def terms_of(spec: Any) -> Terms:
    sizes = {"small": 1000, "large": 100_000}
    limits = Limits(frozenset(), vocab_size=sizes[spec.model_id] if spec else None)
    return Terms(RULES, limits)


def test_what_was_loaded_when_it_came_is_checked_for_once() -> None:
    with mock.patch.object(module, "check", wraps=module.check) as check:
        body = RequestBody(GIVEN, "chat", LARGE, terms_of)
        assert body.for_spec(LARGE) is body.fields
        assert check.call_count == 1
        assert body.for_spec(SMALL)["top_k"] == 900
        assert check.call_count == 2


@pytest.mark.parametrize("known", [None, LARGE])
def test_a_model_that_comes_later_may_refuse_it(known: Any) -> None:
    body = RequestBody({**GIVEN, "logit_bias": {"50000": 1}}, "chat", known, terms_of)
    assert body.for_spec(LARGE)["logit_bias"]
    with pytest.raises(InvalidRequest):
        body.for_spec(SMALL)


def test_what_no_model_takes_is_refused_at_once() -> None:
    with pytest.raises(InvalidRequest):
        RequestBody({}, "chat", None, terms_of)
