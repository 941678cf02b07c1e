"""The commands, as a person at a terminal or a script uses them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from mlxproxy import settings
from mlxproxy.commands.client import connect
from tests.support import tiny_models
from tests.support.ports import free_port
from tests.support.proxy import Proxy
from tests.support.pty import COMMAND, Terminal, environment, run, scripted
from tests.support.waiting import until

LONG = "lmstudio-community/Qwen3-Coder-30B-A3B-Instruct-2507-MLX-4bit"

SLOW_IMPORTS = {"flask", "waitress", "requests", "rich", "prometheus_client", "psutil"}


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy with four models, one of which cannot be loaded."""
    folder = tmp_path_factory.mktemp("commands")
    models = folder / "models"
    tiny_models.build(models / "tiny" / "alpha", says="alpha")
    tiny_models.build(models / "tiny" / "beta", says="beta")
    tiny_models.build(models / LONG, quantize=4, max_context=262144)
    tiny_models.build(models / "tiny" / "odd")
    (models / "tiny" / "odd" / "config.json").write_text('{"model_type": "frobnicator"}')
    proxy = Proxy(folder / "instance", models)
    try:
        yield proxy.start()
    finally:
        proxy.clean_up()


# -- the command itself


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["chat", "--help"]])
def test_what_needs_no_server_imports_nothing_slow(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mlxproxy", *arguments],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & SLOW_IMPORTS


def test_the_proxys_start_does_not_pay_for_the_metrics(tmp_path: Path) -> None:
    code = "import mlxproxy.main, mlxproxy.blueprints.observe, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert "mlxproxy.observability.metrics" in done.stdout.split()
    assert "prometheus_client" not in done.stdout.split()


def test_help_names_every_command_whole(tmp_path: Path) -> None:
    said = run("--help", env=environment(tmp_path)).stdout
    for name in "serve ls ps load unload chat logs status doctor service".split():
        assert f"\n  {name} " in said
    assert "...\n" not in said.partition("Commands:")[2]
    assert "`mlxproxy completion`" in said


@pytest.mark.parametrize(
    "arguments",
    [["ls"], ["ps"], ["status"], ["load", "x"], ["unload"], ["chat", "-p", "x"], ["logs", "-f"]],
    ids=lambda it: it[0],
)
def test_without_a_server_a_sentence_says_how_to_start_one(
    arguments: list[str], tmp_path: Path
) -> None:
    done = run(*arguments, env=environment(tmp_path, MLXPROXY_PROXY_PORT=str(free_port())))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "mlxproxy serve" in done.stderr


def test_what_a_proxy_that_is_gone_has_logged_is_named(tmp_path: Path) -> None:
    instance = tmp_path / "instance"
    (instance / "logs").mkdir(parents=True)
    (instance / "logs" / "proxy.log").write_text("its last words\n")
    env = environment(tmp_path, MLXPROXY_PROXY_PORT=str(free_port()))
    done = run("logs", env={**env, "MLXPROXY_INSTANCE_PATH": str(instance)})
    assert done.returncode == 1
    assert str(instance / "logs" / "proxy.log") in done.stderr


def test_another_programs_server_is_told_apart(tmp_path: Path) -> None:
    with scripted(lambda path, body: ["<html>"]) as url:
        done = run("ls", env=environment(tmp_path, url))
    assert done.returncode == 1
    assert "is not mlxproxy" in done.stderr


# -- which server


@pytest.mark.parametrize(
    ("host", "url"),
    [
        (None, "http://localhost:8123"),
        ("mac.local", "http://mac.local:8123"),
        ("mac.local:9000", "http://mac.local:9000"),
        ("192.168.1.5", "http://192.168.1.5:8123"),
        ("::1", "http://[::1]:8123"),
        ("[::1]:9000", "http://[::1]:9000"),
        ("https://mac.example.net/llm/", "https://mac.example.net/llm"),
        ("http://mac.local:8080/v1", "http://mac.local:8080"),
    ],
)
def test_a_server_is_named_in_many_ways(
    host: str | None, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("MLXPROXY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLXPROXY_INSTANCE_PATH", str(tmp_path))
    monkeypatch.setenv("MLXPROXY_PROXY_PORT", "8123")
    assert connect(host, None).url == url


def test_a_key_is_asked_for_and_taken_from_wherever_it_is(
    start: Callable[..., Proxy], models: Path, tmp_path: Path
) -> None:
    proxy = start(models, API_KEY="right,other")
    env = environment(tmp_path, proxy.url)
    refused = run("ls", env=env)
    assert refused.returncode == 1
    assert "--key" in refused.stderr
    assert run("ls", "--key", "wrong", env=env).returncode == 1
    assert run("ls", "--key", "other", env=env).returncode == 0
    assert run("ls", env={**env, "MLXPROXY_API_KEY": "right,other"}).returncode == 0
    assert run("status", env=env).returncode == 0
    # At the server's own machine, its settings have it.
    config = "API_KEY = ['right']\n" + f"PROXY_PORT = {proxy.port}\n"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.py").write_text(config)
    own = environment(tmp_path, MLXPROXY_INSTANCE_PATH=str(tmp_path / "own"))
    assert run("ls", env=own).returncode == 0


# -- ls


def test_ls_is_a_table_with_a_line_for_each_model(env: dict[str, str]) -> None:
    done = run("ls", env=env)
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["MODEL", "SIZE", "QUANT", "CTX", "CAN", "STATE"]
    assert [row.split()[0] for row in rows] == [LONG, "tiny/alpha", "tiny/beta"]
    assert rows[0].split()[3:6] == ["4-bit", "256K", "tools"]
    assert "\x1b" not in done.stdout
    assert all(line == line.rstrip() for line in done.stdout.splitlines())


def test_ls_all_says_why_the_others_cannot_be_loaded(env: dict[str, str]) -> None:
    said = run("ls", "--all", env=env).stdout
    assert "Cannot be loaded:\ntiny/odd: " in said
    assert "frobnicator" in said


def test_ls_says_what_does_not_fit_into_memory(tmp_path: Path) -> None:
    model = {"id": "a/b", "loadable": True, "size_bytes": 140_000_000_000, "quantization": None}
    model |= {"max_context_length": None, "state": "not-loaded", "loaded": False, "fits": False}
    abilities = {"tools": False, "vision": True, "thinking": False}
    with scripted(lambda path, body: {"data": [{**model, "capabilities": abilities}]}) as url:
        row = run("ls", env=environment(tmp_path, url)).stdout.splitlines()[1]
    assert row.split() == ["a/b", "140.0", "GB", "none", "see", "too", "big"]


def test_ls_shows_ids_whole_in_80_columns(
    env: dict[str, str], terminal: Callable[..., Terminal]
) -> None:
    screen = terminal("ls", "--all", env=env)
    assert screen.wait() == 0
    lines = screen.text.splitlines()
    assert max(map(len, lines)) <= 80
    at = lines.index(LONG)
    assert lines[at + 1].split()[2:] == ["4-bit", "256K", "tools", "think"]
    (short,) = (line for line in lines if line.startswith("tiny/alpha "))
    assert lines[0].index("QUANT") == lines[at + 1].index("4-bit") == short.index("none")
    assert "\x1b[1m" in screen.raw


def test_every_listing_is_json_for_programs(env: dict[str, str]) -> None:
    listed = json.loads(run("ls", "--json", env=env).stdout)
    assert [item["id"] for item in listed] == [LONG, "tiny/alpha", "tiny/beta"]
    assert json.loads(run("ps", "--json", env=env).stdout)["state"]
    assert json.loads(run("status", "--json", env=env).stdout)["proxy"] == "ok"


def test_an_empty_models_folder_is_named(start: Callable[..., Proxy], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    proxy = start(tmp_path / "empty")
    done = run("ls", env=environment(tmp_path, proxy.url))
    assert f"No model in {tmp_path / 'empty'} can be loaded" in done.stderr
    assert done.stdout == ""


def test_ls_says_that_a_models_folder_is_missing(
    start: Callable[..., Proxy], models: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "unplugged"
    proxy = start(models, MODELS_ROOT=f"{models}:{missing}")
    done = run("ls", env=environment(tmp_path, proxy.url))
    assert "tiny/alpha" in done.stdout
    assert done.stderr.startswith(f"The models folder {missing} does not exist.")
    proxy = start(missing)
    done = run("ls", env=environment(tmp_path, proxy.url))
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"The models folder {missing} does not exist.")


def test_a_reader_who_stops_early_is_no_failure(env: dict[str, str]) -> None:
    done = subprocess.run(
        f"{COMMAND} ls | head -1", shell=True, env=env, capture_output=True, text=True, timeout=30
    )
    assert done.stdout.startswith("MODEL")
    assert done.stderr == ""


# -- load, ps, status, unload


def progress(phase: str, **more: Any) -> dict[str, Any]:
    told = {"id": "a/b", "phase": phase, "seconds": 1.0, "bytes_read": None, "last_seconds": None}
    return {"status": "loading", **told, "bytes_total": 2_000_000_000, **more}


LOADED = {"status": "loaded", "id": "a/b", "enable_thinking": False, "changed": True}


def test_the_bar_counts_bytes_only_where_the_server_does(
    tmp_path: Path, terminal: Callable[..., Terminal]
) -> None:
    events = [
        progress("starting", bytes_read=1_000_000_000),
        0.3,
        progress("loading", bytes_read=1_500_000_000, last_seconds=12.3),
        0.3,
        progress("warming"),
        0.3,
        LOADED,
    ]
    with scripted(lambda path, body: events) as url:
        screen = terminal("load", "b", env=environment(tmp_path, url))
        assert screen.wait() == 0
    before, _, after = screen.text.partition("1.5 GB of 2.0 GB, 1 s, last time 12 s")
    assert after
    assert " of 2.0 GB" not in before
    assert " of 2.0 GB" not in after.partition("warming")[2]
    assert "%" not in screen.text


def test_a_load_that_fails_says_why(tmp_path: Path) -> None:
    failure = {"error": {"message": "a/b: weights are missing.", "code": "load_failed"}}
    with scripted(lambda path, body: [progress("loading"), failure]) as url:
        done = run("load", "b", env=environment(tmp_path, url))
    assert done.returncode == 1
    assert done.stderr == "Error: a/b: weights are missing.\n"


def test_an_unknown_model_is_answered_with_close_names_and_commands(env: dict[str, str]) -> None:
    done = run("load", "tiny/alpa", env=env)
    assert done.returncode == 1
    assert "tiny/alpha" in done.stderr
    assert "`mlxproxy ls`" in run("load", "zzz", env=env).stderr


def test_a_wrong_duration_says_what_is_right(env: dict[str, str]) -> None:
    done = run("load", "alpha", "--ttl", "soon", env=env)
    assert done.returncode == 1
    assert "30m" in done.stderr


def test_ctrl_c_leaves_a_load_going_and_says_so(
    tmp_path: Path, terminal: Callable[..., Terminal]
) -> None:
    with scripted(lambda path, body: [progress("loading"), 5, LOADED]) as url:
        screen = terminal("load", "b", env=environment(tmp_path, url))
        screen.expect("Loading a/b")
        screen.interrupt()
        assert screen.wait(4) == 130
    assert "`mlxproxy unload` cancels it" in screen.text
    assert "Traceback" not in screen.text


def test_a_fault_shows_in_the_exit_status(start: Callable[..., Proxy], tmp_path: Path) -> None:
    proxy = start(tmp_path / "unplugged")
    done = run("status", env=environment(tmp_path, proxy.url))
    assert done.returncode == 3
    assert str(tmp_path / "unplugged") in done.stdout


LONG_WORDS = "/Volumes/" + "-".join(["a-disk-with-a-long-name"] * 4)


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["status"], {"models_root_missing": [LONG_WORDS]}),
        (["ls"], {"data": [], "models_root": [LONG_WORDS]}),
        (["load", "b"], [{"error": {"message": f"It is not in {LONG_WORDS} any more, I fear."}}]),
        (["ps"], {"models": [], "transition": {"id": LONG_WORDS, "phase": "x", "seconds": 1}}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_no_sentence_is_cut_inside_a_word_at_the_end_of_a_line(
    arguments: list[str], answer: Any, tmp_path: Path, terminal: Callable[..., Terminal]
) -> None:
    with scripted(lambda path, body: answer) as url:
        screen = terminal(*arguments, env=environment(tmp_path, url))
        screen.wait()
    (at,) = (n for n, line in enumerate(screen.text.splitlines()) if LONG_WORDS in line)
    assert max(len(line) for line in screen.text.splitlines() if LONG_WORDS not in line) <= 80
    assert screen.text.splitlines()[at].strip(".") == LONG_WORDS


# -- logs


def test_logs_are_printed_and_followed(proxy: Proxy, env: dict[str, str]) -> None:
    proxy.get("/v1/models", headers={"X-Request-Id": "first-one"})
    until(lambda: "id=first-one" in run("logs", env=env).stdout, what="the request's line")
    assert len(run("logs", "-n", "1", env=env).stdout.splitlines()) == 1
    with subprocess.Popen(
        [str(COMMAND), "logs", "--follow", "-n", "1"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as following:
        assert following.stdout is not None
        assert following.stderr is not None
        assert following.stdout.readline()  # the history: from here on it follows
        proxy.get("/v1/models", headers={"X-Request-Id": "second-one"})
        line = next(line for line in following.stdout if "second-one" in line)
        assert "path=/v1/models status=200" in line
        following.send_signal(signal.SIGINT)
        assert following.wait(10) == 130
        assert following.stderr.read() == ""


# -- doctor


def test_the_doctor_tells_a_wrong_setting(tmp_path: Path) -> None:
    done = run("doctor", env=environment(tmp_path, MLXPROXY_PROXY_PORT="http"))
    assert done.returncode == 1
    assert "unset MLXPROXY_PROXY_PORT" in done.stdout
    assert "\x1b" not in done.stdout


def test_the_doctor_tells_the_names_in_the_settings_that_no_model_has(
    start: Callable[..., Proxy], models: Path, tmp_path: Path
) -> None:
    instance = tmp_path / "instance"
    instance.mkdir()
    config = instance / "config.py"
    config.write_text(
        'PROFILES = {"coder": {"model": "alpha"}, "lost": {"model": "gone"}}\n'
        'ALIASES = {"gpt-*": "coder", "claude-*": "loaded"}\n'
    )
    expected = "PROFILES['lost'] names 'gone', which is not on disk (yet)"
    set_up = environment(
        tmp_path, MLXPROXY_INSTANCE_PATH=str(instance), MLXPROXY_MODELS_ROOT=str(models)
    )
    proxy = start(models, instance=instance)
    for running in (True, False):
        done = run("doctor", env=set_up)
        assert ("server: running" in done.stdout) is running
        assert done.stdout.count("which is not on disk") == 1
        assert expected in done.stdout.replace("\n       ", " ")
        assert f"correct the name in {config}" in done.stdout
        assert "models: 2 of 2" in done.stdout, "a profile is not a model of its own"
        assert done.returncode == 1
        if running:
            proxy.stop()
    config.write_text('ALIASES = {"a": "b", "b": "a"}\n')
    assert "ALIASES go in a circle: a → b → a" in run("doctor", env=set_up).stdout


# -- serve


def test_each_setting_is_a_flag_of_serve(tmp_path: Path) -> None:
    said = run("serve", "--help", env=environment(tmp_path)).stdout
    for name, _, _ in settings.describe():
        assert f"--{name.lower().replace('_', '-')} " in said
    done = run("serve", "--proxy-port", "http", env=environment(tmp_path))
    assert done.returncode == 1
    assert "the command line" in done.stderr


def test_serving_through_the_installed_command(models: Path, tmp_path: Path) -> None:
    port, backend_port = free_port(), free_port()
    flags = ["--models-root", str(models), "--proxy-host", "127.0.0.1", "--proxy-port", str(port)]
    with subprocess.Popen(
        [str(COMMAND), "serve", *flags, "--mlx-backend-port", str(backend_port)],
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as serving:

        def answers() -> bool:
            try:
                return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok
            except requests.ConnectionError:
                return False

        try:
            until(answers, 20, "the first answer")
            serving.send_signal(signal.SIGINT)
            assert serving.wait(20) == 0
        finally:
            serving.kill()
