"""Models that see, over the real `mlx_vlm.server`: the promises that hold for every engine."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.conftest import Proxy, until
from tests.support import tiny_models, tiny_vision
from tests.support.vision_server import VLM_SERVER_BIN, needs_mlx_vlm

pytestmark = needs_mlx_vlm


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("library")
    tiny_vision.build(root / "tiny" / "eye")
    tiny_vision.build(root / "tiny" / "thinker", says="idea", thinking=True)
    tiny_vision.build(root / "tiny" / "slow-eye", layers=24)
    tiny_models.build(root / "tiny" / "alpha", says="alpha")
    return root


@pytest.fixture(scope="module")
def proxy(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    made = Proxy(
        tmp_path_factory.mktemp("proxy") / "instance",
        library,
        VLM_SERVER_BIN=VLM_SERVER_BIN,
        STOP_TIMEOUT=3,
    )
    try:
        yield made.start()
    finally:
        made.clean_up()


def seen(text: str, *urls: str) -> list[dict[str, Any]]:
    """Return a conversation of one message with images."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    parts += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": parts}]


def ask(proxy: Proxy, messages: list[dict[str, Any]], **fields: Any) -> requests.Response:
    body = {"messages": messages, "max_tokens": 4, "model": "tiny/eye", **fields}
    return proxy.post("/v1/chat/completions", body, stream=fields.get("stream", False))


def events(answer: requests.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.iter_lines() if line.startswith(b"data: ")]
    if lines[-1] == b"data: [DONE]":
        lines.pop()
    return [json.loads(line[6:]) for line in lines]


def words(told: list[dict[str, Any]]) -> str:
    choices = [choice for event in told for choice in event.get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def pid(proxy: Proxy) -> int:
    number: int = proxy.loaded()["pid"]
    return number


# -- answers


def test_an_image_reaches_the_model(proxy: Proxy) -> None:
    plain = ask(proxy, seen("Hi")).json()
    one = ask(proxy, seen("Hi", tiny_vision.image())).json()
    two = ask(proxy, seen("Hi", tiny_vision.image(), tiny_vision.image(128, 64))).json()
    counts = [answer["usage"]["prompt_tokens"] for answer in (plain, one, two)]
    # A patch of 32 pixels is a token; each image has a token before and after it.
    assert [count - counts[0] for count in counts] == [0, 4 + 2, 4 + 2 + 8 + 2]
    assert one["choices"][0]["message"]["content"] == "eye0 eye1 eye2 eye3 "


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_every_format_that_the_guard_lets_pass_is_read(proxy: Proxy, kind: str) -> None:
    answer = ask(proxy, seen("Hi", tiny_vision.image(kind=kind)))
    assert answer.status_code == 200, answer.text


def test_whole_and_streamed_answers_are_the_same(proxy: Proxy) -> None:
    messages = seen("Hi", tiny_vision.image())
    whole = ask(proxy, messages).json()
    told = events(ask(proxy, messages, stream=True, stream_options={"include_usage": True}))
    assert words(told) == whole["choices"][0]["message"]["content"]
    assert {event["model"] for event in told} == {"tiny/eye"} == {whole["model"]}
    assert told[-1]["usage"] == whole["usage"]
    assert whole["choices"][0]["finish_reason"] == "length"
    assert all(not event["usage"] for event in events(ask(proxy, messages, stream=True)))


@pytest.mark.parametrize(
    ("path", "body", "find"),
    [
        (
            "/v1/messages",
            {
                "max_tokens": 4,
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "Hi"},
                            {
                                "type": "image",
                                "source": {"type": "base64", "media_type": "image/png"},
                            },
                        ],
                    }
                ],
            },
            lambda answer: answer["content"][0]["text"],
        ),
        (
            "/v1/responses",
            {
                "max_output_tokens": 4,
                "input": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "input_text", "text": "Hi"},
                            {"type": "input_image", "image_url": "URL"},
                        ],
                    }
                ],
            },
            lambda answer: answer["output"][0]["content"][0]["text"],
        ),
        (
            "/api/chat",
            {
                "stream": False,
                "options": {"num_predict": 4},
                "messages": [{"role": "user", "content": "Hi", "images": ["DATA"]}],
            },
            lambda answer: answer["message"]["content"],
        ),
    ],
)
def test_images_pass_in_every_dialect(proxy: Proxy, path: str, body: Any, find: Any) -> None:
    url = tiny_vision.image()
    data = url.partition(",")[2]
    text = json.dumps({**body, "model": "tiny/eye"}).replace('"URL"', json.dumps(url))
    text = text.replace('"DATA"', json.dumps(data))
    text = text.replace('"image/png"}', f'"image/png", "data": "{data}"}}')
    answer = proxy.post(path, json.loads(text))
    assert answer.status_code == 200, answer.text
    assert find(answer.json()) == "eye0 eye1 eye2 eye3 "


def test_thoughts_are_told_apart_in_both_spellings(proxy: Proxy) -> None:
    body = {"max_tokens": 14, "model": "tiny/thinker", "enable_thinking": True}
    answer = ask(proxy, [{"role": "user", "content": "Hi"}], **body)
    assert answer.status_code == 200, answer.text
    message = answer.json()["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == tiny_models.thoughts()
    assert message["content"].startswith("idea0 ")


def test_log_probabilities_come_whole_and_streamed(proxy: Proxy) -> None:
    fields = {"logprobs": True, "top_logprobs": 2}
    whole = ask(proxy, seen("Hi"), **fields).json()["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in whole] == ["eye0 ", "eye1 ", "eye2 ", "eye3 "]
    assert all(len(token["top_logprobs"]) == 2 for token in whole)


def test_text_models_stay_with_mlx_lm_and_swaps_lead_there_and_back(proxy: Proxy) -> None:
    for model, program in (
        ("tiny/alpha", "mlx_lm.server"),
        ("tiny/eye", "mlx_vlm.server"),
        ("tiny/alpha", "mlx_lm.server"),
    ):
        answer = ask(proxy, seen("Hi"), model=model)
        assert answer.json()["model"] == model
        command = " ".join(psutil.Process(pid(proxy)).cmdline())
        assert program in command


def test_a_request_without_a_seed_is_not_answered_the_same_every_time(proxy: Proxy) -> None:
    def answer(**fields: Any) -> str:
        # Without temperature 2 and a flat vocabulary nothing is random; the wire is what counts.
        told = ask(proxy, seen("Hi"), temperature=2, **fields).json()
        return str(told["choices"][0]["message"]["content"])

    assert answer(seed=1) == answer(seed=1)


# -- what is refused


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://127.0.0.1:9/a.png", "images are not fetched"),
        ("/etc/passwd", "images are not fetched"),
        ("file:///etc/passwd", "images are not fetched"),
        ("data:image/png;base64,AAAA", "a PNG, JPEG, GIF or WebP image"),
    ],
)
def test_only_images_that_the_request_brings_are_read(
    proxy: Proxy, url: str, sentence: str
) -> None:
    refused = ask(proxy, seen("Hi", url))
    assert refused.status_code == 400
    assert sentence in refused.json()["error"]["message"]


def test_an_image_that_the_model_cannot_read_hurts_only_its_own_request(proxy: Proxy) -> None:
    ask(proxy, seen("Hi"))
    first = pid(proxy)
    refused = ask(proxy, seen("Hi", tiny_vision.image(1000, 2)))
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["code"] == "invalid_request"
    assert "image" in error["message"]
    assert ask(proxy, seen("Hi")).status_code == 200
    assert pid(proxy) == first


def test_an_image_for_a_text_model_is_refused(proxy: Proxy) -> None:
    refused = ask(proxy, seen("Hi", tiny_vision.image()), model="tiny/alpha")
    assert refused.status_code == 400
    assert "cannot read images" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ["x"]},
        {"n": 2},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
        {"logit_bias": {"999999999": 1}},
        {"adapter_path": 5, "logit_bias": {"-1": 1}},
        {"temperature": 3},
        {"repetition_penalty": 0},
        {"max_tokens": "many"},
        {"draft_model": "/tmp"},
        {"adapters": "/tmp"},
    ],
)
def test_what_would_hurt_is_refused_and_what_would_be_ignored_too(
    proxy: Proxy, fields: dict[str, Any]
) -> None:
    ask(proxy, seen("Hi"))
    first = pid(proxy)
    assert ask(proxy, seen("Hi"), **fields).status_code == 400
    assert ask(proxy, seen("Hi")).status_code == 200
    assert pid(proxy) == first


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 1 << 40, "temperature": 1},
        {"adapter_path": "/nonexistent"},
        {"model_file": "/tmp/x.py"},
        {"context_management": [{"type": "compaction", "compact_threshold": 1}]},
        {"seed": None, "temperature": None, "stream": None, "max_tokens": None},
        {"min_pixels": 5, "max_pixels": 1, "resize_shape": [1]},
        {"thinking_budget": "x", "reasoning": {"effort": 5}},
        {"max_completion_tokens": 4},
        {"seed": (1 << 64) - 1, "temperature": 1},
    ],
)
def test_what_the_backend_must_not_see_never_reaches_it(
    proxy: Proxy, fields: dict[str, Any]
) -> None:
    ask(proxy, seen("Hi"))
    first = pid(proxy)
    answer = ask(proxy, seen("Hi"), **{"max_tokens": 4, **fields})
    assert answer.status_code == 200, answer.text
    assert pid(proxy) == first


def test_a_model_that_sees_has_no_text_completions_and_says_where_to_go(proxy: Proxy) -> None:
    refused = proxy.post("/v1/completions", {"model": "tiny/eye", "prompt": "Once"})
    assert refused.status_code == 400
    assert "/v1/chat/completions" in refused.json()["error"]["message"]


def test_the_backends_port_is_locked(proxy: Proxy) -> None:
    ask(proxy, seen("Hi"))
    base = f"http://127.0.0.1:{proxy.backend_port}"
    for path in ("/v1/chat/completions", "/unload", "/v1/images/generations", "/health"):
        assert requests.post(base + path, json={}, timeout=5).status_code in (401, 405)
    assert requests.get(base + "/v1/models", timeout=5).status_code == 401
    command = psutil.Process(pid(proxy)).cmdline()
    key = psutil.Process(pid(proxy)).environ()["MLX_VLM_SERVER_API_KEY"]
    assert not any(key in word for word in command)


# -- together


def test_greedy_answers_run_together_and_are_right(proxy: Proxy) -> None:
    ask(proxy, seen("Hi"))
    with ThreadPoolExecutor(6) as pool:
        image = tiny_vision.image()
        asked = [seen("Hi", image) if number % 2 else seen("Hi") for number in range(6)]
        answers = list(pool.map(lambda it: ask(proxy, it, max_tokens=20).json(), asked))
    expected = tiny_models.answer("eye", 20)
    assert [it["choices"][0]["message"]["content"] for it in answers] == [expected] * 6


# -- ends


def test_a_client_that_leaves_ends_its_answer(proxy: Proxy) -> None:
    proxy.load("tiny/slow-eye")
    answer = ask(proxy, seen("Hi"), model="tiny/slow-eye", stream=True, max_tokens=5000)
    next(answer.iter_lines())
    answer.close()
    until(lambda: proxy.loaded()["in_flight"] == 0, what="the end of the answer")
    process = psutil.Process(pid(proxy))

    def idle() -> bool:
        return process.cpu_percent(0.5) < 30

    until(idle, what="the backend to rest")


def test_a_crash_ends_the_answer_with_an_error_and_the_next_request_brings_it_back(
    proxy: Proxy,
) -> None:
    proxy.load("tiny/slow-eye")
    answer = ask(proxy, seen("Hi"), model="tiny/slow-eye", stream=True, max_tokens=5000)
    lines = answer.iter_lines()
    next(lines)
    first = pid(proxy)
    psutil.Process(first).send_signal(signal.SIGKILL)
    last = [line for line in lines if line.startswith(b"data: ")][-1]
    assert "crashed" in json.loads(last[6:])["error"]["message"]
    assert ask(proxy, seen("Hi"), model="tiny/slow-eye").status_code == 200
    assert pid(proxy) != first


def test_an_unload_leaves_no_process(proxy: Proxy) -> None:
    ask(proxy, seen("Hi"))
    process = psutil.Process(pid(proxy))
    assert proxy.unload().status_code == 200
    assert not process.is_running()


@pytest.mark.parametrize(
    ("defect", "advice"),
    [
        ("shape_mismatch", "do not match the configuration"),
        ("raising_template", "chat template"),
    ],
)
def test_a_failed_load_is_told_with_advice(
    library: Path, proxy: Proxy, defect: str, advice: str
) -> None:
    folder = tiny_vision.build(library / "broken" / defect.replace("_", "-"))
    if defect == "shape_mismatch":
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["intermediate_size"] = 320
        (folder / "config.json").write_text(json.dumps(config))
    else:
        tiny_models.break_model(folder, defect)
    failed = proxy.load(f"broken/{folder.name}")
    assert failed.status_code == 500
    assert advice in failed.json()["error"]["message"]


def test_a_folder_with_python_of_its_own_is_never_loaded(
    library: Path, proxy: Proxy, tmp_path: Path
) -> None:
    folder = tiny_vision.build(library / "broken" / "codes")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_file": "evil.py"}))
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    refused = proxy.load("broken/codes")
    assert refused.status_code == 422
    assert "Python code" in refused.json()["error"]["message"]
    assert not mark.exists()


def test_the_proxy_never_imports_mlx(proxy: Proxy) -> None:
    ask(proxy, seen("Hi", tiny_vision.image()))
    assert proxy.process is not None
    files = {Path(it.path).parts for it in psutil.Process(proxy.process.pid).memory_maps()}
    assert not any("mlx" in parts or "mlx_vlm" in parts for parts in files)
