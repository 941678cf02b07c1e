"""Log probabilities of given continuations, against the model's own in a single pass."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import random_models, tiny_models
from tests.support.proxy import Proxy
from tests.support.waiting import until

mx = pytest.importorskip("mlx.core")

HELLO = [{"role": "user", "content": "Hello!"}]
PROMPT = "Is the sky blue? "
TEXTS = ["Yes", "No", "Perhaps, if it is neither night nor raining. " * 8]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for arch in random_models.CONFIGS:
        random_models.build(root / "tiny" / arch, arch)
    tiny_models.build_slow(root / "tiny" / "slow")
    return root


@pytest.fixture(scope="module")
def house(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    proxy = Proxy(tmp_path_factory.mktemp("proxy") / "instance", root)
    try:
        yield proxy.start()
    finally:
        proxy.clean_up()


def score(proxy: Proxy, **fields: Any) -> dict[str, Any]:
    answer = proxy.post("/v1/score", fields)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def logprobs(choice: dict[str, Any]) -> list[float | None]:
    found: list[float | None] = choice["logprobs"]["token_logprobs"]
    return found


def expected(folder: Path, tokens_of: Callable[[Any], tuple[list[int], int]]) -> list[float]:
    """Return the log probabilities of tokens from a place on, computed in a single pass."""
    from mlx_lm.utils import load

    model, tokenizer = load(str(folder))[:2]
    tokens, begin = tokens_of(tokenizer)
    rows = model(mx.array([tokens[:-1]]))[0].astype(mx.float32)
    rows = rows - mx.logsumexp(rows, axis=-1, keepdims=True)
    return [rows[place - 1, tokens[place]].item() for place in range(begin, len(tokens))]


@pytest.mark.parametrize("arch", list(random_models.CONFIGS))
def test_scores_are_the_models_own_log_probabilities(house: Proxy, root: Path, arch: str) -> None:
    told = score(house, model=f"tiny/{arch}", prompt=PROMPT, continuations=TEXTS)
    assert told["model"] == f"tiny/{arch}"
    for text, choice in zip(TEXTS, told["choices"], strict=True):

        def tokens_of(tokenizer: Any, text: str = text) -> tuple[list[int], int]:
            return tokenizer.encode(PROMPT + text), len(tokenizer.encode(PROMPT))

        assert choice["text"] == text
        assert "".join(choice["logprobs"]["tokens"]) == text
        assert logprobs(choice) == pytest.approx(
            expected(root / "tiny" / arch, tokens_of), abs=1e-3
        )
        assert choice["logprob"] == pytest.approx(sum(map(float, logprobs(choice))))  # type: ignore[arg-type]


def test_the_second_time_the_prompt_is_in_the_cache_and_the_scores_are_the_same(
    house: Proxy,
) -> None:
    fields = {"model": "tiny/llama", "prompt": "Once more. " * 30, "continuations": TEXTS}
    before, after = score(house, **fields), score(house, **fields)
    cached = [it["usage"]["prompt_tokens_details"]["cached_tokens"] for it in (before, after)]
    assert cached[0] == 0 < cached[1]
    for old, new in zip(before["choices"], after["choices"], strict=True):
        assert logprobs(new) == pytest.approx(logprobs(old), abs=1e-3)


def test_the_likeliest_continuation_is_the_one_that_the_model_writes(house: Proxy) -> None:
    fields = {"model": "tiny/llama", "messages": HELLO}
    written = house.post(
        "/v1/chat/completions", {**fields, "temperature": 0, "max_tokens": 1, "logprobs": True}
    ).json()["choices"][0]
    (token,) = written["logprobs"]["content"]
    choice = score(house, **fields, continuations=[token["token"]])["choices"][0]
    if choice["logprobs"]["tokens"] == [token["token"]]:  # its text may be that of several tokens
        assert choice["is_greedy"]
        assert choice["logprob"] == pytest.approx(token["logprob"], abs=1e-3)


def test_a_text_of_its_own_has_no_log_probability_for_its_first_token(house: Proxy) -> None:
    (choice,) = score(house, model="tiny/llama", prompt="", continuations=["Hello"])["choices"]
    assert logprobs(choice)[0] is None
    assert all(isinstance(value, float) for value in logprobs(choice)[1:])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "a"}, "continuations"),
        ({"continuations": ["b"]}, "prompt"),
        ({"prompt": "a", "messages": HELLO, "continuations": ["b"]}, "prompt"),
        ({"prompt": "a", "continuations": []}, "continuations"),
        ({"prompt": "a", "continuations": ["b", ""]}, "continuations[1]"),
        ({"prompt": "a", "continuations": [7]}, "continuations[0]"),
        ({"prompt": ["a"], "continuations": ["b"]}, "prompt"),
        ({"prompt": "a", "continuations": ["b"], "stream": True}, "stream"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(
    house: Proxy, fields: dict[str, Any], param: str
) -> None:
    answer = house.post("/v1/score", {"model": "tiny/llama", **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_more_than_the_context_is_refused_with_its_length(house: Proxy) -> None:
    fields = {"model": "tiny/llama", "prompt": "a", "continuations": ["b " * 20_000]}
    answer = house.post("/v1/score", fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_others_go_on_while_a_long_text_is_scored_and_it_ends_with_its_client(
    house: Proxy,
) -> None:
    house.load("tiny/slow")
    fields = {"model": "tiny/slow", "prompt": "x", "continuations": [tiny_models.long_prompt(4000)]}
    body = json.dumps(fields).encode()
    head = b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", house.port)) as client:
        client.sendall(head + body)
        answer = house.post(
            "/v1/completions", {"model": "tiny/slow", "prompt": "y", "max_tokens": 2}
        )
        assert answer.status_code == 200
        client.settimeout(0.0)
        with pytest.raises(BlockingIOError):
            client.recv(1)  # the score is not finished: the short answer overtook it
    until(lambda: house.loaded()["in_flight"] == 0, what="the end of the score")
