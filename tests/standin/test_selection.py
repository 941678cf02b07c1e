"""Which model answers, as clients see it, over a scripted stand-in for the backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import scripted_server, tiny_models
from tests.support.proxy import Proxy
from tests.support.waiting import until

CONFIG = """
PROFILES = {"coder": {"model": "alpha", "temperature": 0.2, "system": "Be brief."},
            "gone": {"model": "nothing"}}
ALIASES = {"gpt-*": "loaded", "claude-*": "coder"}
MODELS = {"tiny/*": {"max_tokens": 9, "decode_concurrency": 4}}
"""


@pytest.fixture
def serve(start: Callable[..., Proxy], tmp_path: Path) -> Callable[..., tuple[Proxy, Path]]:
    """Starts a proxy with some models and a configuration; returns it and its backend's program."""

    def starter(*names: str, config: str = "", **settings: Any) -> tuple[Proxy, Path]:
        for name in names:
            tiny_models.build(tmp_path / "models" / "tiny" / name)
        instance = tmp_path / "instance"
        instance.mkdir()
        (instance / "config.py").write_text(config)
        program = scripted_server.install(tmp_path / "standin")
        proxy = start(tmp_path / "models", instance=instance, MLX_SERVER_BIN=program, **settings)
        return proxy, program

    return starter


def asked(program: Path) -> dict[str, Any]:
    """Return the body of the last request to the backend."""
    body: dict[str, Any] = scripted_server.record(program, "request")[-1]["body"]
    return body


def test_the_only_model_answers_a_request_for_any_name(
    serve: Callable[..., tuple[Proxy, Path]],
) -> None:
    proxy, _ = serve("alpha")
    answer = proxy.chat(model="gpt-4o")
    assert answer.status_code == 200
    assert answer.json()["model"] == "tiny/alpha"
    assert proxy.unload().ok
    refused = proxy.chat(model="gpt-4o")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_model_loaded")
    assert "mlxproxy load tiny/alpha" in refused.json()["error"]["message"]


def test_of_several_models_none_is_guessed_but_each_can_be_named(
    serve: Callable[..., tuple[Proxy, Path]],
) -> None:
    proxy, _ = serve("alpha", "beta")
    refused = proxy.chat(model="any")
    assert refused.status_code == 503
    assert "tiny/alpha, tiny/beta" in refused.json()["error"]["message"]
    for name in ("tiny/beta", "alpha"):
        assert proxy.chat(model=name).json()["model"].endswith(name)
    assert proxy.chat(model="any").json()["model"] == "tiny/alpha"


def test_a_profile_is_listed_answers_under_its_name_and_fills_in_what_a_request_leaves_out(
    serve: Callable[..., tuple[Proxy, Path]],
) -> None:
    proxy, program = serve("alpha", "beta", config=CONFIG)
    listed = {item["id"]: item for item in proxy.get("/v1/models").json()["data"]}
    assert listed.keys() == {"tiny/alpha", "tiny/beta", "coder"}
    assert listed["coder"]["profile_of"] == "tiny/alpha"
    warning = "PROFILES['gone'] names 'nothing', which is not on disk"
    until(lambda: warning in proxy.said(), what="the warning")
    answer = proxy.post(
        "/v1/chat/completions",
        {"model": "claude-sonnet", "messages": [{"role": "user", "content": "Hello!"}]},
    )
    assert answer.json()["model"] == "coder"
    body = asked(program)
    assert (body["temperature"], body["max_tokens"]) == (0.2, 9)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    settings = proxy.get("/v1/models/coder").json()["settings"]
    assert settings["requests"] == {"max_tokens": 9, "temperature": 0.2, "system": "Be brief."}
    (started,) = scripted_server.record(program, "started")
    assert started["argv"][started["argv"].index("--decode-concurrency") + 1] == "4"


def test_a_load_that_does_not_say_gets_what_is_set_for_the_model(
    serve: Callable[..., tuple[Proxy, Path]],
) -> None:
    config = 'MODELS = {"tiny/*": {"enable_thinking": True, "ttl": "30m", "pin": True}}'
    proxy, _ = serve("alpha", config=config)
    loaded = proxy.load("tiny/alpha").json()
    assert (loaded["enable_thinking"], loaded["ttl"], loaded["pin"]) == (True, 1800.0, True)
    said = proxy.load("tiny/alpha", enable_thinking=False, ttl=60, pin=False).json()
    assert (said["enable_thinking"], said["ttl"], said["pin"]) == (False, 60.0, False)


def test_names_in_a_circle_stop_the_start_with_the_names(
    tmp_path: Path, serve: Callable[..., tuple[Proxy, Path]]
) -> None:
    with pytest.raises(pytest.fail.Exception, match="in a circle: a → b → a"):
        serve("alpha", config='ALIASES = {"a": "b", "b": "a"}')


def test_an_answer_of_another_model_has_neither_the_name_nor_the_defaults_of_the_profile(
    serve: Callable[..., tuple[Proxy, Path]],
) -> None:
    proxy, program = serve("alpha", "beta", config=CONFIG, MODEL_SELECTION="loaded")
    proxy.load("beta")
    for stream in (False, True):
        answer = proxy.chat(model="coder", stream=stream)
        assert '"tiny/beta"' in answer.text
        assert "coder" not in answer.text
        assert "temperature" not in asked(program)
    proxy.load("alpha")
    assert proxy.chat(model="coder").json()["model"] == "coder"
    assert asked(program)["temperature"] == 0.2


def test_a_request_gets_the_sampling_of_its_model_below_the_settings_and_its_own(
    serve: Callable[..., tuple[Proxy, Path]], tmp_path: Path
) -> None:
    config = 'MODELS = {"tiny/alpha": {"top_p": 0.5}}'
    proxy, program = serve("alpha", config=config)
    file = tmp_path / "models" / "tiny" / "alpha" / "generation_config.json"
    recommended = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05}
    file.write_text(json.dumps({**recommended, "min_p": 7, "eos_token_id": 1}))
    shown = proxy.get("/v1/models/tiny/alpha").json()
    assert shown["sampling"] == recommended
    assert shown["settings"]["requests"] == {**recommended, "top_p": 0.5}
    assert proxy.chat(model="tiny/alpha", temperature=0.1).ok
    sent = asked(program)
    assert {name: sent[name] for name in recommended} == {
        **recommended,
        "top_p": 0.5,
        "temperature": 0.1,
    }
    assert "min_p" not in sent
    proxy.stop()
    proxy.environment["MLXPROXY_SAMPLING_DEFAULTS"] = "greedy"
    proxy.start()
    assert proxy.chat(model="tiny/alpha").ok
    assert "temperature" not in asked(program)
    assert asked(program)["top_p"] == 0.5
