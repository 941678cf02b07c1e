"""A running `mlx_lm.server`, or its stand-in, without a proxy in front of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.ports import free_port
from tests.support.waiting import until

SERVER_BIN = Path(sys.executable).parent / "mlx_lm.server"
QUESTION = [{"role": "user", "content": "Hello!"}]


class Server:
    """A running `mlx_lm.server`, or its stand-in."""

    def __init__(self, program: Path, model: Path, log: Path) -> None:
        self.port, self.log = free_port(), log
        command = [str(program), "--model", str(model), "--port", str(self.port)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--chat-template-args", "{}"],
                stdout=output,
                stderr=output,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )

    def opens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
            return True
        return False

    def send(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, None if body is None else json.dumps(body))
        return connection.getresponse()

    def chat(self, **fields: Any) -> Any:
        answer = self.send("POST", "/v1/chat/completions", {"messages": QUESTION, **fields})
        return json.load(answer)

    def stream(self, path: str = "/v1/chat/completions", **fields: Any) -> list[Any]:
        """Return the events of a stream; comments and `[DONE]` are returned as text."""
        body = {"messages": QUESTION, "prompt": "Hello!", "stream": True, **fields}
        blocks = self.send("POST", path, body).read().decode().split("\n\n")
        assert blocks.pop() == ""
        return [json.loads(block[6:]) if block.startswith("data: {") else block for block in blocks]


@contextlib.contextmanager
def serve(program: Path, model: Path, log: Path) -> Iterator[Server]:
    server = Server(program, model, log)
    try:
        until(server.opens, 30, "the open port")
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def text_of(events: list[Any]) -> str:
    choices = [event["choices"] for event in events if isinstance(event, dict)]
    return "".join(choice[0]["delta"].get("content", "") for choice in choices if choice)
