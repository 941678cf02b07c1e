"""The fixtures that tests share: tiny models that really answer, and proxies as a user starts them.

A test's folder shows its cost: a test of `unit` starts no process, one of `standin` starts
programs, with a scripted stand-in if a backend is needed, one of `backend` uses the real mlx-lm,
one of `page` drives a browser.
"""

from __future__ import annotations

import concurrent.futures
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import scripted_server, tiny_models
from tests.support.following import Following
from tests.support.ports import free_port as free_port
from tests.support.proxy import Proxy
from tests.support.pty import COMMAND, Terminal, environment
from tests.support.server_process import SERVER_BIN as SERVER_BIN
from tests.support.server_process import Server, serve
from tests.support.waiting import until as until

# A shell makes its background processes ignore SIGINT, and nohup makes its own ignore SIGHUP;
# children inherit that, so the signals that the tests send would have no effect.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test of a folder with the folder's name, which says what the test costs."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder != "unit":
            item.add_marker(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a models folder with two tiny models that really answer."""
    root = tmp_path_factory.mktemp("models")
    tiny_models.build(root / "tiny" / "alpha", says="alpha")
    tiny_models.build(root / "tiny" / "beta", says="beta")
    return root


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Proxy]]:
    """Start proxies and clean up after them."""
    started: list[Proxy] = []

    def starter(models: Path | None = None, **settings: Any) -> Proxy:
        instance = settings.pop("instance", tmp_path / f"instance{len(started)}")
        proxy = Proxy(instance, models, **settings)
        started.append(proxy)
        return proxy.start()

    yield starter
    for proxy in started:
        proxy.clean_up()


@pytest.fixture(scope="module")
def proxy(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """Start one proxy with the two tiny models for a whole file; each test loads what it needs."""
    proxy = Proxy(tmp_path_factory.mktemp("proxy") / "instance", models)
    try:
        yield proxy.start()
    finally:
        proxy.clean_up()


@pytest.fixture
def standin(tmp_path: Path) -> Iterator[tuple[Server, Path]]:
    """Start a stand-in without a proxy; return it and its executable."""
    program = scripted_server.install(tmp_path / "bin")
    with serve(program, Path("/models/ada"), tmp_path / "log") as server:
        yield server, program


@pytest.fixture
def pool() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(64) as executor:
        yield executor


@pytest.fixture
def follow() -> Iterator[Callable[..., Following]]:
    """Follow streams and leave none open."""
    opened: list[Following] = []

    def opener(*arguments: Any) -> Following:
        opened.append(Following(*arguments))
        return opened[-1]

    yield opener
    for one in opened:
        one.close()


# -- for tests of the commands


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make this process that of a user whose home is a folder of the test."""
    for name in [name for name in os.environ if name.startswith(("MLXPROXY_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLXPROXY_INSTANCE_PATH", str(tmp_path / "instance"))
    return tmp_path


@pytest.fixture
def env(proxy: Proxy, tmp_path: Path) -> dict[str, str]:
    """Return the environment of a user whose commands talk to the proxy."""
    return environment(tmp_path, proxy.url)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Start commands at a terminal and clean up after them."""
    opened: list[Terminal] = []

    def opener(*arguments: str, env: dict[str, str], program: str | Path = COMMAND) -> Terminal:
        opened.append(Terminal(*arguments, env=env, program=program))
        return opened[-1]

    yield opener
    for one in opened:
        one.close()


@pytest.fixture
def talk(terminal: Callable[..., Terminal]) -> Callable[..., Terminal]:
    """Start chats at a terminal."""
    return partial(terminal, "chat")
