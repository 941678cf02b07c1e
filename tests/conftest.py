"""What the tests share: tiny real models, and the proxy as a user starts it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from mlxproxy.server.channel import Channel
from tests.support import tiny_models
from tests.support.pty import Terminal, environment
from tests.support.wire import Alone

SERVER_BIN = Path(sys.executable).parent / "mlx_lm.server"


# A shell has SIGINT ignored for what it starts in the background, and whoever is started from there
# inherits that: the tests' own Ctrl-C would go unheard.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts a proxy is none of the fast tests, whatever stands behind the proxy."""
    for item in items:
        starts = {"start", "proxy"} & set(getattr(item, "fixturenames", ()))
        if starts and not any(item.get_closest_marker(name) for name in ("backend", "demo")):
            item.add_marker("standin")


def free_port() -> int:
    """A port that nobody listens on."""
    return free_ports(1)[0]


def free_ports(number: int) -> list[int]:
    """Different ports that nobody listens on."""
    with contextlib.ExitStack() as probes:
        found = [probes.enter_context(socket.socket()) for _ in range(number)]
        for probe in found:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in found]


def free_range(number: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    while True:
        first = free_port()
        with contextlib.suppress(OSError, OverflowError), contextlib.ExitStack() as probes:
            for port in range(first, first + number):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def until(condition: Callable[[], Any], seconds: float = 10.0, what: str = "the condition") -> Any:
    """The first true value of the condition; fails with `what` after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    pytest.fail(f"{what} did not come true within {seconds:g} s")


class Proxy:
    """A proxy in a process of its own, as `make run` starts it.

    Attributes:
        program: the module that is run.
    """

    program = "mlxproxy"

    def __init__(self, instance: Path, models: Path | None, **settings: Any) -> None:
        self.instance = instance
        if (number := settings.get("MAX_LOADED", 1)) != 1:
            settings.setdefault("MLX_BACKEND_PORT", free_range(number))
        port, backend_port = free_ports(2)
        self.port = settings.setdefault("PROXY_PORT", port)
        self.backend_port = settings.setdefault("MLX_BACKEND_PORT", backend_port)
        settings.setdefault("PROXY_HOST", "127.0.0.1")
        if models is not None:
            settings.setdefault("MODELS_ROOT", models)
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("MLXPROXY_")},
            "MLXPROXY_INSTANCE_PATH": str(instance),
            **{f"MLXPROXY_{name}": str(value) for name, value in settings.items()},
        }
        self.process: subprocess.Popen[str] | None = None
        self.output = instance.parent / f"{instance.name}.out"

    def start(self, seconds: float = 20.0) -> Proxy:
        with self.output.open("a") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.program, "serve"],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        until(self._answers, seconds, "the proxy's first answer")
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            pytest.fail(f"the proxy ended at its start:\n{self.said()}")
        with contextlib.suppress(requests.ConnectionError):
            return bool(requests.get(self.url + "/health", timeout=5).ok)
        return False

    def said(self) -> str:
        """What it has printed so far."""
        return self.output.read_text()

    # -- the calls of the contract

    def get(self, path: str, **kwargs: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=kwargs.pop("timeout", 30), **kwargs)

    def post(self, path: str, body: Any = None, **kwargs: Any) -> requests.Response:
        kwargs.setdefault("timeout", 60)
        return requests.post(self.url + path, json=body, **kwargs)

    def load(self, model: str, **options: Any) -> requests.Response:
        return self.post("/v1/models/load", {"model_id": model, **options})

    def unload(self) -> requests.Response:
        return self.post("/v1/models/unload")

    def health(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.get("/health").json()
        return answer

    def loaded(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.get("/v1/models/loaded").json()
        return answer

    def chat(self, text: str = "Hello!", **fields: Any) -> requests.Response:
        stream = fields.get("stream", False)
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}
        return self.post("/v1/chat/completions", body, stream=stream)

    # -- its end

    def stop(self, number: int = signal.SIGTERM, seconds: float = 45.0) -> int:
        """Stops it as told and returns its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def children(self) -> list[psutil.Process]:
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def clean_up(self) -> None:
        """Leaves nothing behind, whatever a test did."""
        if self.process is None:
            return
        family = self.children()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with two tiny models that really answer."""
    root = tmp_path_factory.mktemp("models")
    tiny_models.build(root / "tiny" / "alpha", says="alpha")
    tiny_models.build(root / "tiny" / "beta", says="beta")
    return root


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Proxy]]:
    """Starts proxies and leaves nothing of them behind."""
    started: list[Proxy] = []

    def starter(models: Path | None = None, **settings: Any) -> Proxy:
        instance = settings.pop("instance", tmp_path / f"instance{len(started)}")
        proxy = Proxy(instance, models, **settings)
        started.append(proxy)
        return proxy.start()

    yield starter
    for proxy in started:
        proxy.clean_up()


@pytest.fixture
def alone() -> Iterator[Callable[..., Alone]]:
    started: list[Alone] = []

    def starter(application: Callable[..., Any], *channel_class: type[Channel]) -> Alone:
        started.append(Alone(application, *channel_class))
        return started[-1]

    yield starter
    for one in started:
        one.close()


# -- for tests of the command


@pytest.fixture
def env(proxy: Proxy, tmp_path: Path) -> dict[str, str]:
    """The environment of a user whose commands talk with the proxy."""
    return environment(tmp_path, proxy.url)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Starts commands at a terminal and leaves nothing of them behind."""
    opened: list[Terminal] = []

    def opener(*arguments: str, env: dict[str, str]) -> Terminal:
        opened.append(Terminal(*arguments, env=env))
        return opened[-1]

    yield opener
    for one in opened:
        one.close()
