"""The instance folder and the processes around the proxy, in whatever state they are found.

Files that are damaged or replaced, a full disk, a deleted lock, a wrapper that lets its child go, a
terminal that nobody reads: the proxy starts, serves and stops, and never ends what is not its own.
"""

from __future__ import annotations

import os
import pty
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from mlxproxy.backend import processes
from mlxproxy.backend.orphan import ChildRecord, Orphans
from mlxproxy.backend.ports import is_free
from mlxproxy.backend.processes import MARK, lives
from tests.support import scripted_server
from tests.support.damaged_files import DAMAGES, FILES, LOGS, damaged
from tests.support.ports import free_port
from tests.support.proxy import Proxy
from tests.support.waiting import until

Start = Callable[..., Proxy]


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Path]:
    """The stand-in; none of its processes outlives the test, however that ends."""
    program = scripted_server.install(tmp_path / "standin")
    yield program
    for pid in running(program):
        psutil.Process(pid).kill()


def refused(proxy: Proxy, **more: str) -> str:
    """What a start says that must not succeed: one sentence, in a few seconds."""
    done = subprocess.run(
        [sys.executable, "-m", "mlxproxy", "serve"],
        env={**proxy.environment, **more},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    return sentence


# -- damaged files


@pytest.mark.parametrize("kind", [*list(DAMAGES)[:6], "deep", "binary", "wrong types 0"])
def test_with_all_files_damaged_the_proxy_starts_serves_and_stops(
    start: Start, tmp_path: Path, models: Path, program: Path, kind: str
) -> None:
    port = free_port()
    for name in (*FILES, *LOGS):
        damaged(tmp_path / "instance" / name.format(port), kind)
    proxy = start(
        models,
        instance=tmp_path / "instance",
        MLX_BACKEND_PORT=port,
        MLX_SERVER_BIN=program,
        PRELOAD="last",
    )
    assert proxy.health()["proxy"] == "ok"
    until(lambda: len(proxy.get("/v1/models").json()["data"]) == 2, what="the library")
    assert proxy.load("tiny/alpha").ok
    assert proxy.chat().ok
    for source in ("proxy", "backend"):
        assert proxy.get(f"/v1/logs?source={source}", timeout=5).status_code == 200
        with proxy.get(f"/v1/logs?source={source}&follow=true", stream=True, timeout=5) as answer:
            assert answer.status_code == 200
    assert proxy.stop() == 0
    assert "Traceback" not in proxy.said()


@pytest.mark.parametrize(
    "kind", ["a fifo", "a device", "a link to itself", "a directory", "binary"]
)
def test_a_settings_or_key_file_that_cannot_be_read_is_reported_in_a_sentence(
    tmp_path: Path, models: Path, kind: str
) -> None:
    proxy = Proxy(tmp_path / "instance", models)
    config = damaged(tmp_path / "instance" / "config.py", kind)
    assert str(config) in refused(proxy)
    config.rename(tmp_path / "aside")
    keys = damaged(tmp_path / "keys", kind)
    assert str(keys) in refused(proxy, MLXPROXY_API_KEY_FILE=str(keys))


def test_a_folder_in_place_of_the_lock_is_reported_in_a_sentence(
    tmp_path: Path, models: Path
) -> None:
    proxy = Proxy(tmp_path / "instance", models)
    lock = tmp_path / "instance" / f"backend-{proxy.backend_port}.lock"
    lock.mkdir(parents=True)
    assert str(lock) in refused(proxy)


# -- a full disk


def disk_is_full(proxy: Proxy, full: bool) -> None:
    """Lets the proxy write no byte to any file, or as many as it likes."""
    assert proxy.process is not None
    _, hard = resource.prlimit(proxy.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(proxy.process.pid, resource.RLIMIT_FSIZE, (0 if full else hard, hard))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux's")
def test_on_a_full_disk_no_backend_is_started_that_could_not_be_found_again(
    start: Start, models: Path, program: Path
) -> None:
    proxy = start(models, MLX_SERVER_BIN=program)
    disk_is_full(proxy, True)
    answer = proxy.load("tiny/alpha")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (500, "load_failed")
    assert "instance folder" in error["message"]
    assert str(proxy.instance) not in error["message"]
    assert not scripted_server.record(program)
    assert "instance folder" in proxy.health()["last_failure"]["reason"]
    disk_is_full(proxy, False)
    assert proxy.load("tiny/alpha").ok


@pytest.mark.parametrize("kept", ["nothing", "the lock", "all"])
def test_an_orphan_is_found_by_its_environment_whatever_was_recorded(
    start: Start, models: Path, program: Path, kept: str
) -> None:
    first = start(models, MLX_SERVER_BIN=program)
    first.load("tiny/alpha")
    (orphan,) = first.children()
    first.stop(signal.SIGKILL)
    for file in first.instance.glob("*.json"):
        if kept != "all":
            file.unlink()
    if kept == "nothing":
        for file in first.instance.glob("*.lock"):
            file.unlink()
    second = start(
        models,
        instance=first.instance,
        MLX_SERVER_BIN=program,
        MLX_BACKEND_PORT=first.backend_port,
    )
    assert not lives(orphan)
    assert second.load("tiny/beta").ok


# -- several slots


def two_orphans(start: Start, models: Path, program: Path) -> tuple[Proxy, list[psutil.Process]]:
    """A killed proxy that had two models, and its backends."""
    first = start(models, MLX_SERVER_BIN=program, MAX_LOADED=2)
    assert first.load("tiny/alpha").ok
    assert first.load("tiny/beta").ok
    orphans = first.children()
    assert len(orphans) == 2
    first.stop(signal.SIGKILL)
    assert all(map(lives, orphans))
    return first, orphans


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("kept", ["nothing", "all"])
def test_the_orphans_of_two_slots_are_found_whatever_is_left_of_them(
    start: Start, models: Path, program: Path, kept: str, slots: int
) -> None:
    first, orphans = two_orphans(start, models, program)
    for file in first.instance.glob("backend-*.json"):
        if kept == "nothing":
            file.unlink()
    second = start(
        models,
        instance=first.instance,
        MLX_SERVER_BIN=program,
        MLX_BACKEND_PORT=first.backend_port,
        MAX_LOADED=slots,
    )
    assert not any(map(lives, orphans))
    assert second.load("tiny/beta").ok
    assert list(second.instance.glob("backend-*.json")) == [
        second.instance / f"backend-{first.backend_port}.json"
    ]


def test_each_slots_orphan_is_found_by_its_record_alone(tmp_path: Path) -> None:
    """As where the system shows no environment."""
    command = ["sleep", "60"]
    with subprocess.Popen(command) as one, subprocess.Popen(command) as two:
        try:
            for slot, process in enumerate((one, two)):
                ChildRecord(tmp_path, 7000, slot).started(command, process.pid)
            pids = [one.pid, two.pid]
            found = {
                ports: [each.pid for each in Orphans(tmp_path, ports).find()]
                for ports in (range(7000, 7001), range(7000, 7002), range(7001, 7003))
            }
            assert sorted(found[range(7000, 7001)]) == sorted(pids)  # it may have had more slots
            assert sorted(found[range(7000, 7002)]) == sorted(pids)
            assert found[range(7001, 7003)] == [two.pid]
            assert Orphans(tmp_path, range(7002, 7009)).find() == []
            assert Orphans(tmp_path / "other", range(7000, 7002)).find() == []
        finally:
            one.kill()
            two.kill()


def test_a_swap_in_one_slot_leaves_the_other_slots_process_alone(
    start: Start, models: Path, program: Path
) -> None:
    proxy = start(models, MLX_SERVER_BIN=program, MAX_LOADED=2)
    assert proxy.load("tiny/alpha").ok
    (alpha,) = proxy.children()
    assert proxy.load("tiny/beta").ok
    assert proxy.load("tiny/beta", enable_thinking=True).ok
    started = scripted_server.record(program, "started")
    ports = [entry["argv"][entry["argv"].index("--port") + 1] for entry in started]
    first = proxy.backend_port
    assert ports[:2] == [str(first), str(first + 1)]
    assert lives(alpha) == (ports[2] == str(first + 1))
    for port in (first, first + 1):
        assert proxy.get(f"/v1/logs?source=backend&port={port}").ok
    wrong = proxy.get(f"/v1/logs?source=backend&port={first + 2}")
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "port")
    assert proxy.stop() == 0
    assert running(program) == []
    names = sorted(path.name for path in (proxy.instance / "logs").glob("backend*.log"))
    assert names == [f"backend-{first + 1}.log", "backend.log"]


# -- two proxies


@pytest.mark.parametrize("deleted", ["*.lock", "*.json", "*"])
def test_deleting_the_files_of_a_running_proxy_lets_no_second_one_start(
    start: Start, models: Path, program: Path, deleted: str
) -> None:
    first = start(models, MLX_SERVER_BIN=program)
    assert first.process is not None
    first.load("tiny/alpha")
    (backend,) = first.children()
    for file in first.instance.glob(deleted):
        if file.is_file():
            file.unlink()
    sentence = refused(first, MLXPROXY_PROXY_PORT=str(free_port()))
    assert str(first.process.pid) in sentence or deleted == "*.json"
    assert lives(backend)
    assert first.chat().ok


def test_the_record_of_a_proxy_without_a_backend_lets_no_second_one_start(
    start: Start, models: Path, program: Path
) -> None:
    first = start(models, MLX_SERVER_BIN=program)
    assert first.process is not None
    (first.instance / f"backend-{first.backend_port}.lock").unlink()
    assert str(first.process.pid) in refused(first, MLXPROXY_PROXY_PORT=str(free_port()))


def test_a_process_marked_for_another_folder_or_port_is_no_orphan(tmp_path: Path) -> None:
    marks = (f"1:2:{tmp_path}", f"1:2+7:{tmp_path}", f"1:1+:{tmp_path}", f"1:1:{tmp_path}/other")
    for mark in (*marks, "1:1", "x:1:/", "::", "9" * 5000):
        environment = {**os.environ, MARK: mark}
        with subprocess.Popen(["sleep", "60"], env=environment) as stranger:
            try:
                until(lambda: psutil.Process(stranger.pid).name() == "sleep", what="its start")
                assert Orphans(tmp_path, range(1, 2)).find() == []
            finally:
                stranger.kill()


# -- a wrapper whose child goes its own way


WRAPPER = """\
#!{python}
import os, signal, subprocess, sys
command = [{program!r}, *sys.argv[1:]]
way = {way!r}
environment = {{}} if way == "without the environment" else dict(os.environ)
if way == "daemon":
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execve(command[0], command, environment)
        os._exit(0)
    os.wait()
    while True:
        signal.pause()
sys.exit(subprocess.Popen(command, env=environment, start_new_session=True).wait())
"""


@pytest.fixture
def wrapped(
    start: Start, models: Path, program: Path, request: pytest.FixtureRequest
) -> tuple[Proxy, Path]:
    """A proxy over a wrapper of the stand-in, and the stand-in."""
    wrapper = program.with_name("wrapper")
    wrapper.write_text(
        WRAPPER.format(python=sys.executable, program=str(program), way=request.param)
    )
    wrapper.chmod(0o700)
    return start(models, MLX_SERVER_BIN=wrapper), program


def backends(program: Path) -> list[int]:
    return [entry["pid"] for entry in scripted_server.record(program, "started")]


def running(program: Path) -> list[int]:
    found = (processes.at(pid) for pid in backends(program))
    return [it.pid for it in found if it and lives(it) and str(program) in it.cmdline()]


WAYS = ["with a session", "daemon", "without the environment"]


@pytest.mark.parametrize("wrapped", WAYS, indirect=True)
def test_a_wrappers_child_is_ended_by_swap_unload_and_stop(wrapped: tuple[Proxy, Path]) -> None:
    proxy, program = wrapped
    for model in ("tiny/alpha", "tiny/beta"):
        assert proxy.load(model).ok
        assert running(program) == backends(program)[-1:]
    assert proxy.unload().ok
    assert running(program) == []
    assert is_free(proxy.backend_port)
    assert proxy.load("tiny/alpha").ok
    assert proxy.stop() == 0
    assert running(program) == []


@pytest.mark.parametrize("wrapped", WAYS, indirect=True)
def test_the_memory_of_a_wrappers_child_counts(wrapped: tuple[Proxy, Path]) -> None:
    proxy, program = wrapped
    scripted_server.change(program, megabytes=150)
    assert proxy.load("tiny/alpha").ok
    (child,) = running(program)
    held = psutil.Process(child).memory_info().rss
    assert held > 150 << 20
    until(lambda: (proxy.loaded()["models"][0]["memory_bytes"] or 0) >= held, what="a look at it")


@pytest.mark.parametrize("wrapped", ["with a session", "daemon"], indirect=True)
def test_a_wrapper_that_dies_leaves_no_child_with_the_port(wrapped: tuple[Proxy, Path]) -> None:
    proxy, program = wrapped
    assert proxy.load("tiny/alpha").ok
    psutil.Process(proxy.loaded()["pid"]).kill()
    until(lambda: proxy.health()["state"] == "empty", what="the notice of its death")
    assert running(program) == []
    assert proxy.chat().ok


@pytest.mark.parametrize("wrapped", ["with a session", "daemon"], indirect=True)
def test_a_wrappers_child_that_ignores_sigterm_is_killed(wrapped: tuple[Proxy, Path]) -> None:
    proxy, program = wrapped
    scripted_server.change(program, ignore_sigterm=True)
    proxy.stop()
    proxy.environment["MLXPROXY_STOP_TIMEOUT"] = "0.5"
    proxy.start()
    assert proxy.load("tiny/alpha").ok
    assert proxy.unload().ok
    assert running(program) == []


def test_a_process_with_a_reused_pid_is_never_signalled() -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:
        try:
            known = psutil.Process(stranger.pid)
            # As if it were of a process that had this pid before.
            known._ident = (stranger.pid, -1.0)  # type: ignore[attr-defined]
            known._create_time = -1.0  # type: ignore[attr-defined]
            assert not lives(known)
            processes.terminate([known])
            assert processes.kill(lambda: [known], 0.2) == []
            assert stranger.poll() is None
        finally:
            stranger.kill()


# -- a system that shows no processes


def test_a_system_that_hides_its_processes_still_loads_chats_and_unloads(
    start: Start, models: Path, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blind = tmp_path / "blind"
    blind.mkdir()
    (blind / "sitecustomize.py").write_text("import psutil; psutil.PROCFS_PATH = '/nowhere'\n")
    monkeypatch.setenv("PYTHONPATH", str(blind))
    proxy = start(models, MLX_SERVER_BIN=program)
    paths = ("/health", "/v1/models", "/v1/models/loaded", "/v1/events?follow=false", "/metrics")
    for model in ("tiny/alpha", "tiny/beta"):
        assert proxy.load(model).ok
        assert proxy.chat().ok
        for path in paths:
            assert proxy.get(path).status_code == 200, path
    assert all(model["fits"] for model in proxy.get("/v1/models").json()["data"])
    assert proxy.unload().ok
    assert running(program) == []
    assert proxy.stop() == 0
    assert "Traceback" not in proxy.said()


# -- a terminal that nobody reads


def test_a_terminal_that_nobody_reads_delays_nobody(models: Path, program: Path) -> None:
    """As after Ctrl-S: what is written to it waits for ever."""
    proxy = Proxy(program.parent / "instance", models, MLX_SERVER_BIN=program)
    screen, terminal = pty.openpty()
    proxy.process = subprocess.Popen(
        [sys.executable, "-m", "mlxproxy", "serve"],
        env=proxy.environment,
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        text=True,
    )
    os.close(terminal)
    try:
        until(proxy.answers, 20, "the proxy's first answer")
        assert proxy.load("tiny/alpha").ok
        for _ in range(400):
            assert proxy.chat(timeout=10).ok
        psutil.Process(proxy.loaded()["pid"]).kill()
        until(lambda: proxy.get("/health", timeout=5).json()["state"] == "empty", what="its end")
        assert proxy.chat(timeout=20).ok
        assert proxy.stop(seconds=15) == 0
    finally:
        proxy.clean_up()
        os.close(screen)
