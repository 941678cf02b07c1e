"""The installed command as a user runs it: in a pipe, or at a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMAND = Path(sys.executable).parent / "mlxproxy"
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])")


def environment(folder: Path, url: str | None = None, **more: str) -> dict[str, str]:
    """Return the environment of a user whose home and settings are in the folder."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLXPROXY_", "XDG_"))}
    kept.update(HOME=str(folder), MLXPROXY_INSTANCE_PATH=str(folder / "none"), TERM="xterm")
    kept.update({"MLXPROXY_URL": url} if url else {})
    return {**kept, **more}


def run(
    *arguments: str, env: Mapping[str, str], stdin: str | None = None, seconds: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run the command with its output in pipes; fail if it prints a traceback."""
    done = subprocess.run(
        [str(COMMAND), *arguments],
        env=dict(env),
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


class Terminal:
    """The command, or another program, at a terminal of 80 columns."""

    def __init__(
        self, *arguments: str, env: Mapping[str, str], program: str | Path = COMMAND
    ) -> None:
        self._screen, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.raw = ""
        self._process = subprocess.Popen(
            [str(program), *arguments],
            env=dict(env),
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(child)

    @property
    def text(self) -> str:
        """Everything it has printed, without colours and cursor movements."""
        return ESCAPES.sub("", self.raw).replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def interrupt(self) -> None:
        """Send Ctrl-C."""
        self.type("\x03")

    def leave(self, key: str) -> int:
        """Type a key, again if nothing comes of it; return the exit status.

        Python does not notice a Ctrl-C that comes between its prompt and its wait for a key.
        """
        for _ in range(5):
            self.type(key)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.wait(2)
        return self.wait()

    def expect(self, wanted: str, seconds: float = 20) -> str:
        """Wait until it has printed this; return the text before it, and discard it all."""
        deadline = time.monotonic() + seconds
        while wanted not in self.text:
            if not self._read(deadline - time.monotonic()):
                pytest.fail(f"{wanted!r} was not printed. What was:\n{self.text}")
        before, _, rest = self.text.partition(wanted)
        self.raw = rest
        return before

    def wait(self, seconds: float = 20) -> int:
        """Wait for it to exit; return its exit status."""
        deadline = time.monotonic() + seconds
        while self._read(deadline - time.monotonic()):
            pass
        return self._process.wait(max(0.1, deadline - time.monotonic()))

    def _read(self, seconds: float) -> bool:
        if seconds <= 0 or not select.select([self._screen], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._screen, 1 << 16)
        except OSError:  # Linux reports the end this way
            return False
        self.raw += data.decode("utf-8", "replace")
        return bool(data)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(OSError):
            os.close(self._screen)


Reply = Callable[[str, dict[str, Any]], Sequence[Any] | Mapping[str, Any]]


@contextlib.contextmanager
def scripted(reply: Reply) -> Iterator[str]:
    """Run a server that answers as `reply` says; yield its URL.

    Args:
        reply: given the path and the body, returns an object, or a sequence of events: an object is
            one event, a text is sent as it is, a number is the seconds to wait.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: dict[str, Any]) -> None:
            answer = reply(self.path, body)
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            with contextlib.suppress(OSError):
                if isinstance(answer, Mapping):
                    self._chunk(json.dumps(answer))
                else:
                    for item in answer:
                        if isinstance(item, (int, float)):
                            time.sleep(item)
                        else:
                            event = f"data: {json.dumps(item)}\n\n"
                            self._chunk(item if isinstance(item, str) else event)
                self._chunk("")

        def _chunk(self, text: str) -> None:
            data = text.encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
