"""Several real models at once: each in a process of its own, all of them answering."""

from __future__ import annotations

import concurrent.futures
import json
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.support import tiny_models
from tests.support.proxy import Proxy

NAMES = ("alpha", "beta", "gamma", "delta")
STREAMS = 64
TOKENS = 200


def text_of(stream: str) -> str:
    """Return what the events say; the last must be [DONE]."""
    data = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data:")]
    assert data[-1] == "[DONE]", stream[-300:]
    deltas = (json.loads(item)["choices"][0]["delta"] for item in data[:-1])
    return "".join(delta.get("content") or "" for delta in deltas)


def test_four_models_answer_64_streams_at_once_and_none_is_lost(
    start: Callable[..., Proxy], tmp_path: Path
) -> None:
    for name in NAMES:
        tiny_models.build(tmp_path / "models" / "tiny" / name, says=name)
    proxy = start(tmp_path / "models", MAX_LOADED=len(NAMES), MODEL_SELECTION="loaded")
    for name in NAMES:
        assert proxy.load(f"tiny/{name}").ok
    pids = [model["pid"] for model in proxy.loaded()["models"]]
    assert sorted(pids) == sorted(child.pid for child in proxy.children())

    all_are_open = threading.Barrier(STREAMS, timeout=60)

    def stream(number: int) -> str:
        name = NAMES[number % len(NAMES)]
        with proxy.chat(model=f"tiny/{name}", stream=True, max_tokens=TOKENS) as answer:
            all_are_open.wait()
            assert text_of(answer.text) == tiny_models.answer(name, TOKENS)
        return name

    with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
        answered = Counter(pool.map(stream, range(STREAMS)))
    assert answered == dict.fromkeys(NAMES, STREAMS // len(NAMES))
    assert [model["pid"] for model in proxy.loaded()["models"]] == pids, "one was started again"
    figures = proxy.get("/metrics").text
    for name in NAMES:
        tokens = STREAMS // len(NAMES) * TOKENS
        assert f'mlxproxy_tokens_out_total{{model="tiny/{name}"}} {tokens:.1f}' in figures
