"""A scripted stand-in for `mlx_lm.server`: same command line, same wire format, faults on demand.

:func:`install` writes an executable that replaces `mlx_lm.server`, together with its
script. The script is reread at each request, so :func:`change` works while it runs, and
:func:`record` returns what has happened to all processes of that executable. See :data:`SCRIPT`
for what it can do.

An answer names its origin: `model` is the request's, `system_fingerprint` is the process id, and
the text counts the events: ``alpha0 alpha1 …`` of the model folder `alpha`.
"""

from __future__ import annotations

import io
import json
import os
import select
import signal
import socket
import stat
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Json = dict[str, Any]

# Standard library only, for a quick start: this file is also a program.

SCRIPT: Json = {
    # -- the start
    "exit_code": None,  # exit immediately with this status, after a usage line
    "open_after": 0.0,  # seconds until the port opens; None: it never opens
    "load_seconds": 0.0,  # further seconds for which requests wait for the model
    "megabytes": 0,  # of memory that the model takes
    "load_failure": None,  # the load fails after those seconds, for this reason
    "ignore_sigterm": False,
    "log_megabytes": 0.0,  # per second, to stderr
    # -- any request
    "mute": False,  # accept and never answer, not even /health
    # -- an answer
    "empty": False,  # close the connection without a byte
    "error": None,  # answer with this text as the error
    "error_status": 404,
    "silent_seconds": 0.0,  # before the headers
    "prefill_seconds": 0.0,  # after the headers, with keepalives
    "keepalive_interval": 0.5,
    "events": 8,  # fewer if the request's max_tokens is smaller
    "interval": 0.0,  # seconds between two events
    "event_bytes": 0,  # the text of an event is padded to this length
    "text": None,  # the events are this text, PIECE characters at a time
    "thoughts": 0,  # this many of the first events are reasoning
    # Call these tools, as far as they are offered: [{"name": …, "arguments": {…}}]. A chat that has
    # the result of one is answered by that result, and then by the events.
    "calls": [],
    "wire": None,  # send these bytes (Latin-1) instead, head included; the request's end is `odd`
    "piece_bytes": 0,  # this many bytes per packet
    "stays_open": False,  # keep the connection open after the answer, until the client leaves
    # -- a premature end, after this many events
    "die_after": None,  # the process exits
    "die_by": "kill",  # SIGKILL, or "exit" for os._exit(1)
    "drop_after": None,  # the connection is closed
    "hang_after": None,  # nothing more is sent
    "garbled_after": None,  # an event of a stream is not JSON; then the stream continues
    "generation_dies_after": None,  # for all requests, and the process stays alive
    "generation_dies_of": "[metal::malloc] Resource limit exceeded.",
    # -- other values for models with these folder names: {"beta": {"load_failure": "…"}}
    "models": {},
}

KEEPALIVE_TOKENS = 2048
PIECE = 12  # characters
WATCH = 0.1  # seconds between two checks for what may end a wait, other than the connection


# -- for tests


def install(folder: Path, **script: Any) -> Path:
    """Write the executable and its script into a folder, and return the executable.

    Args:
        script: values of :data:`SCRIPT` that differ from the default.
    """
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "mlx_lm.server"
    # Isolated and without `site`: it needs nothing from the environment, and starts faster.
    program.write_text(
        f"#!{sys.executable} -IS\n"
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import scripted_server\n"
        f"scripted_server.main({str(folder)!r})\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (folder / "script.json").unlink(missing_ok=True)
    change(program, **script)
    return program


def change(program: Path, **script: Any) -> None:
    """Change the script; requests that arrive from now on follow it."""
    if unknown := script.keys() - SCRIPT.keys():
        raise TypeError(f"no such part of a script: {sorted(unknown)}")
    file = program.parent / "script.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    new = file.with_suffix(".new")
    new.write_text(json.dumps({**old, **script}))
    new.replace(file)


def record(program: Path, event: str | None = None) -> list[Json]:
    """Return the events in order; each has `event`, `time` (seconds since 1970) and `pid`.

    ==============  ==============================================================================
    ``started``     `argv`, `environment`, `offline` (the value of HF_HUB_OFFLINE)
    ``request``     `number`, `path`, `headers`, `body`: a POST has been read
    ``finished``    `number`, `path`, `events` (sent), `how`: ``done``, ``client_gone``, ``hung``
                    or ``muted`` (until the client left), ``dropped``, ``error``, ``died``, ``odd``
    ``terminated``  SIGTERM has come
    ==============  ==============================================================================

    Args:
        event: only events of that kind.
    """
    file = program.parent / "record.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    events = [json.loads(line) for line in lines]
    return [entry for entry in events if event in (None, entry["event"])]


# -- the program


def main(folder: str) -> None:
    """Run the stand-in with the script of that folder and the command line of the process."""
    Process(folder).run()


class Process:
    """State that all requests share: the command line, the script, the state of the generation."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._requests = 0
        # Unknown options are ignored: their values then look like options, too.
        self.options = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
        self.model = self.options.get("--model", "default_model")
        self.name = os.path.basename(self.model)
        self.loaded = threading.Event()
        self.died = threading.Event()

    def run(self) -> None:
        environment = dict(os.environ)
        offline = environment.get("HF_HUB_OFFLINE")
        self.note("started", argv=sys.argv, environment=environment, offline=offline)
        script = self.script()
        if script["exit_code"] is not None:
            print("usage: mlx_lm.server [-h] [--model MODEL] ...", file=sys.stderr)
            print("mlx_lm.server: error: unrecognized arguments", file=sys.stderr)
            sys.exit(script["exit_code"])
        signal.signal(signal.SIGTERM, self._terminate)
        if script["log_megabytes"]:
            self._thread(self._flood, script["log_megabytes"])
        if script["open_after"] is None:
            while True:
                signal.pause()
        time.sleep(script["open_after"])
        host = self.options.get("--host", "127.0.0.1")
        port = int(self.options.get("--port", "8080"))
        try:
            server = Server((host, port), self)
        except OSError as error:
            print(f"OSError: {error}", file=sys.stderr)
            while True:  # like the original, whose generation thread keeps the process alive
                signal.pause()
        self.log("INFO", f"Starting httpd at {host} on port {port}...")
        self.weights = b"x" * (script["megabytes"] << 20)
        self._thread(self._load, script["load_seconds"], script["load_failure"])
        server.serve_forever()

    def script(self) -> Json:
        with open(os.path.join(self._folder, "script.json"), encoding="utf-8") as file:
            script = {**SCRIPT, **json.load(file)}
        return {**script, **script["models"].get(self.name, {})}

    def note(self, event: str, **details: Any) -> None:
        """Add an entry to the record, in a single write so that processes can share the file."""
        entry = {"event": event, "time": time.time(), "pid": os.getpid(), **details}
        file = os.path.join(self._folder, "record.jsonl")
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, json.dumps(entry).encode() + b"\n")
        finally:
            os.close(descriptor)

    def next_request(self) -> int:
        with self._lock:
            self._requests += 1
            return self._requests

    def log(self, level: str, message: str) -> None:
        now = time.time()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        sys.stderr.write(f"{stamp},{int(now % 1 * 1000):03} - {level} - {message}\n")
        sys.stderr.flush()

    def generation_dies(self, reason: str) -> None:
        self.log("ERROR", f"mlx_lm.server generation thread died: {reason}")
        self.died.set()

    def _load(self, seconds: float, failure: str | None) -> None:
        time.sleep(seconds)
        if failure is None:
            self.loaded.set()
        else:
            self.generation_dies(failure)

    def _flood(self, megabytes: float) -> None:
        line = b"2026-01-01 00:00:00,000 - INFO - Prompt processing progress: ".ljust(1023, b".")
        block = (line + b"\n") * 64
        while True:
            os.write(2, block)
            time.sleep(len(block) / (megabytes * 1e6))

    def _terminate(self, *_: object) -> None:
        self.note("terminated")
        if not self.script()["ignore_sigterm"]:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    @staticmethod
    def _thread(target: Any, *args: Any) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()


class Server(ThreadingHTTPServer):
    """The original's server, with room for every connection of a test."""

    request_queue_size = 1024
    daemon_threads = True

    def __init__(self, address: tuple[str, int], process: Process) -> None:
        self.process = process
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        # Without the lookup of the host name, which can take seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Ends(Exception):
    """An answer ends prematurely; `how` is the record's word for it."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


class Died(Ends):
    """The generation has ended for all requests."""

    def __init__(self) -> None:
        super().__init__("died")


class Pieces(io.RawIOBase):
    """A connection to which everything is written in packets of a given size."""

    def __init__(self, connection: socket.socket, size: int) -> None:
        super().__init__()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._size = size

    def write(self, data: Any) -> int:
        for start in range(0, len(data), self._size):
            self._connection.sendall(data[start : start + self._size])
        return len(data)


class Handler(BaseHTTPRequestHandler):
    """One connection with one request."""

    server: Server
    body: Json
    events = 0  # the number sent

    def setup(self) -> None:
        super().setup()
        self.process = self.server.process
        self.created = int(time.time())

    # -- requests

    def do_GET(self) -> None:
        if self.process.script()["mute"]:
            self._wait_for_leave()
        elif self.path == "/health":
            if self.process.died.is_set():
                self._reply(503, {"status": "unavailable"})
            else:
                self._reply(200, {"status": "ok"})
        elif self.path.startswith("/v1/models"):
            entry = {"id": self.process.model, "object": "model", "created": self.created}
            self._reply(200, {"object": "list", "data": [entry]})
        else:
            self._reply(404, b"Not Found")

    def do_POST(self) -> None:
        chat = self.path in ("/v1/chat/completions", "/chat/completions")
        if not chat and self.path != "/v1/completions":
            self._reply(404, b"Not Found")
            return
        if "Content-Length" not in self.headers:
            self._reply(411, {"error": "Content-Length header is required"})
            return
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            self.body = json.loads(raw)
        except ValueError as error:
            self._reply(400, {"error": f"Invalid JSON in request body: {error}"})
            return
        number = self.process.next_request()
        headers = dict(self.headers)
        self.process.note("request", number=number, path=self.path, headers=headers, body=self.body)
        self._number = number
        try:
            self._complete(chat)
            how = "done"
        except Ends as end:
            how = end.how
        except ConnectionError:
            how = "client_gone"
        self._note_end(how)
        if self.script["stays_open"]:
            self._wait_for_leave()

    # -- answers

    def _complete(self, chat: bool) -> None:
        script = self.script = self.process.script()
        if script["mute"]:
            self._wait_for_leave()
            raise Ends("muted")
        if script["empty"]:
            raise Ends("dropped")
        if script["piece_bytes"]:
            self.wfile = Pieces(self.connection, script["piece_bytes"])
        if script["wire"] is not None:
            self.wfile.write(script["wire"].encode("latin-1"))
            raise Ends("odd")
        try:
            while not self.process.loaded.is_set():
                self._wait(WATCH)
            if script["error"] is not None:
                self._fail(script["error_status"], script["error"])
            if chat and "messages" not in self.body:
                self._fail(400, "Request did not contain messages")
            if not chat and not isinstance(self.body.get("prompt"), str):
                self._fail(404, "text input must be of type `str` (single example)")
            self._wait(script["silent_seconds"])
        except Died:
            self._fail(404, "generation thread died")
        self.stream = self.body.get("stream", False)
        self.chat = chat
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{os.urandom(16).hex()}"
        if self.stream:
            self._send_headers(200, "text/event-stream", [("Cache-Control", "no-cache")])
        self._prefill()
        calls = self._calls()
        text, reasoning = ("", "") if calls else self._generate()
        reason = "length" if script["text"] is None and self.events < script["events"] else "stop"
        if calls:
            reason = "tool_calls"
            if self.stream:
                self._event(self._message("", "", None, calls))
        if not self.stream:
            answer = {**self._message(text, reasoning, reason, calls), "usage": self._usage()}
            body = json.dumps(answer).encode()
            length = ("Content-Length", str(len(body)))
            self._send_headers(200, "application/json", [length])
            self.wfile.write(body)
            return
        self._event(self._message("", "", reason))
        options = self.body.get("stream_options")
        if options is not None:
            if "include_usage" not in options:
                raise Ends("dropped")  # the original fails if it is absent
            if options["include_usage"]:
                usage = {"object": "chat.completion", "choices": [], "usage": self._usage()}
                self._event({**self._head(), **usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _prefill(self) -> None:
        interval, left = self.script["keepalive_interval"], self.script["prefill_seconds"]
        steps = int(left / interval) + 1
        for step in range(1, steps + 1):
            self._wait(min(interval, left))
            left -= interval
            progress = f"{step * KEEPALIVE_TOKENS}/{steps * KEEPALIVE_TOKENS}"
            self.process.log("INFO", f"Prompt processing progress: {progress}")
            if self.stream:
                self.wfile.write(f": keepalive {progress}\n\n".encode())

    def _results(self) -> list[str]:
        """Return the results of tools that the chat has, if the script calls any."""
        if not self.script["calls"]:
            return []
        messages = self.body.get("messages", ())
        return [str(each.get("content")) for each in messages if each["role"] == "tool"]

    def _calls(self) -> list[Json]:
        """Return the calls that the chat is answered by."""
        offered = [tool["function"]["name"] for tool in self.body.get("tools") or ()]
        if self._results():
            return []
        wanted = [call for call in self.script["calls"] if call["name"] in offered]
        return [
            {
                "function": {"name": call["name"], "arguments": json.dumps(call["arguments"])},
                "type": "function",
                "id": str(uuid.UUID(bytes=os.urandom(16), version=4)),
                "index": index,
            }
            for index, call in enumerate(wanted)
        ]

    def _generate(self) -> tuple[str, str]:
        """Send the events, or collect them for a whole answer; return the text and reasoning."""
        script = self.script
        limit = self.body.get("max_completion_tokens", self.body.get("max_tokens"))
        said = script["text"]
        events = script["events"] if said is None else -(-len(said) // PIECE)
        events += 0 if said is None else script["thoughts"]
        count = events if limit is None else min(events, limit)
        text, reasoning = "", ""
        begin = time.monotonic()
        for number in range(count + 1):
            self._fault(number)
            if number == count:
                break
            if script["interval"]:
                self._wait(begin + (number + 1) * script["interval"] - time.monotonic())
            thinks = self.chat and number < script["thoughts"]
            word = "thought" if thinks else self.process.name
            piece = f"{word}{number} ".rjust(script["event_bytes"], ".")
            if number == script["thoughts"] and (results := self._results()):
                piece = f"The tool said: {'; '.join(results)}. {piece}"
            if said is not None and not thinks:
                at = (number - script["thoughts"]) * PIECE if self.chat else number * PIECE
                piece = said[at : at + PIECE]
            if self.stream:
                self._event(
                    self._message("", piece, None) if thinks else self._message(piece, "", None)
                )
            elif thinks:
                reasoning += piece
            else:
                text += piece
            self.events += 1
        return text, reasoning

    def _fault(self, events: int) -> None:
        """Cause the fault that the script has for this number of events."""
        script = self.script
        if script["die_after"] == events:
            self._note_end("died")
            if script["die_by"] == "exit":
                os._exit(1)
            os.kill(os.getpid(), signal.SIGKILL)
        if script["drop_after"] == events:
            raise Ends("dropped")
        if script["hang_after"] == events:
            self._wait_for_leave()
            raise Ends("hung")
        if script["garbled_after"] == events and self.stream:
            self.wfile.write(b"data: {no JSON\n\n")
        if script["generation_dies_after"] == events:
            self.process.generation_dies(script["generation_dies_of"])
        if self.process.died.is_set():
            raise Died

    # -- the shape of answers

    def _head(self) -> Json:
        return {
            "id": self.id,
            "system_fingerprint": str(os.getpid()),
            "object": "chat.completion" if self.chat else "text_completion",
            "model": self.body.get("model", "default_model"),
            "created": self.created,
        }

    def _message(
        self, text: str, reasoning: str, finish_reason: str | None, calls: list[Json] | None = None
    ) -> Json:
        """Return a chunk of a stream, or a whole answer without its usage."""
        head, choice = self._head(), {"index": 0, "finish_reason": finish_reason}
        if not self.chat:
            return {**head, "choices": [{**choice, "text": text}]}
        message: Json = {"role": "assistant"}
        if text or not self.stream:
            message["content"] = text or None
        if reasoning:
            message["reasoning"] = reasoning
        if calls:
            message["tool_calls"] = calls
        if self.stream:
            head["object"] = "chat.completion.chunk"
        return {**head, "choices": [{**choice, "delta" if self.stream else "message": message}]}

    def _usage(self) -> Json:
        prompt = len(json.dumps(self.body.get("messages", self.body.get("prompt"))))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.events,
            "total_tokens": prompt + self.events,
            "prompt_tokens_details": {"cached_tokens": 0},
        }

    # -- the wire

    def _event(self, event: Json) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def _reply(self, status: int, answer: Json | bytes) -> None:
        self._send_headers(status, "application/json")
        self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def _fail(self, status: int, text: str) -> None:
        self._reply(status, {"error": text})
        raise Ends("error")

    def _send_headers(
        self, status: int, content_type: str, more: list[tuple[str, str]] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-type", content_type)
        for name in ("Origin", "Methods", "Headers"):
            self.send_header(f"Access-Control-Allow-{name}", "*")
        for name, value in more or []:
            self.send_header(name, value)
        self.end_headers()

    def _wait(self, seconds: float) -> None:
        """Wait, unless the client leaves or the generation dies."""
        deadline = time.monotonic() + seconds
        while True:
            if self.process.died.is_set():
                raise Died
            left = deadline - time.monotonic()
            if left <= 0:
                return
            if self._left(min(left, WATCH)):
                raise Ends("client_gone")

    def _wait_for_leave(self) -> None:
        while not self._left(WATCH):
            pass

    def _left(self, seconds: float) -> bool:
        """Return whether the client closes the connection within that time."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return False
        try:
            if self.connection.recv(1, socket.MSG_PEEK):
                time.sleep(seconds)  # it sends unexpected data: it has not left
                return False
        except ConnectionError:
            pass
        return True

    def _note_end(self, how: str) -> None:
        self.process.note(
            "finished", number=self._number, path=self.path, events=self.events, how=how
        )
