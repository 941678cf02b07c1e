"""The commands that load, over a proxy with the real backend."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.proxy import Proxy
from tests.support.pty import Terminal, environment, run, scripted
from tests.support.waiting import until

# -- load, ps, status, unload


def test_a_model_is_loaded_shown_and_unloaded(env: dict[str, str]) -> None:
    assert run("unload", env=env).returncode == 0
    assert run("ps", env=env).stdout == "No model is loaded.\n"
    loaded = run("load", "alpha", "--thinking", "--ttl", "30m", env=env)
    assert loaded.returncode == 0
    assert loaded.stdout.startswith("Loaded tiny/alpha in ")
    assert loaded.stdout.endswith("thinking on.\n")
    assert loaded.stderr == ""
    name, *figures = run("ps", env=env).stdout.splitlines()
    shown = {line[:13].strip(): line[13:].strip() for line in figures}
    assert name == "tiny/alpha"
    assert shown["state"].startswith("loaded ")
    assert shown["thinking"] == "on"
    assert shown["requests"] == "0 in flight, 0 waiting"
    assert shown["idle TTL"].startswith("unloads in ")
    assert "weights" in shown["memory"]
    status = run("status", env=env)
    assert status.returncode == 0
    assert "tiny/alpha is loaded, thinking on" in status.stdout
    again = run("load", "TINY/alpha", "--thinking", env=env)
    assert again.stdout == "tiny/alpha is already loaded, thinking on.\n"
    assert "loaded" in run("ls", env=env).stdout
    assert run("unload", env=env).stdout == "Unloaded tiny/alpha.\n"
    assert run("unload", env=env).stdout == "No model was loaded.\n"
    assert "no model is loaded" in run("status", env=env).stdout


def test_a_load_at_a_terminal_shows_a_progress_bar_that_goes_away(
    env: dict[str, str], terminal: Callable[..., Terminal]
) -> None:
    run("unload", env=env)
    screen = terminal("load", "beta", env=env)
    screen.expect("Loading tiny/beta")
    screen.expect("starting")
    assert screen.wait() == 0
    assert "Loaded tiny/beta in " in screen.text
    assert screen.text.splitlines()[-1].endswith("thinking off.")


def test_tokens_per_second_are_shown_once_there_was_an_answer(
    proxy: Proxy, env: dict[str, str]
) -> None:
    assert run("load", "alpha", "--no-thinking", env=env).returncode == 0
    assert proxy.chat(stream=True, max_tokens=500).text.endswith("[DONE]\n\n")
    figures = run("ps", env=env).stdout
    assert "in the last answer" in figures


# -- logs


def test_logs_backend_prints_the_log_of_the_backend(proxy: Proxy, env: dict[str, str]) -> None:
    assert run("load", "alpha", env=env).returncode == 0
    until(
        lambda: "Starting httpd" in run("logs", "--backend", env=env).stdout,
        what="the backend's log",
    )


# -- doctor


def findings(env: dict[str, str]) -> dict[str, dict[str, Any]]:
    done = run("doctor", "--json", env=env, seconds=120)
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == (0 if all(finding["ok"] for finding in found.values()) else 1)
    return found


def test_the_doctor_finds_a_healthy_machine_healthy(proxy: Proxy, tmp_path: Path) -> None:
    found = findings({**proxy.environment, "HOME": str(tmp_path)})
    assert all(finding["ok"] for finding in found.values()), found
    assert str(proxy.process.pid if proxy.process else "") in found["server"]["sentence"]
    checks = {"Python", "settings", "mlx-lm", "models", "disk", "server", "leftovers", "service"}
    assert checks <= found.keys()


def test_the_doctor_names_each_fault_and_its_remedy(
    start: Callable[..., Proxy], models: Path, tmp_path: Path
) -> None:
    killed = start(models)
    killed.load("tiny/alpha")
    (orphan,) = killed.children()
    killed.stop(signal.SIGKILL)
    (tmp_path / "broken").write_text("#!/bin/sh\necho no metal here >&2; exit 1\n")
    (tmp_path / "broken").chmod(0o755)
    with scripted(lambda path, body: {}) as stranger:
        found = findings(
            {
                **killed.environment,
                "HOME": str(tmp_path),
                "MLXPROXY_MLX_SERVER_BIN": str(tmp_path / "broken"),
                "MLXPROXY_MODELS_ROOT": str(tmp_path / "unplugged"),
                "MLXPROXY_PROXY_PORT": stranger.rpartition(":")[2],
            }
        )
    port, backend_port = stranger.rpartition(":")[2], killed.backend_port
    wrong = {name for name, finding in found.items() if not finding["ok"]}
    assert wrong == {"mlx-lm", "models", "leftovers", f"port {port}", f"port {backend_port}"}
    assert "no metal here" in found["mlx-lm"]["sentence"]
    assert found["leftovers"]["fix"] == f"kill {orphan.pid}"
    assert str(os.getpid()) in found[f"port {port}"]["fix"]
    orphan.kill()


def test_the_doctor_asks_the_server_that_runs(
    start: Callable[..., Proxy], models: Path, tmp_path: Path
) -> None:
    """Its settings are those of another terminal."""
    (tmp_path / "empty").mkdir()
    proxy = start(models, MODELS_ROOT=f"{models}:{tmp_path / 'empty'}", API_KEY="secret")
    found = findings(environment(tmp_path, MLXPROXY_INSTANCE_PATH=str(proxy.instance)))
    assert all(finding["ok"] for finding in found.values()), found
    assert f"answers at http://localhost:{proxy.port}" in found["server"]["sentence"]
    assert f"PROXY_PORT={proxy.port}" in found["settings"]["sentence"]
    assert f"MODELS_ROOT={models}:" in found["settings"]["sentence"]
    assert "API_KEY" in found["settings"]["sentence"]
    assert not any("secret" in finding["sentence"] for finding in found.values())
    assert found["models"]["sentence"] == f"none of 0 in {tmp_path / 'empty'} can be loaded"
    proxy.stop()
    found = findings(environment(tmp_path, MLXPROXY_INSTANCE_PATH=str(proxy.instance)))
    assert found["server"]["sentence"].startswith("not running")
    assert str(models) not in found["settings"]["sentence"]
