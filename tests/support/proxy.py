"""The proxy in a separate process, as a user starts it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.support.ports import free_ports, free_range
from tests.support.waiting import until


class Proxy:
    """A proxy in a separate process, as `make run` starts it.

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
        settings.setdefault("STANDBY", False)  # the tests of it turn it on; others count processes
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

    def start(self, seconds: float = 20.0, prelude: str = "") -> Proxy:
        """Start it and wait for its first answer.

        Args:
            prelude: lines of Python that run in its process before it.
        """
        run = f"import runpy; runpy.run_module({self.program!r}, None, '__main__', True)"
        program = ["-c", f"{prelude}\n{run}"] if prelude else ["-m", self.program]
        with self.output.open("a") as output:
            self.process = subprocess.Popen(
                [sys.executable, *program, "serve"],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        until(self.answers, seconds, "the proxy's first answer")
        return self

    def answers(self) -> bool:
        """Return whether it answers yet; fail if it has exited."""
        assert self.process is not None
        if self.process.poll() is not None:
            pytest.fail(f"the proxy ended at its start:\n{self.said()}")
        with contextlib.suppress(requests.ConnectionError):
            return bool(requests.get(self.url + "/health", timeout=5).ok)
        return False

    def said(self) -> str:
        """Return what it has printed so far."""
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
        """Stop it with this signal and return its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def resident_mib(self) -> int:
        """Return its resident memory in MiB."""
        assert self.process is not None
        return int(psutil.Process(self.process.pid).memory_info().rss >> 20)

    def children(self) -> list[psutil.Process]:
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def clean_up(self) -> None:
        """Leave nothing behind, whatever a test did."""
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
