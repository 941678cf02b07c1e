"""Several models at once, as clients see them, over a scripted stand-in for the backend."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.conftest import Proxy, until
from tests.support import scripted_server, tiny_models
from tests.support.following import Following
from tests.support.pty import environment

Start = Callable[..., Proxy]
NAMES = ("alpha", "beta", "gamma")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models; only their files are looked at."""
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        tiny_models.build(root / "tiny" / name)
    return root


@pytest.fixture
def several(start: Start, models: Path, tmp_path: Path) -> Callable[..., Proxy]:
    """Starts a proxy that may have two models at once."""

    def starter(script: dict[str, Any] | None = None, **settings: Any) -> Proxy:
        program = scripted_server.install(tmp_path / "standin", **(script or {}))
        return start(models, **{"MLX_SERVER_BIN": program, "MAX_LOADED": 2, **settings})

    return starter


def answering(proxy: Proxy, name: str) -> str:
    """The model that answers a request with that name, as its text says."""
    answer = proxy.chat(model=name)
    assert answer.ok, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text.split()[0].rstrip("0123456789")


@pytest.mark.parametrize("selection", ["loaded", "requested"])
def test_each_name_reaches_its_model_and_any_other_the_one_that_a_load_named_last(
    several: Callable[..., Proxy], selection: str
) -> None:
    proxy = several(MODEL_SELECTION=selection)
    for name in ("tiny/alpha", "tiny/beta"):
        assert proxy.load(name).ok
    asked = ("tiny/alpha", "tiny/beta", "gpt-4")
    assert [answering(proxy, name) for name in asked] == ["alpha", "beta", "beta"]
    assert proxy.load("tiny/alpha").json()["changed"] is False
    assert [answering(proxy, name) for name in asked] == ["alpha", "beta", "alpha"]


def test_a_model_that_a_request_names_is_loaded_beside_the_one_that_is_there(
    several: Callable[..., Proxy],
) -> None:
    proxy = several(MODEL_SELECTION="requested")
    proxy.load("tiny/alpha")
    assert answering(proxy, "tiny/beta") == "beta"
    assert answering(proxy, "gpt-4") == "alpha"
    assert len(proxy.children()) == 2


def test_the_old_model_answers_on_while_the_new_one_loads(several: Callable[..., Proxy]) -> None:
    proxy = several({"models": {"beta": {"load_seconds": 3.0}}})
    proxy.load("tiny/alpha")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        load = pool.submit(proxy.load, "tiny/beta")
        until(lambda: proxy.health()["transition"], what="the load")
        begun = time.monotonic()
        assert answering(proxy, "gpt-4") == "alpha"
        assert time.monotonic() - begun < 2
        states = [model["state"] for model in proxy.loaded()["models"]]
        assert states == ["ready", "loading"]
        assert not load.done()
        assert load.result().ok


def test_what_is_loaded_is_told_for_the_main_model_and_for_each(
    several: Callable[..., Proxy], models: Path
) -> None:
    proxy = several(IDLE_TTL=600)
    assert proxy.loaded()["models"] == proxy.health()["models"] == []
    proxy.load("tiny/alpha", ttl=100, pin=True)
    proxy.load("tiny/beta")
    loaded = proxy.loaded()
    assert (loaded["id"], loaded["model_id"]) == ("tiny/beta", str(models / "tiny" / "beta"))
    alpha, beta = loaded["models"]
    assert (alpha["id"], beta["id"]) == ("tiny/alpha", "tiny/beta")
    assert [each["port"] for each in (alpha, beta)] == [proxy.backend_port, proxy.backend_port + 1]
    assert {alpha["pid"], beta["pid"]} == {child.pid for child in proxy.children()}
    assert (alpha["pinned"], beta["pinned"]) == (True, False)
    assert (alpha["options"]["ttl"], alpha["options"]["pin"]) == (100, True)
    assert 90 < alpha["idle_unload_in"] <= 100 < beta["idle_unload_in"] <= 600
    assert alpha["in_flight"] == alpha["waiting"] == 0
    assert loaded["loaded_at"] == beta["loaded_at"] > alpha["loaded_at"] > time.time() - 60
    assert alpha["last_used_at"] > time.time() - 60
    until(lambda: proxy.loaded()["models"][0]["memory_bytes"], what="a look at the memory")
    assert [each["id"] for each in proxy.health()["models"]] == ["tiny/alpha", "tiny/beta"]
    listed = proxy.get("/v1/models").json()["data"]
    assert [each["loaded"] for each in listed] == [True, True, False]
    assert [each["state"] for each in listed] == ["loaded", "loaded", "not-loaded"]


def test_an_unload_takes_the_model_that_it_names_else_the_main_one(
    several: Callable[..., Proxy],
) -> None:
    proxy = several()
    proxy.load("tiny/alpha")
    proxy.load("tiny/beta")

    def unload(body: Any) -> requests.Response:
        return proxy.post("/v1/models/unload", body)

    assert unload({"model_id": "tiny/gamma"}).json() == {"status": "already_unloaded"}
    missing = unload({"model_id": "tiny/none"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    wrong = unload({"model_id": 7})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "model_id")
    assert unload({"model_id": "alpha"}).json() == {"status": "unloaded"}
    assert [each["id"] for each in proxy.loaded()["models"]] == ["tiny/beta"]
    proxy.load("tiny/alpha")
    assert unload(None).json() == {"status": "unloaded"}
    assert proxy.loaded()["id"] == "tiny/beta"
    assert unload({}).json() == {"status": "unloaded"}
    assert proxy.loaded() == {**proxy.loaded(), "loaded": False, "models": []}
    assert unload({}).json() == {"status": "already_unloaded"}


def test_a_profile_and_an_alias_are_loaded_shown_and_unloaded_by_their_names(
    several: Callable[..., Proxy], tmp_path: Path
) -> None:
    instance = tmp_path / "instance"
    instance.mkdir()
    (instance / "config.py").write_text(
        'PROFILES = {"coder": {"model": "alpha"}}\nALIASES = {"gpt-*": "coder", "small": "beta"}\n'
    )
    proxy = several(instance=instance)
    for name, model in (("coder", "alpha"), ("gpt-4", "alpha"), ("small", "beta")):
        assert proxy.load(name).json()["id"] == f"tiny/{model}"
        assert proxy.get(f"/v1/models/{name}").json()["loaded"] is True
        assert proxy.get(f"/api/v0/models/{name}").ok
        assert proxy.post("/api/show", {"model": name}).ok
        assert proxy.post("/v1/models/unload", {"model_id": name}).json() == {"status": "unloaded"}
        assert proxy.children() == []


def test_a_pin_that_leaves_no_place_is_told_with_the_way_out(
    several: Callable[..., Proxy],
) -> None:
    proxy = several()
    assert proxy.load("tiny/alpha", pin=True).json()["pin"] is True
    assert proxy.load("tiny/beta", pin=True).ok
    refused = proxy.load("tiny/gamma")
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (507, "insufficient_memory")
    assert error["pinned"] == ["tiny/alpha", "tiny/beta"]
    assert '"pin": false' in error["message"]
    assert proxy.load("tiny/alpha", pin=False).ok
    assert proxy.load("tiny/gamma").ok
    assert [each["id"] for each in proxy.loaded()["models"]] == ["tiny/gamma", "tiny/beta"]
    assert proxy.load("tiny/gamma", pin="yes").json()["error"]["param"] == "pin"


def test_a_budget_smaller_than_any_model_is_told_with_the_numbers(
    several: Callable[..., Proxy],
) -> None:
    proxy = several(MEMORY_BUDGET="1K")
    refused = proxy.load("tiny/alpha")
    assert refused.status_code == 507
    assert refused.json()["error"]["available_bytes"] == 1024
    assert proxy.load("tiny/alpha", force=True).ok
    listed = proxy.get("/v1/models").json()["data"]
    assert not any(each["fits"] for each in listed)


def test_a_model_that_only_fits_without_its_draft_model_does_not_fit(
    several: Callable[..., Proxy], tmp_path: Path
) -> None:
    instance = tmp_path / "instance"
    instance.mkdir()
    (instance / "config.py").write_text('MODELS = {"tiny/alpha": {"draft_model": "tiny/beta"}}\n')
    proxy = several(instance=instance)
    needed = {each["id"]: each["memory_bytes"] for each in proxy.get("/v1/models").json()["data"]}
    proxy.stop()
    both = needed["tiny/alpha"] + needed["tiny/beta"]
    proxy.environment["MLXPROXY_MEMORY_BUDGET"] = str(both - 1)
    proxy.start()
    fits = {each["id"]: each["fits"] for each in proxy.get("/v1/models").json()["data"]}
    assert fits == {"tiny/alpha": False, "tiny/beta": True, "tiny/gamma": True}
    refused = proxy.load("tiny/alpha")
    assert refused.status_code == 507
    assert refused.json()["error"]["needed_bytes"] == both
    assert proxy.load("tiny/gamma").ok


def test_events_and_figures_name_the_model(several: Callable[..., Proxy]) -> None:
    proxy = several()
    proxy.load("tiny/alpha")
    proxy.load("tiny/beta")
    events = Following(proxy, "/v1/events")
    try:
        snapshot = events.until("snapshot")
        assert [each["id"] for each in snapshot["models"]] == ["tiny/alpha", "tiny/beta"]
        for name in ("tiny/alpha", "tiny/beta"):
            answering(proxy, name)
        psutil.Process(snapshot["models"][0]["pid"]).kill()
        assert events.until("death", id="tiny/alpha")["slot"] == 0
    finally:
        events.close()
    figures = proxy.get("/metrics").text
    for name in ("tiny/alpha", "tiny/beta"):
        assert f'mlxproxy_tokens_out_total{{model="{name}"}} 8.0' in figures
    assert 'mlxproxy_deaths_total{model="tiny/alpha"} 1.0' in figures
    assert 'mlxproxy_in_flight{model="tiny/beta"} 0.0' in figures


def test_a_crash_of_one_model_cuts_no_answer_of_another(several: Callable[..., Proxy]) -> None:
    proxy = several({"events": 40, "interval": 0.02})
    proxy.load("tiny/alpha")
    proxy.load("tiny/beta")
    pids = {each["id"]: each["pid"] for each in proxy.loaded()["models"]}
    with proxy.chat(model="tiny/beta", stream=True, max_tokens=100) as stream:
        lines = stream.iter_lines()
        next(lines)
        psutil.Process(pids["tiny/alpha"]).kill()
        assert list(lines)[-2:] == [b"data: [DONE]", b""]
    assert answering(proxy, "tiny/alpha") == "alpha"  # brought back
    assert answering(proxy, "tiny/beta") == "beta"


@pytest.fixture
def low_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies that are started now see a machine whose memory runs out."""
    folder = tmp_path / "low"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "from mlxproxy.backend import memory\n"
        "memory.shortage = lambda: 'only 0.1 GB of memory are left'\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


@pytest.mark.usefixtures("low_memory")
def test_a_crash_for_want_of_memory_is_named_as_such(
    several: Callable[..., Proxy],
) -> None:
    proxy = several(MAX_LOADED=1)
    proxy.load("tiny/alpha")
    (backend,) = proxy.children()
    backend.send_signal(signal.SIGKILL)
    until(lambda: proxy.health()["last_failure"], what="the notice of its end")
    reason = proxy.health()["last_failure"]["reason"]
    assert "it was killed by SIGKILL, most likely because memory ran out" in reason


@pytest.mark.usefixtures("low_memory")
def test_where_memory_runs_out_the_longest_unused_model_goes(
    several: Callable[..., Proxy],
) -> None:
    proxy = several(MODEL_SELECTION="requested")
    proxy.load("tiny/alpha", pin=True)
    proxy.load("tiny/beta")
    until(
        lambda: [each["id"] for each in proxy.loaded()["models"]] == ["tiny/alpha"],
        what="the unload",
    )
    assert len(proxy.children()) == 1
    assert answering(proxy, "tiny/beta") == "beta"  # it comes back when somebody asks for it


def run(proxy: Proxy, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command, run as its user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "mlxproxy", *arguments],
        env=environment(proxy.instance.parent, proxy.url),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_commands_know_of_all_models(several: Callable[..., Proxy]) -> None:
    proxy = several()
    assert run(proxy, "load", "alpha", "--pin").returncode == 0
    assert run(proxy, "load", "beta").returncode == 0
    listed = run(proxy, "ps").stdout
    assert listed.index("tiny/alpha") < listed.index("pinned") < listed.index("tiny/beta")
    assert listed.count("pinned") == 1
    assert run(proxy, "unload", "gamma").stdout == "gamma was not loaded.\n"
    assert run(proxy, "load", "beta", "--pin").returncode == 0
    refused = run(proxy, "load", "gamma")
    assert refused.returncode == 1
    assert "load it without `--pin` (`mlxproxy load`)" in refused.stderr
    assert run(proxy, "unload", "alpha").stdout == "Unloaded alpha.\n"
    assert run(proxy, "unload").stdout == "Unloaded tiny/beta.\n"
    assert proxy.children() == []


def test_the_speed_of_each_model_is_told(several: Callable[..., Proxy]) -> None:
    proxy = several({"interval": 0.01})
    proxy.load("tiny/alpha")
    proxy.load("tiny/beta")
    answering(proxy, "tiny/alpha")
    alpha, beta = proxy.get("/v1/events?follow=false").json()["models"]
    assert alpha["tokens_per_second"]["last"] > 0
    assert beta["tokens_per_second"] == {"now": None, "last": None}
    assert alpha["memory_bytes"] > 1_000_000


def test_models_beside_each_other_answer_many_streams_at_once_and_none_is_lost(
    several: Callable[..., Proxy],
) -> None:
    proxy = several({"events": 20, "interval": 0.02}, MAX_LOADED=3)
    for name in NAMES:
        assert proxy.load(f"tiny/{name}").ok

    def stream(number: int) -> str:
        name = NAMES[number % 3]
        with proxy.chat(model=f"tiny/{name}", stream=True, max_tokens=100) as answer:
            text = answer.text
        assert text.endswith("data: [DONE]\n\n"), text
        assert f"{name}19 " in text
        return name

    with concurrent.futures.ThreadPoolExecutor(60) as pool:
        answered = list(pool.map(stream, range(60)))
    assert len(answered) == 60
    assert len(proxy.children()) == 3
