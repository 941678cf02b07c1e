"""The proxy's own log: to the terminal, to a rotated file, and to those who follow it."""

from __future__ import annotations

import logging
import sys
import textwrap
from typing import Any

from mlxproxy.backendlog import LogFile
from mlxproxy.hub import Hub

FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


class _OneLine(logging.Formatter):
    """A record is one line, whatever a client has sent; a traceback of ours may follow."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        line = super().formatMessage(record)
        if line.isprintable():
            return line
        return "".join(it if it.isprintable() else ascii(it)[1:-1] for it in line)

    def format(self, record: logging.LogRecord) -> str:
        record.exc_text = None  # another handler's formatter may have left it there
        return super().format(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return textwrap.indent(super().formatException(ei), "    ")


class _Follow(logging.Handler):
    """Hands each line to the file's writer and to the hub; neither waits."""

    def __init__(self, file: LogFile, hub: Hub) -> None:
        super().__init__()
        self._file = file
        self._hub = hub
        self.setFormatter(_OneLine(FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record) + "\n"
        self._file.put(line)
        self._hub.publish("proxy_log", {"text": line})


def to_terminal(level: str) -> None:
    """Logs to standard error from now on: warnings only, where nobody watches it.

    A service's standard error is a file that nothing rotates; all is in ``logs/proxy.log``.
    """
    terminal = logging.StreamHandler()
    terminal.setFormatter(_OneLine(FORMAT, "%H:%M:%S"))
    if not sys.stderr.isatty():
        terminal.setLevel(logging.WARNING)
    logging.basicConfig(level=level, handlers=[terminal])
    logging.getLogger("waitress").setLevel(logging.WARNING)  # told of each client that leaves
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    logging.getLogger("filelock").setLevel(logging.WARNING)


def to_followers(file: LogFile, hub: Hub) -> None:
    """Logs to the file and to the hub from now on, too."""
    logging.getLogger().addHandler(_Follow(file, hub))
