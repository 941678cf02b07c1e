"""A swap is quick: the process of the next load waits with everything imported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlxproxy.backend.ports import is_free
from mlxproxy.backend.processes import lives
from mlxproxy.engines.mlx_lm.inside.standby import FLAG
from tests.support import tiny_models
from tests.support.proxy import Proxy
from tests.support.server_process import SERVER_BIN
from tests.support.waiting import until

DEFECTS = tiny_models.DEFECTS
Start = Callable[..., Proxy]


def standby_of(proxy: Proxy) -> dict[str, Any] | None:
    found: dict[str, Any] | None = proxy.loaded()["standby"]
    return found


def ready(proxy: Proxy) -> int:
    """Wait for a standby that is ready, and return its pid."""
    until(lambda: (standby_of(proxy) or {}).get("ready"), 30, "a standby")
    found = standby_of(proxy)
    assert found is not None
    return int(found["pid"])


def waiting_processes(proxy: Proxy) -> list[psutil.Process]:
    """Return the processes that were started as standbys."""
    return [child for child in proxy.children() if FLAG in child.cmdline()]


@pytest.fixture
def loaded(start: Start, models: Path) -> Proxy:
    """A proxy with a model, and a standby that is ready."""
    proxy = start(models, STANDBY=True)
    assert proxy.load("tiny/alpha").ok
    ready(proxy)
    return proxy


def words(proxy: Proxy) -> str:
    answer = proxy.chat(max_tokens=4).json()
    return str(answer["choices"][0]["message"]["content"])


# -- the way it should go


def test_each_swap_uses_the_process_that_waited(loaded: Proxy) -> None:
    for number, name in enumerate(("beta", "alpha", "beta")):
        waiting = ready(loaded)
        (stood,) = (each for each in loaded.children() if each.pid == waiting)
        assert loaded.load(f"tiny/{name}").ok, number
        assert loaded.loaded()["pid"] == waiting
        assert words(loaded).startswith(f"{name}0 {name}1")
        assert os.getsid(stood.pid) == stood.pid, "a stop reaches all of its session"


def test_a_backend_that_waited_is_like_any_other(
    start: Start, models: Path, tmp_path: Path
) -> None:
    """Its log and what stays out of that, what its features do, its options, its memory."""
    root = tmp_path / "models"
    shutil.copytree(models, root)
    tiny_models.build(root / "tiny" / "short", says="short", max_context=300)
    proxy = start(root, STANDBY=True)
    proxy.load("tiny/alpha")
    waiting = ready(proxy)
    log = proxy.instance / "logs" / "backend.log"
    before = log.read_text()
    assert proxy.load("tiny/short").ok
    assert proxy.loaded()["pid"] == waiting
    until(lambda: "Starting httpd" in log.read_text()[len(before) :], what="its log")
    error = proxy.chat("secret " * 400).json()["error"]
    assert error["code"] == "context_length_exceeded"
    answer = proxy.chat("secret", stop=["t2 "], max_tokens=8).json()["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == ("short0 short1 shor", "stop")
    assert "secret" not in log.read_text()

    def memory() -> int:
        return proxy.loaded()["models"][0]["memory_bytes"] or 0

    until(lambda: memory() > 50_000_000, what="its memory")


def test_while_answers_are_generated_none_is_started(start: Start, tmp_path: Path) -> None:
    slow = tiny_models.build_slow(tmp_path / "models" / "tiny" / "slow", says="slow")
    proxy = start(slow.parent.parent, STANDBY=True)
    with proxy.chat(model="tiny/slow", stream=True, max_tokens=100) as stream:
        assert b"[DONE]" in stream.content
        # The load and the answer took seconds, in which the proxy was never idle.
        assert waiting_processes(proxy) == []
    ready(proxy)


def test_it_is_not_there_if_the_user_does_not_want_it(start: Start, models: Path) -> None:
    proxy = start(models, STANDBY=False)
    proxy.load("tiny/alpha")
    threading.Event().wait(3)  # it would be there after two looks
    assert standby_of(proxy) is None
    assert len(proxy.children()) == 1


def test_a_program_that_is_wrapped_has_none_and_loads(
    start: Start, models: Path, tmp_path: Path
) -> None:
    wrapper = tmp_path / "wrapped"
    wrapper.write_text(f'#!/bin/sh\nexec "{SERVER_BIN}" "$@"\n')
    wrapper.chmod(0o755)
    proxy = start(models, STANDBY=True, MLX_SERVER_BIN=wrapper)
    assert proxy.load("tiny/alpha").ok
    threading.Event().wait(3)
    assert standby_of(proxy) is None
    assert proxy.load("tiny/beta").ok


# -- whatever is wrong with it


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_swap_goes_on_without_a_standby_that_is_gone_or_stands_still(
    loaded: Proxy, how: signal.Signals
) -> None:
    lost = psutil.Process(ready(loaded))
    lost.send_signal(how)
    assert loaded.load("tiny/beta").ok
    assert loaded.loaded()["pid"] != lost.pid
    assert words(loaded).startswith("beta0")
    assert not lives(lost)
    assert ready(loaded) != lost.pid
    assert loaded.health()["last_failure"] is None


def test_an_upgrade_of_mlx_lm_throws_it_away(start: Start, models: Path, tmp_path: Path) -> None:
    """The standby has imported the old one, and would mix the two."""
    program = own_installation(tmp_path / "venv")
    proxy = start(models, STANDBY=True, MLX_SERVER_BIN=program)
    proxy.load("tiny/alpha")
    old = psutil.Process(ready(proxy))
    (version,) = program.parent.parent.glob("lib/python3*/site-packages/mlx_lm/_version.py")
    os.utime(version)
    until(lambda: not lives(old), what="its end")
    assert proxy.load("tiny/beta").ok
    assert proxy.loaded()["pid"] != old.pid
    assert ready(proxy) != old.pid


def own_installation(folder: Path) -> Path:
    """Return an `mlx_lm.server` that looks installed in a folder of the test."""
    program = folder / "bin" / SERVER_BIN.name
    program.parent.mkdir(parents=True)
    shutil.copy(SERVER_BIN, program)
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    package = folder / "lib" / name / "site-packages" / "mlx_lm"
    package.mkdir(parents=True)
    (source,) = SERVER_BIN.parent.parent.glob("lib/python3*/site-packages/mlx_lm")
    for each in source.iterdir():
        if each.name == "_version.py":
            shutil.copy(each, package)
        else:
            (package / each.name).symlink_to(each)
    return program


def unknown_tokenizer(folder: Path) -> None:
    """Make the tokenizer look sound to those who only read the file."""
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"type": "BPE"', '"type": "Nonesuch"'))
    assert "Nonesuch" in file.read_text()


@pytest.mark.parametrize(
    "damage",
    [
        DEFECTS["shape_mismatch"],
        DEFECTS["raising_template"],
        unknown_tokenizer,
    ],
    ids=["weights", "template", "tokenizer"],
)
def test_a_load_that_fails_in_it_says_the_same_as_without(
    start: Start, models: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    root = tmp_path / "models"
    shutil.copytree(models, root)
    damage(tiny_models.build(root / "tiny" / "broken"))
    proxy = start(root, STANDBY=True)
    cold = proxy.load("tiny/broken")
    proxy.load("tiny/alpha")
    waiting = psutil.Process(ready(proxy))
    warm = proxy.load("tiny/broken")
    assert not lives(waiting), "it was used"
    assert (warm.status_code, cold.status_code) == (500, 500)
    errors = [answer.json()["error"] for answer in (cold, warm)]
    assert errors[0]["message"] == errors[1]["message"]
    assert all(error["log"] for error in errors), "how many lines, is a matter of time"
    assert proxy.children() == []
    assert is_free(proxy.backend_port)
    assert proxy.load("tiny/alpha").ok
    ready(proxy)


def test_a_crash_of_a_backend_that_waited_is_noticed_and_repaired(loaded: Proxy) -> None:
    waiting = ready(loaded)
    loaded.load("tiny/beta")
    psutil.Process(waiting).kill()
    until(lambda: loaded.health()["last_failure"], what="the crash")
    assert "SIGKILL" in loaded.health()["last_failure"]["reason"]
    assert words(loaded).startswith("beta0")


# -- the end


def gone(processes: list[psutil.Process]) -> bool:
    return not any(lives(process) for process in processes)


def test_one_signal_stops_it_too(loaded: Proxy) -> None:
    family = loaded.children()
    assert len(family) == 2
    assert loaded.stop() == 0
    assert gone(family)
    assert not list(loaded.instance.glob("*-*.json"))


@pytest.mark.parametrize("after", [0.0, 0.05, 0.15])
def test_a_stop_during_a_hand_over_leaves_nothing(loaded: Proxy, after: float) -> None:
    swap = threading.Thread(
        target=lambda: loaded.post("/v1/models/load", {"model_id": "tiny/beta"})
    )
    family = loaded.children()
    swap.start()
    threading.Event().wait(after)
    family += loaded.children()
    assert loaded.stop() == 0
    swap.join(30)
    assert gone(family)
    assert is_free(loaded.backend_port)
    assert "Traceback" not in loaded.said()


def test_it_does_not_outlive_a_proxy_that_is_killed(loaded: Proxy) -> None:
    waiting = psutil.Process(ready(loaded))
    (backend,) = (each for each in loaded.children() if each != waiting)
    loaded.stop(signal.SIGKILL)
    until(lambda: not lives(waiting), what="its end")
    assert lives(backend), "mlx_lm.server does not notice"
    backend.kill()


@pytest.mark.parametrize("frozen", [False, True])
def test_after_a_kill_of_the_proxy_the_next_start_leaves_no_process_of_it(
    start: Start, loaded: Proxy, models: Path, frozen: bool
) -> None:
    """Neither a backend that was a standby once, nor a standby that cannot notice the kill."""
    loaded.load("tiny/beta")
    if frozen:
        psutil.Process(ready(loaded)).suspend()
    family = loaded.children()
    loaded.stop(signal.SIGKILL)
    again = start(
        models,
        instance=loaded.instance,
        MLX_BACKEND_PORT=loaded.backend_port,
        PROXY_PORT=loaded.port,
    )
    assert gone(family)
    assert again.load("tiny/alpha").ok


@pytest.mark.parametrize("record", ["standby", "backend"])
def test_its_record_alone_leads_to_it(loaded: Proxy, record: str) -> None:
    """Where the system does not show the environment of a process."""
    from mlxproxy.backend.orphan import Record

    if record == "backend":
        loaded.load("tiny/beta")
    path = loaded.instance / f"{record}-{loaded.backend_port}.json"
    found = Record.read(path)
    pid = loaded.loaded()["pid"] if record == "backend" else ready(loaded)
    process = found.process()
    assert process is not None
    assert process.pid == pid
    assert found.is_of(process)
    assert json.loads(path.read_text())["first_port"] == loaded.backend_port
