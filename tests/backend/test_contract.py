"""The six endpoints as existing scripts know them, against the real backend."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support import tiny_models
from tests.support.proxy import Proxy
from tests.support.raw_http import shape
from tests.support.waiting import until


def test_the_listing_has_every_model_sorted_with_what_openai_clients_need(
    proxy: Proxy, models: Path
) -> None:
    proxy.unload()
    answer = proxy.get("/v1/models").json()
    assert answer["object"] == "list"
    assert [item["id"] for item in answer["data"]] == ["tiny/alpha", "tiny/beta"]
    first = answer["data"][0]
    assert first["object"] == "model"
    assert first["path"] == str(models / "tiny" / "alpha")
    assert first["loaded"] is False
    assert isinstance(first["created"], int)
    assert isinstance(first["owned_by"], str)


def test_a_load_answers_when_the_model_has_really_answered(proxy: Proxy, models: Path) -> None:
    path = str(models / "tiny" / "alpha")
    before = time.time()
    answer = proxy.load("tiny/alpha")
    assert answer.status_code == 200
    assert answer.json()["status"] == "loaded"
    assert answer.json()["model_id"] == path
    assert answer.json()["enable_thinking"] is False
    # The first chat waits for nothing: directly at the backend, with the path as the model.
    direct = requests.post(
        f"http://127.0.0.1:{proxy.backend_port}/v1/chat/completions",
        json={"model": path, "max_tokens": 3, "messages": [{"role": "user", "content": "Hi"}]},
        timeout=10,
    )
    assert direct.json()["choices"][0]["message"]["content"] == tiny_models.answer("alpha", 3)
    loaded = proxy.loaded()
    assert loaded["loaded"] is True
    assert loaded["model_id"] == path
    assert loaded["enable_thinking"] is False
    assert before <= loaded["loaded_at"] <= time.time()
    health = proxy.health()
    assert health["proxy"] == health["backend"] == "ok"
    assert health["model_id"] == path
    listed = {item["id"]: item["loaded"] for item in proxy.get("/v1/models").json()["data"]}
    assert listed == {"tiny/alpha": True, "tiny/beta": False}


def test_a_load_of_what_is_loaded_answers_at_once_with_the_same_process(proxy: Proxy) -> None:
    proxy.load("tiny/alpha")
    pid = proxy.loaded()["pid"]
    started = time.monotonic()
    assert proxy.load("tiny/alpha").json()["changed"] is False
    assert time.monotonic() - started < 0.5
    assert proxy.loaded()["pid"] == pid


def test_a_load_by_absolute_path_ends_the_process_of_the_model_before(
    proxy: Proxy, models: Path
) -> None:
    proxy.load("tiny/alpha")
    pid = proxy.loaded()["pid"]
    answer = proxy.load(str(models / "tiny" / "beta"))
    assert answer.json()["model_id"] == str(models / "tiny" / "beta")
    assert len(proxy.children()) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    text = proxy.chat(max_tokens=3).json()["choices"][0]["message"]["content"]
    assert text == tiny_models.answer("beta", 3)


def test_thinking_is_set_on_the_backends_command_line_and_a_change_restarts_it(
    proxy: Proxy,
) -> None:
    proxy.load("tiny/alpha")
    first = proxy.loaded()["pid"]
    quick = proxy.chat(max_tokens=4).json()
    assert proxy.load("tiny/alpha", enable_thinking=True).json()["enable_thinking"] is True
    loaded = proxy.loaded()
    assert loaded["pid"] != first
    assert loaded["enable_thinking"] is True
    (child,) = proxy.children()
    command = child.cmdline()
    assert json.loads(command[command.index("--chat-template-args") + 1]) == {
        "enable_thinking": True
    }
    thoughtful = proxy.chat(max_tokens=30).json()
    assert "reasoning" not in quick["choices"][0]["message"]
    assert thoughtful["choices"][0]["message"]["reasoning"] == tiny_models.thoughts()


def test_thinking_can_be_turned_per_request_without_a_restart(proxy: Proxy) -> None:
    proxy.load("tiny/alpha")
    pid = proxy.loaded()["pid"]
    for fields in (
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"enable_thinking": True},
        {"reasoning_effort": "high"},
    ):
        message = proxy.chat(max_tokens=30, **fields).json()["choices"][0]["message"]
        assert message["reasoning"] == tiny_models.thoughts(), fields
    assert "reasoning" not in proxy.chat().json()["choices"][0]["message"]
    assert proxy.loaded()["pid"] == pid


@pytest.mark.parametrize("model", ["any", "gpt-4o", "/no/model", "", None])
def test_a_name_that_is_no_models_is_answered_by_the_loaded_model(
    proxy: Proxy, model: str | None
) -> None:
    proxy.load("tiny/alpha")
    answer = proxy.chat(model=model, max_tokens=4).json()
    assert answer["choices"][0]["message"]["content"] == tiny_models.answer("alpha", 4)
    assert answer["usage"]["completion_tokens"] == 4


def test_unload_says_whether_a_model_was_loaded(proxy: Proxy) -> None:
    proxy.load("tiny/alpha")
    assert proxy.unload().json() == {"status": "unloaded"}
    assert proxy.unload().json() == {"status": "already_unloaded"}
    assert proxy.children() == []
    assert proxy.loaded()["loaded"] is False
    health = proxy.health()
    assert (health["backend"], health["model_id"]) == ("not_running", None)


def test_a_chat_with_nothing_loaded_says_what_to_do(proxy: Proxy) -> None:
    proxy.unload()
    for stream in (False, True):
        answer = proxy.chat(stream=stream)
        assert answer.status_code == 503
        assert shape(answer.json())["code"] == "no_model_loaded"
        assert "/v1/models/load" in shape(answer.json())["message"]


def test_a_chat_that_names_a_known_model_loads_it_when_nothing_is_loaded(proxy: Proxy) -> None:
    proxy.unload()
    answer = proxy.chat(model="tiny/beta", max_tokens=2)
    assert answer.json()["choices"][0]["message"]["content"] == tiny_models.answer("beta", 2)
    assert proxy.loaded()["id"] == "tiny/beta"


def test_an_unknown_model_is_not_found_and_what_is_loaded_stays(proxy: Proxy) -> None:
    proxy.load("tiny/alpha")
    answer = proxy.load("tiny/alpa")
    assert answer.status_code == 404
    assert shape(answer.json())["code"] == "model_not_found"
    assert "tiny/alpha" in shape(answer.json())["message"]
    assert proxy.loaded()["id"] == "tiny/alpha"


@pytest.mark.parametrize("path", ["/etc", "/", "../../etc", "tiny/../../alpha"])
def test_a_path_outside_the_models_folder_is_not_found(
    proxy: Proxy, path: str, models: Path
) -> None:
    assert proxy.load(path).status_code == 404
    assert proxy.load(f"{models}/{path}").status_code == 404


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"not json", "invalid_json", None),
        (b"", "invalid_json", None),
        (b"[1]", "invalid_request", None),
        (b"{}", "invalid_request", "model_id"),
        (b'{"model_id": 5}', "invalid_request", "model_id"),
        (b'{"model_id": "tiny/alpha", "enable_thinking": "yes"}', "invalid_request",
         "enable_thinking"),
        (b'{"model_id": "tiny/alpha", "ttl": "soon"}', "invalid_request", "ttl"),
        (b"\xff\xfe", "invalid_json", None),
        (b"[" * 100_000, "invalid_json", None),
    ],
)  # fmt: skip
def test_a_bad_load_request_gets_an_error_sentence_within_a_second(
    proxy: Proxy, body: bytes, code: str, param: str | None
) -> None:
    answer = requests.post(proxy.url + "/v1/models/load", data=body, timeout=1)
    assert answer.status_code == 400
    assert (shape(answer.json())["code"], shape(answer.json())["param"]) == (code, param)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"{", "invalid_json", None),
        (b'"text"', "invalid_request", None),
        (b"{}", "invalid_request", "messages"),
        (b'{"messages": "Hello"}', "invalid_request", "messages"),
        (b'{"messages": []}', "invalid_request", "messages"),
        (b'{"messages": [{"role": "user", "content": "x"}], "stream": "yes"}', "invalid_request",
         "stream"),
        (b'{"messages": [{"role": "user", "content": "x"}], "model": 7}', "invalid_request",
         "model"),
    ],
)  # fmt: skip
def test_a_bad_chat_request_names_the_field_and_the_proxy_goes_on(
    proxy: Proxy, body: bytes, code: str, param: str | None
) -> None:
    proxy.load("tiny/alpha")
    answer = requests.post(proxy.url + "/v1/chat/completions", data=body, timeout=1)
    assert answer.status_code == 400
    assert (shape(answer.json())["code"], shape(answer.json())["param"]) == (code, param)
    assert proxy.chat().ok


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/v1/models/load", 405),
        ("GET", "/v1/models/load", 405),
        ("PUT", "/health", 405),
        ("OPTIONS", "/health", 405),
        ("POST", "/", 405),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/chat/completions/x", 404),
        ("HEAD", "/nothing", 404),
        ("GET", "/v1/models/no/such", 404),
    ],
)
def test_unknown_methods_and_paths_get_the_contracts_error(
    proxy: Proxy, method: str, path: str, status: int
) -> None:
    answer = requests.request(method, proxy.url + path, timeout=5)
    assert answer.status_code == status
    if method != "HEAD":
        assert shape(answer.json())["code"] in (
            "not_found",
            "method_not_allowed",
            "model_not_found",
        )


@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions/", "/chat/completions", "/v1/completions/", "/completions"],
)
def test_a_base_url_without_v1_and_a_slash_at_the_end_work_as_well(proxy: Proxy, path: str) -> None:
    proxy.load("tiny/alpha")
    body = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "max_tokens": 3}
    answer = proxy.post(path, body)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 3
    listed = proxy.get("/models").json()
    assert listed == proxy.get("/v1/models/").json()
    assert [item["id"] for item in listed["data"]] == ["tiny/alpha", "tiny/beta"]
    assert proxy.get("/models/tiny/alpha/").json()["id"] == "tiny/alpha"


def test_every_answer_in_json_ends_its_line(proxy: Proxy) -> None:
    proxy.load("tiny/alpha")
    said = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    answers = [
        *map(proxy.get, ("/health", "/v1/models", "/v1/models/tiny/alpha", "/v1/nothing")),
        proxy.post("/v1/chat/completions", said),
        proxy.post("/v1/chat/completions", {**said, "logprobs": True}),
        proxy.post("/v1/chat/completions", {}),
        proxy.load("tiny/alpha"),
    ]
    for answer in answers:
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.content.endswith(b"}\n")
        assert answer.headers["Content-Length"] == str(len(answer.content))
        assert answer.json()


BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


def test_the_address_itself_tells_what_runs_there(proxy: Proxy) -> None:
    proxy.load("tiny/alpha")
    page = proxy.get("/", headers={"Accept": BROWSER})
    assert page.headers["Content-Type"].startswith("text/html")
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "mlxproxy is running" in page.text, "for a browser that runs no scripts"
    for link in re.findall('href="(.*?)"', page.text):
        assert proxy.get(link).ok
    text = proxy.get("/")
    assert text.headers["Content-Type"].startswith("text/plain")
    for said in ("mlxproxy is running", "2 models can be loaded", "tiny/alpha is loaded"):
        assert said in text.text
    facts = proxy.get("/", headers={"Accept": "application/json"}).json()
    assert (facts["models"], facts["loaded"]) == (2, "tiny/alpha")
    head = requests.head(proxy.url + "/", timeout=5)
    assert (head.status_code, head.content) == (200, b"")
    proxy.unload()
    assert "no model is loaded" in proxy.get("/").text


def test_a_whole_answer_is_what_the_backend_itself_would_have_sent(
    proxy: Proxy, models: Path
) -> None:
    proxy.load("tiny/alpha")
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
    for fields in (
        {},
        {"enable_thinking": True},
        {"tools": tools, "max_tokens": 80},
        {"logprobs": True, "top_logprobs": 2},
    ):
        body = {
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 30,
            **fields,
        }
        through = proxy.post("/v1/chat/completions", body).json()
        if thinking := body.pop("enable_thinking", None):
            body["chat_template_kwargs"] = {"enable_thinking": thinking}
        body["model"] = str(models / "tiny" / "alpha")
        url = f"http://127.0.0.1:{proxy.backend_port}/v1/chat/completions"
        direct = requests.post(url, json=body, timeout=30).json()
        assert (through.pop("model"), direct.pop("model")) == ("tiny/alpha", body["model"])
        for answer in (through, direct):
            for choice in answer["choices"]:  # the schema requires both, and the backend omits them
                choice.setdefault("logprobs", None)
                choice["message"].setdefault("refusal", None)
            for changing in ("id", "created"):
                del answer[changing]
            del answer["usage"]["prompt_tokens_details"]
            for call in answer["choices"][0]["message"].get("tool_calls", []):
                del call["id"]
        message = through["choices"][0]["message"]  # its reasoning has a second name here
        assert message.pop("reasoning_content", None) == message.get("reasoning")
        assert list(through) == list(direct)
        assert through == direct, fields


def test_text_completions_are_answered_like_chats(proxy: Proxy) -> None:
    proxy.load("tiny/alpha")
    body = {"prompt": "alpha0 ", "max_tokens": 3}
    whole = proxy.post("/v1/completions", body).json()
    assert whole["object"] == "text_completion"
    assert whole["choices"][0]["text"]
    streamed = proxy.post("/v1/completions", {**body, "stream": True})
    events = [line[6:] for line in streamed.iter_lines() if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
    assert text == whole["choices"][0]["text"]


def test_a_client_can_continue_an_answer_that_was_cut_off(proxy: Proxy) -> None:
    """`mlx_lm.server`, started by itself, dies of it: nothing of the prompt is left to compute."""
    proxy.load("tiny/alpha")
    pid = proxy.loaded()["pid"]

    def continued(prompt: str, tokens: int) -> dict[str, Any]:
        answer = proxy.post("/v1/completions", {"prompt": prompt, "max_tokens": tokens})
        assert answer.ok, answer.text
        return dict(answer.json())

    prompt, said = "<|im_start|><|call|>", "<tool_call>"  # (which is left out of its text)
    assert continued(prompt, 1)["choices"][0]["finish_reason"] == "length"
    rest = continued(prompt + said, 3)
    assert rest["choices"][0]["text"].startswith('{"name"')
    assert rest["usage"]["prompt_tokens_details"]["cached_tokens"] == 2  # of three
    assert proxy.loaded()["pid"] == pid


def test_a_chat_by_a_symbolic_link_follows_the_link_to_its_new_model(
    start: Callable[..., Proxy], models: Path, tmp_path: Path
) -> None:
    root = tmp_path / "models"
    root.mkdir()
    link = root / "current"
    proxy = start(root)
    for name in ("alpha", "beta"):
        link.unlink(missing_ok=True)
        link.symlink_to(models / "tiny" / name)
        assert proxy.load("current").json()["changed"] is True
        said = proxy.chat(max_tokens=3).json()["choices"][0]["message"]["content"]
        assert said == tiny_models.answer(name, 3)


def test_a_missing_models_folder_is_reported_and_found_when_it_appears(
    start: Callable[..., Proxy], models: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "Volumes" / "SSD"
    proxy = start(disk)
    assert proxy.health()["models_root_missing"] == [str(disk)]
    assert proxy.get("/v1/models").json()["data"] == []
    answer = proxy.load("tiny/alpha")
    assert answer.status_code == 503
    assert shape(answer.json())["code"] == "models_root_unavailable"
    until(lambda: str(disk) in proxy.said(), what="the warning")
    disk.parent.mkdir()
    shutil.copytree(models, disk)
    until(lambda: proxy.get("/v1/models").json()["data"], what="the models' appearance")
    assert proxy.health()["models_root_missing"] == []
    assert proxy.load("tiny/alpha").ok


@pytest.mark.parametrize("defect", ["missing", "not executable", "bad shebang"])
def test_a_broken_mlx_server_bin_is_reported_in_a_sentence(
    start: Callable[..., Proxy], models: Path, tmp_path: Path, defect: str
) -> None:
    program = tmp_path / "mlx_lm.server"
    if defect != "missing":
        program.write_text("#!/no/such/interpreter\n")
        program.chmod(0o644 if defect == "not executable" else 0o755)
    proxy = start(models, MLX_SERVER_BIN=program)
    answer = proxy.load("tiny/alpha")
    assert answer.status_code == 500
    assert shape(answer.json())["code"] == "load_failed"
    assert "MLX_SERVER_BIN" in shape(answer.json())["message"]
    assert "Traceback" not in proxy.said()
    assert proxy.health()["proxy"] == "ok"


def test_a_model_that_cannot_fit_is_refused_with_the_numbers_before_anything_is_stopped(
    start: Callable[..., Proxy], models: Path, tmp_path: Path
) -> None:
    root = tmp_path / "models"
    shutil.copytree(models, root)
    huge = root / "tiny" / "huge"
    shutil.copytree(root / "tiny" / "alpha", huge)
    weights = huge / "model.safetensors"
    size = 4 << 40  # bytes, in a file with a hole: it takes no room on the disk
    tensor = {"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}
    header = json.dumps({"model.embed_tokens.weight": tensor}).encode()
    with weights.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    proxy = start(root)
    proxy.load("tiny/alpha")
    fits = {item["id"]: item["fits"] for item in proxy.get("/v1/models").json()["data"]}
    assert fits == {"tiny/alpha": True, "tiny/beta": True, "tiny/huge": False}
    answer = proxy.load("tiny/huge")
    assert answer.status_code == 507
    assert shape(answer.json())["code"] == "insufficient_memory"
    assert shape(answer.json())["needed_bytes"] > shape(answer.json())["available_bytes"] > 0
    assert "estimate" in shape(answer.json())["message"]
    assert proxy.loaded()["id"] == "tiny/alpha"
    proxy.unload()
    chat = proxy.chat(model="tiny/huge")
    assert chat.status_code == 507
    assert shape(chat.json())["code"] == "insufficient_memory"
    assert shape(chat.json())["needed_bytes"] == shape(answer.json())["needed_bytes"]
    assert not proxy.loaded()["loaded"]
    proxy.stop()
    preloading = start(root, PRELOAD="tiny/huge")
    until(lambda: "PRELOAD: tiny/huge does not fit" in preloading.said(), what="the reason")
    assert not preloading.loaded()["loaded"]
