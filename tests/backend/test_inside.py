"""What runs inside the backend's process, each feature by itself, with the real mlx-lm."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mlxproxy.engines.mlx_lm.inside import (
    detokenizer,
    prompt_cache,
    sampling,
)

# -- the prompt cache


def test_a_prompt_that_is_wholly_cached_keeps_its_last_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mlx.core as mx
    from mlx_lm.models import cache
    from mlx_lm.models.cache import ArraysCache, KVCache, LRUPromptCache

    monkeypatch.setattr(LRUPromptCache, "fetch_nearest_cache", LRUPromptCache.fetch_nearest_cache)
    prompt_cache.arm(cache)
    keys = mx.zeros((1, 1, 3, 4))
    grown = KVCache()
    grown.update_and_fetch(keys, keys)
    kept = LRUPromptCache()
    kept.insert_cache("model", [1, 2, 3], [grown])
    (found,), rest = kept.fetch_nearest_cache("model", [1, 2, 3])
    assert (found.offset, rest) == (2, [3])
    assert kept.fetch_nearest_cache("model", [1, 2, 3, 4])[1] == [4]
    kept.insert_cache("model", [7, 8], [ArraysCache(1)])  # what recurrent layers keep
    assert kept.fetch_nearest_cache("model", [7, 8]) == (None, [7, 8])


# -- token ids without a text


@pytest.fixture
def detokenizers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """mlx-lm's detokenizers with the feature; the originals are back afterwards."""
    utils = pytest.importorskip("mlx_lm.tokenizer_utils")
    for name in detokenizer.CLASSES:
        for method in ("add_token", "finalize"):
            monkeypatch.setattr(getattr(utils, name), method, vars(getattr(utils, name))[method])
    segment = vars(utils.StreamingDetokenizer)["last_segment"]
    monkeypatch.setattr(utils.StreamingDetokenizer, "last_segment", segment)
    detokenizer.arm(utils)
    return utils  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("BPEStreamingDetokenizer", ["a", None, "b"]),
        ("SPMStreamingDetokenizer", [b"a", None, b"b"]),
    ],
)
def test_a_token_id_without_text_adds_nothing_to_the_answer(
    detokenizers: ModuleType, kind: str, texts: list[Any]
) -> None:
    made = getattr(detokenizers, kind).__new__(getattr(detokenizers, kind))
    made.tokenmap, made.trim_space = texts, False
    made.reset()
    said = ""
    for token in (0, 1, 2, 1):
        made.add_token(token)
        said += made.last_segment
    made.finalize()
    assert said + made.last_segment == "ab"


def test_a_token_id_beyond_the_vocabulary_adds_nothing_to_the_answer(
    detokenizers: ModuleType,
) -> None:
    made = detokenizers.SPMStreamingDetokenizer.__new__(detokenizers.SPMStreamingDetokenizer)
    made.tokenmap, made.trim_space = [b"a"], False
    made.reset()
    for token in (0, 7):
        made.add_token(token)
    made.finalize()
    assert made.last_segment == "a"


# -- sampling


def asked(seed: int | None = None, **values: float) -> Any:
    """The arguments of a request, as `mlx_lm.server` makes them."""
    sampling_values = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    others = {"xtc_probability": 0.0, "xtc_threshold": 0.1}
    return SimpleNamespace(
        seed=seed, sampling=SimpleNamespace(**{**sampling_values, **others, **values})
    )


@pytest.fixture
def armed_sampling(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`mlx_lm.server` with the feature, and the count of what was compiled."""
    mx = pytest.importorskip("mlx.core")
    server = pytest.importorskip("mlx_lm.server")
    utils = pytest.importorskip("mlx_lm.sample_utils")
    traced: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Any:
        def stats(*arguments: Any) -> Any:
            traced.append(name)
            return function(*arguments)

        return mx.compile(stats)

    monkeypatch.setattr(server, "_make_sampler", server._make_sampler)
    batchable = server.ResponseGenerator._is_batchable
    monkeypatch.setattr(server.ResponseGenerator, "_is_batchable", batchable)
    monkeypatch.setattr(utils, "apply_top_p", counted("top_p", lambda x, top_p: x + top_p))
    draw = counted("temperature", lambda x, temperature: mx.argmax(x / temperature, axis=-1))
    monkeypatch.setattr(utils, "categorical_sampling", draw)
    monkeypatch.setattr(
        sampling, "_min_p", lambda mx: lambda x, low: (traced.append("min_p"), x + low)[1]
    )
    sampling.arm(server, utils, mx)
    return SimpleNamespace(server=server, traced=traced, mx=mx)


@pytest.mark.parametrize(
    ("name", "field"), [("top_p", "top_p"), ("min_p", "min_p"), ("temperature", "temperature")]
)
def test_new_sampling_values_are_not_compiled_again(
    armed_sampling: Any, name: str, field: str
) -> None:
    logits = armed_sampling.mx.zeros((1, 8))
    for number in range(1, 13):
        sample = armed_sampling.server._make_sampler(asked(**{field: number / 13}), None)
        armed_sampling.mx.eval(sample(logits))
    assert armed_sampling.traced.count(name) == 1


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(armed_sampling: Any) -> None:
    mx, make = armed_sampling.mx, armed_sampling.server._make_sampler
    logits = mx.zeros((1, 1000))

    def drawn(seed: int, company: bool = False) -> list[int]:
        sample, others = make(asked(seed), None), make(asked(99), None)
        tokens = []
        for _ in range(8):
            tokens.append(sample(logits).item())
            if company:
                others(logits)
        return tokens

    assert drawn(5) == drawn(5, company=True)
    assert drawn(5) != drawn(6)
    assert drawn((1 << 64) - 1) == drawn(-1)


def test_a_seeded_request_is_batched_with_others(armed_sampling: Any) -> None:
    generator = SimpleNamespace(
        model_provider=SimpleNamespace(is_batchable=True), cli_args=SimpleNamespace(kv_bits=None)
    )
    request = asked(5)
    assert armed_sampling.server.ResponseGenerator._is_batchable(generator, request)
    assert request.seed == 5


def test_xtc_draws_by_the_requests_own_seed(armed_sampling: Any) -> None:
    """Two tokens are likely, and XTC leaves out the likelier one half of the times."""
    mx = armed_sampling.mx
    logits = mx.log(mx.array([[0.6, 0.4, 1e-6]]))
    tokenizer = SimpleNamespace(encode=lambda text: [2], eos_token_ids={2})

    def drawn(seed: int, probability: float = 0.5) -> list[int]:
        request = asked(seed, xtc_probability=probability, xtc_threshold=0.1, temperature=0.01)
        sample = armed_sampling.server._make_sampler(request, tokenizer)
        return [sample(logits).item() for _ in range(32)]

    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)
    assert set(drawn(5)) == {0, 1}
    assert set(drawn(5, probability=1.0)) == {1}


def test_at_temperature_0_the_backends_own_sampler_is_used(armed_sampling: Any) -> None:
    """Its name differs between versions."""
    mx = armed_sampling.mx
    tokenizer = SimpleNamespace(encode=lambda text: [0], eos_token_ids={1})
    sample = armed_sampling.server._make_sampler(asked(temperature=0), tokenizer)
    assert sample(mx.array([[0.0, 3.0, 1.0]])).item() == 1
