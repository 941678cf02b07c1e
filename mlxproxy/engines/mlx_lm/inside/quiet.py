"""Filters that keep the texts of clients and models out of the backend's log.

`mlx_lm.server` logs the model's own text for a tool call that it cannot parse, the whole body if it
is not JSON, and tracebacks whose last line may quote either. Others read that log (`/v1/logs`, a
terminal), and the proxy would pass it on in errors. So a line of the server is written unchanged
only if it is of a kind that contains nothing but figures; for the others, only the place in the
code is written.
"""

from __future__ import annotations

import functools
import logging
import re
import socketserver
import sys
import threading
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from . import gate, tool_calls

FIGURES = re.compile(
    r"Prompt processing progress: \d+/\d+"
    r"|Prompt Cache: \d+ sequences, [\d.]+ GB"
    r"|- \w+: \d+ sequences, [\d.]+ GB"
    r"|Starting httpd at \S+ on port \d+\.\.\."
)
NAMES: gate.Names = {
    "ResponseGenerator._generate": ("self",),
    "ResponseGenerator._run_generate": ("self",),
}
# MLX's own messages: `[metal::malloc] …`, `[METAL] Command buffer execution failed: …`.
MLX_OWN = re.compile(r"\[[A-Za-z_:]+\] [ -~]{1,300}")


def arm(serving: Callable[[], bool]) -> None:
    """Patch the creation of log records, and what an HTTP server prints about a failed request.

    Args:
        serving: returns whether requests are served; before, errors are about the model's files.
    """
    make = logging.getLogRecordFactory()

    def quiet_record(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        servers = record.name == "root" and record.module == "server"
        if servers and serving() and not FIGURES.fullmatch(record.getMessage()):
            record.msg, record.args = _withheld(record), None
            record.exc_info = None
        return record

    def handle_error(self: Any, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError):
            logging.error("A request failed: %s", describe(error))

    show = threading.excepthook

    def excepthook(failed: threading.ExceptHookArgs) -> None:
        if serving() and failed.exc_value is not None:
            name = failed.thread.name if failed.thread else "?"
            print(f"Exception in thread {name}: {describe(failed.exc_value)}", file=sys.stderr)
        else:
            show(failed)

    logging.setLogRecordFactory(quiet_record)
    threading.excepthook = excepthook
    socketserver.BaseServer.handle_error = handle_error  # type: ignore[method-assign]


def arm_death(server: Any, serving: Callable[[], bool], died: Callable[[str], None]) -> None:
    """Report a crash of the generation thread, and its reason, through a channel without any texts.

    Args:
        server: `mlx_lm.server`.
        serving: returns whether requests are served, so that an error may contain a client's text.
        died: called with the reason, once the crash is in the log.

    Raises:
        Unexpected: it runs the generation thread in another way.
    """
    gate.require(server, NAMES)
    generator = server.ResponseGenerator
    generate, run = generator._generate, generator._run_generate
    crashes: list[str] = []

    @functools.wraps(generate)
    def _generate(self: Any) -> None:
        try:
            generate(self)
        except BaseException as error:
            crashes.append(reason(error, serving()))
            raise

    @functools.wraps(run)
    def _run_generate(self: Any) -> None:
        try:
            run(self)  # logs a crash, which must be in the output before the proxy learns of it
        finally:
            for crash in crashes:
                died(crash)

    generator._generate, generator._run_generate = _generate, _run_generate


def reason(error: BaseException, serving: bool) -> str:
    """Return why the generation crashed; once requests are served, without anybody's text."""
    text = str(error)
    if not serving or MLX_OWN.fullmatch(text):
        return text or type(error).__name__
    return f"{type(error).__name__} at {_place(error.__traceback__)}"


def describe(error: BaseException) -> str:
    """Return the error's type and the places in its traceback, without its message."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"{type(error).__name__}\n{frames}".rstrip()


def _place(trace: TracebackType | None) -> str:
    frames = traceback.extract_tb(trace)
    if not frames:
        return "an unknown place"
    return f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}"


def _withheld(record: logging.LogRecord) -> str:
    message = record.getMessage()
    if message.startswith("Received tools but model does not support tool calling"):
        return "Received tools, but the model does not support tool calling."
    if message.startswith(tool_calls.FAILED):
        return "A tool call of the model's could not be parsed."
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        return f"{message.partition(':')[0]}: {describe(error)}"
    return f"(text withheld, {record.filename}:{record.lineno})"
