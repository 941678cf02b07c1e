"""What keeps a proxy from starting, and what it says when it starts."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from mlxproxy.server import server
from mlxproxy.settings import Settings
from tests.support.ports import free_port
from tests.support.pty import Terminal, environment, run


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


@contextlib.contextmanager
def another(folder: Path, port: int) -> Iterator[int]:
    """A living proxy that has recorded the backend port as its own; yields its pid."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from mlxproxy.backend.lock import PortLock\n"
        "port = int(sys.argv[2])\n"
        "PortLock(Path(sys.argv[1]), range(port, port + 1)).acquire()\n"
        "print('here', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(port)], stdout=subprocess.PIPE
    ) as proxy:
        try:
            assert proxy.stdout is not None
            assert proxy.stdout.readline()
            yield proxy.pid
        finally:
            proxy.kill()


@pytest.mark.parametrize("obstacle", ["the port", "Ollama's port", "another proxy", "the key file"])
def test_what_keeps_it_from_starting_is_found_before_anything_is_downloaded(
    obstacle: str, taken: int, tmp_path: Path
) -> None:
    """Without LM Studio, the next thing would be the demo model."""
    backend_port = free_port()
    env = environment(
        tmp_path,
        MLXPROXY_PROXY_HOST="127.0.0.1",
        MLXPROXY_PROXY_PORT=str(taken if obstacle == "the port" else free_port()),
        MLXPROXY_MLX_BACKEND_PORT=str(backend_port),
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_CONFIG_FILE=os.devnull,
    )
    with contextlib.ExitStack() as stack:
        expected = f"Port {taken} on 127.0.0.1 is in use"
        if obstacle == "Ollama's port":
            env["MLXPROXY_OLLAMA_PORT"] = str(taken)
            expected += " by another program. Stop it, or set OLLAMA_PORT"
        if obstacle == "another proxy":
            pid = stack.enter_context(another(tmp_path / "none", backend_port))
            expected = f"mlxproxy is already running (pid {pid})"
        if obstacle == "the key file":
            env["MLXPROXY_API_KEY_FILE"] = str(tmp_path / "keys")
            expected = f"API_KEY_FILE = {tmp_path / 'keys'}"
        done = run("serve", env=env)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {expected}")
    assert "demo model" not in done.stderr
    assert not (tmp_path / "none" / "models").exists()


def test_a_port_that_another_program_takes_during_a_download_is_named() -> None:
    with server.listen("127.0.0.1", 0) as ours, socket.socket() as theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            theirs.bind(ours.getsockname())
        except OSError:
            pytest.skip("this system lets nobody else bind a port that is bound")
        theirs.listen()
        port = ours.getsockname()[1]
        with pytest.raises(server.CannotListen, match=f"Port {port} on 127.0.0.1 is in use"):
            server.Server(lambda *_: (), Settings(), ours, lambda: None, lambda: None)


def test_a_start_says_a_missing_folder_once_and_fits_80_columns(
    terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    ports = {
        "MLXPROXY_PROXY_PORT": str(free_port()),
        "MLXPROXY_MLX_BACKEND_PORT": str(free_port()),
    }
    folder = tmp_path / "unplugged"
    screen = terminal("serve", env=environment(tmp_path, MLXPROXY_MODELS_ROOT=str(folder), **ports))
    said = screen.expect("ls --all")
    screen.interrupt()
    assert screen.wait() == 0
    said += screen.text  # what is logged has a way of its own
    assert said.count(str(folder)) == 1
    sentences = [line for line in said.splitlines() if str(folder) not in line]
    assert max(map(len, sentences)) <= 80


def test_a_request_is_one_short_line_at_the_terminal(
    terminal: Callable[..., Terminal], models: Path, tmp_path: Path
) -> None:
    port = free_port()
    env = environment(
        tmp_path,
        MLXPROXY_MODELS_ROOT=str(models),
        MLXPROXY_PROXY_HOST="127.0.0.1",
        MLXPROXY_PROXY_PORT=str(port),
        MLXPROXY_MLX_BACKEND_PORT=str(free_port()),
    )
    screen = terminal("serve", env=env)
    screen.expect("To chat, type in another terminal:")
    assert requests.get(f"http://127.0.0.1:{port}/v1/models", timeout=10).ok
    screen.expect(" 127.0.0.1 GET /v1/models 200 0.")
    screen.interrupt()
    assert screen.wait() == 0
