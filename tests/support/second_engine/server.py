"""A backend with a wire, a readiness and an end of its own.

HTTP/1.1 with connections that stay open, streams in chunks, nothing loaded before `GET /ready` says
so. When the last message says ``stop working``, the core stops: every answer breaks off, and only
a line on standard output tells of it. A model named ``broken…`` ends the process at its load.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# Standard library only and a quick start: this file is a program.

LOAD_SECONDS = 0.3
EVENT_SECONDS = 0.02
PATH = "/v1/chat/completions"  # of mlxproxy's clients, too


class Core:
    """What loads, and may stop."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.ready = threading.Event()
        self.stopped = threading.Event()
        threading.Thread(target=self._load, daemon=True).start()

    def _load(self) -> None:
        time.sleep(LOAD_SECONDS)
        self.ready.set()

    def stop(self) -> None:
        print("FATAL core stopped: out of luck", flush=True)
        self.stopped.set()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], core: Core) -> None:
        self.core = core
        super().__init__(address, Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        status = 200 if self.server.core.ready.is_set() else 503
        self._reply(status, {"ready": status == 200})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != PATH or "options" not in body:
            self._reply(422, {"detail": f"{self.path} takes options"})
            return
        said = body["messages"][-1]["content"]
        if said == "raise":
            self._reply(400, {"detail": "the template of this model raises"})
            return
        count = body["options"]["tokens"]
        words = [f"{self.server.core.model.name}-{number} " for number in range(count)]
        if body["options"]["stream"]:
            self._stream(words, said)
        else:
            message = {"role": "assistant", "content": "".join(words)}
            self._reply(200, {"choices": [{"message": message}], "usage": _usage(count)})

    def _stream(self, words: list[str], said: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number, word in enumerate(words):
            if self.server.core.stopped.is_set():
                self.close_connection = True  # in the middle of the chunks
                return
            time.sleep(EVENT_SECONDS)
            self._event({"delta": {"content": word, "reasoning": None}, "finish_reason": None})
            if said == "stop working" and number == 1:
                self.server.core.stop()
        self._event({"delta": {}, "finish_reason": "length"})
        self._chunk(_data(self._head() | {"choices": [], "usage": _usage(len(words))}))
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, choice: dict[str, Any]) -> None:
        self._chunk(_data(self._head() | {"choices": [{"index": 0, **choice}], "usage": None}))

    def _head(self) -> dict[str, Any]:
        """What each event begins with: no `system_fingerprint`, and no spaces in its JSON."""
        model = str(self.server.core.model)
        return {"object": "chat.completion.chunk", "id": "second-1", "created": 1, "model": model}

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _reply(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _data(event: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % json.dumps(event, separators=(",", ":")).encode()


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}


def main(weights: str, bind: str) -> None:
    model = Path(weights)
    if model.name.startswith("broken"):
        print(f"cannot open {model}: the moon is in the wrong quarter", flush=True)
        sys.exit(3)
    host, _, port = bind.rpartition(":")
    Server((host, int(port)), Core(model)).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
