"""The proxy's own log, written to the terminal, to a rotated file and to its followers."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from mlxproxy.logfile import LogFile
from mlxproxy.observability.events import EventBus
from mlxproxy.text import harmless
from mlxproxy.writing import Writer

LONGEST_LINE = 4000  # characters; only text that somebody has sent makes a line longer
FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
REQUEST = "request"  # a record's attribute: the facts of a request, of which a person needs few
LONGEST_PATH = 30  # characters of a request's path, in lines for people


class _OneLine(logging.Formatter):
    """Formats a record as one line, whatever a client has sent; a traceback may follow it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        line = super().formatMessage(record)
        if len(line) > LONGEST_LINE:
            line = line[:LONGEST_LINE] + "..."
        if line.isprintable():
            return line
        return "".join(it if it.isprintable() else ascii(it)[1:-1] for it in line)

    def format(self, record: logging.LogRecord) -> str:
        record.exc_text = None  # another handler's formatter may have cached it there
        return super().format(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return textwrap.indent(harmless(super().formatException(ei)), "    ")


class _ForPeople(_OneLine):
    """Formats a record as one line, of 80 columns if possible; the log file has the rest."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        facts = getattr(record, REQUEST, None)
        if facts is not None:
            record.message = request_line(facts)
        if record.levelno != logging.INFO:
            record.message = f"{record.levelname} {record.message}"
        return super().formatMessage(record)


def request_line(facts: Mapping[str, Any]) -> str:
    """Return what a person wants to know about a request: who, what, how it ended, how fast."""
    path = facts["path"]
    if len(path) > LONGEST_PATH:
        path = path[: LONGEST_PATH - 1] + "…"
    words = [facts["client"], facts["method"], path, facts["status"], f"{facts['seconds']:.1f}s"]
    if facts.get("tokens_out"):
        words.append(f"{facts.get('tokens_in') or 0}+{facts['tokens_out']} tokens")
    if facts.get("tokens_per_second"):
        words.append(f"{facts['tokens_per_second']:.0f}/s")
    if facts.get("outcome") not in (None, "done"):
        words.append(facts["outcome"])
    return " ".join(map(str, words))


class _Follow(logging.Handler):
    """Passes each line to the file's writer and to the event bus; neither waits."""

    def __init__(self, file: LogFile, bus: EventBus) -> None:
        super().__init__()
        self._file = file
        self._hub = bus
        self.setFormatter(_OneLine(FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record) + "\n"
        self._file.put(line)
        self._hub.publish("proxy_log", {"text": line})


class _Unwaited(io.TextIOBase):
    """A replacement for standard output or error on which no writer ever blocks.

    A terminal whose user has pressed Ctrl-S, or a pipe that nobody reads, accepts no more text. A
    thread that writes to it would block, and so would every thread that needs a lock it holds.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._writer = Writer(stream.name, self._out)

    def write(self, text: str) -> int:
        self._writer.put(text)
        return len(text)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def finish(self) -> None:
        """Write what is queued, for a second at most."""
        self._writer.close()

    def _out(self, text: str) -> None:
        # This bypasses Python's own buffer: its lock, held by a thread that waits, would keep the
        # process from exiting.
        rest = text.encode(self.encoding, "replace")
        while rest:
            rest = rest[os.write(self._stream.fileno(), rest) :]


@contextmanager
def unwaited() -> Iterator[None]:
    """Make sure that within this block no print, log line or traceback waits for its reader."""
    with open(os.devnull, "w") as nowhere:  # a service may have neither stream
        output, error = _Unwaited(sys.stdout or nowhere), _Unwaited(sys.stderr or nowhere)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
                yield
        finally:
            output.finish()
            error.finish()


def to_terminal(level: str) -> None:
    """Log to standard error from now on; only warnings if it is not a terminal.

    A service's standard error is a file that nothing rotates; ``logs/proxy.log`` has everything.
    """
    terminal = logging.StreamHandler()
    if sys.stderr.isatty():
        terminal.setFormatter(_ForPeople())
    else:
        terminal.setFormatter(_OneLine(FORMAT, "%H:%M:%S"))
        terminal.setLevel(logging.WARNING)
    logging.basicConfig(level=level, handlers=[terminal])
    logging.getLogger("waitress").setLevel(logging.WARNING)  # it logs each client that disconnects
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    logging.getLogger("filelock").setLevel(logging.WARNING)


def to_followers(file: LogFile, bus: EventBus) -> None:
    """Log to the file and to the event bus, too, from now on."""
    logging.getLogger().addHandler(_Follow(file, bus))
