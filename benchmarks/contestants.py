"""The contestants: each uses the same stand-in, which this project's proxy has started."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks import standin, threads
from benchmarks.processes import accepts, free_port, running, until
from tests.support.ports import free_range

MODEL = "bench/alpha"
MAX_CONCURRENT = 300  # 256 of one client, and what is reserved for others

_NGINX = """\
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
{user}
events {{ worker_connections 2048; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port} backlog=1024;
        location / {{
            proxy_pass http://127.0.0.1:{backend};
            proxy_http_version 1.0;
            proxy_buffering off;
        }}
    }}
}}
"""


@dataclass(frozen=True)
class Contestant:
    """A server on a port of 127.0.0.1 that answers as the backend does.

    Attributes:
        pids: its processes, whose processor time and memory count as its own.
    """

    name: str
    port: int
    pids: Sequence[int]


class Proxy:
    """This project's proxy, as a user starts it, with a folder of its own.

    Args:
        folder: where its instance folder is created.
        models: its models folder.
        server_bin: the backend program; None for the real one.
        delay: milliseconds that are added to its relay, to check that the benchmark detects it.
        program: the module that is run.
        settings: additional settings, by NAME.
    """

    def __init__(
        self,
        folder: Path,
        models: Path,
        server_bin: Path | None = None,
        delay: float = 0.0,
        program: str = "mlxproxy",
        **settings: Any,
    ) -> None:
        self.port = free_port()
        self.backend_port = free_range(settings.get("MAX_LOADED", 1))
        self.pid = 0
        given = {
            "INSTANCE_PATH": folder / "instance",
            "MODELS_ROOT": models,
            "PROXY_HOST": "127.0.0.1",
            "PROXY_PORT": self.port,
            "MLX_BACKEND_PORT": self.backend_port,
            "LOG_LEVEL": "WARNING",
            **({"MLX_SERVER_BIN": server_bin} if server_bin else {}),
            **settings,
        }
        self._output = folder / "proxy.out"
        # Python may write bytecode, as on a user's machine; otherwise it compiles at each start.
        strange = ("MLXPROXY_", "PYTHONDONTWRITEBYTECODE")
        self._environment = {
            **{name: it for name, it in os.environ.items() if not name.startswith(strange)},
            **{f"MLXPROXY_{name}": str(value) for name, value in given.items()},
        }
        run = ["benchmarks.delayed", str(delay)] if delay else [program]
        self._command = [sys.executable, "-m", *run, "serve"]

    @contextlib.contextmanager
    def running(self) -> Iterator[Proxy]:
        """Run the proxy for the block, which begins at its first answer."""
        with (
            self._output.open("w") as output,
            running(self._command, env=self._environment, stdout=output, stderr=output) as process,
        ):
            self.pid = process.pid

            def answers() -> bool:
                if process.poll() is not None:
                    raise RuntimeError(f"the proxy ended:\n{self._output.read_text()}")
                with contextlib.suppress(OSError):
                    return self.call("GET", "/health")[0] == 200
                return False

            until(answers, 30, "the proxy's first answer", pause=0.002)
            yield self

    def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Call its interface once; return the status and the JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def load(self, model: str) -> None:
        """Load a model.

        Raises:
            RuntimeError: the model could not be loaded.
        """
        status, answer = self.call("POST", "/v1/models/load", {"model_id": model})
        if status != 200:
            raise RuntimeError(f"the load of {model} failed: {answer}")


def standin_in(folder: Path, before: str = ":") -> Path:
    """Return the stand-in as a program that can replace `mlx_lm.server`.

    Args:
        before: a shell command that runs before it.
    """
    program = folder / "standin"
    program.write_text(f'#!/bin/sh\n{before}\nexec "{sys.executable}" "{standin.__file__}" "$@"\n')
    program.chmod(0o755)
    return program


@contextlib.contextmanager
def all_of_them(
    folder: Path, models: Path, delay: float, skipped: Callable[[str], None], go: bool = False
) -> Iterator[list[Contestant]]:
    """Run all contestants for the block; the direct connection is first, this proxy is last.

    Args:
        folder: where their files are created.
        models: a models folder with :data:`MODEL` in it.
        skipped: called with a sentence for each missing contestant, which says why it is missing.
        go: whether the reverse proxy of Go's library takes part.
    """
    ours = Proxy(folder, models, standin_in(folder), delay, MAX_CONCURRENT=MAX_CONCURRENT)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ours.running())
        ours.load(MODEL)
        backend = ours.backend_port
        contestants = [Contestant("direct", backend, ())]
        nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if nginx is None:
            skipped("nginx is not installed (apt-get install nginx, brew install nginx): no column")
        else:
            contestants.append(stack.enter_context(_nginx(nginx, folder, backend)))
        if go and (compiler := shutil.which("go")) is not None:
            contestants.append(stack.enter_context(_go(compiler, folder, backend)))
        elif go:
            skipped("Go is not installed (apt-get install golang-go, brew install go): no column")
        contestants.append(stack.enter_context(_threads(backend)))
        children = {child.pid for child in psutil.Process(ours.pid).children(recursive=True)}
        pids = [ours.pid, *(children - _holders(backend))]
        contestants.append(Contestant("mlxproxy", ours.port, pids))
        yield contestants


@contextlib.contextmanager
def _nginx(program: str, folder: Path, backend: int) -> Iterator[Contestant]:
    port = free_port()
    user = f"user {psutil.Process().username()};" if os.geteuid() == 0 else ""
    config = folder / "nginx.conf"
    config.write_text(_NGINX.format(folder=folder, port=port, backend=backend, user=user))
    with running([program, "-c", str(config), "-p", str(folder)]) as master:
        until(lambda: accepts(port), 10, "nginx' first answer")
        workers = psutil.Process(master.pid).children()
        yield Contestant("nginx", port, [master.pid, *(worker.pid for worker in workers)])


@contextlib.contextmanager
def _go(compiler: str, folder: Path, backend: int) -> Iterator[Contestant]:
    port = free_port()
    program = folder / "reverse"
    source = Path(__file__).with_name("reverse.go")
    cache = {"GOCACHE": str(folder / "go"), "GO111MODULE": "off", "GOFLAGS": ""}
    build = [compiler, "build", "-o", str(program), str(source)]
    subprocess.run(build, env={**os.environ, **cache}, check=True)
    with running([str(program), str(port), str(backend)]) as process:
        until(lambda: accepts(port), 10, "the first answer of Go's proxy")
        yield Contestant("go", port, [process.pid])


@contextlib.contextmanager
def _threads(backend: int) -> Iterator[Contestant]:
    port = free_port()
    with running([sys.executable, threads.__file__, str(port), str(backend)]) as process:
        until(lambda: accepts(port), 10, "the bare threads' first answer")
        yield Contestant("threads", port, [process.pid])


def _holders(port: int) -> set[int | None]:
    """Return the processes that listen on a port."""
    return {
        item.pid
        for item in psutil.net_connections("tcp")
        if item.status == psutil.CONN_LISTEN and item.laddr[1:] == (port,)
    }
