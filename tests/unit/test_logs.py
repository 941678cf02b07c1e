"""One line of the log for each record, whoever has written it."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

from mlxproxy.observability import logs
from mlxproxy.observability.events import EventBus
from tests.support.network import FORGED


def test_a_long_log_line_of_a_library_is_cut() -> None:
    lines: list[str] = []
    file: Any = SimpleNamespace(put=lines.append)
    before = list(logging.getLogger().handlers)
    logs.to_followers(file, EventBus())
    (added,) = [it for it in logging.getLogger().handlers if it not in before]
    try:
        logging.getLogger("waitress").error("Exception while serving %s", "/x" * 30_000)
    finally:
        logging.getLogger().removeHandler(added)
    assert len(lines[0]) < 5000


def test_a_log_record_of_a_library_stays_one_line() -> None:
    """waitress tells at INFO which path a client left, as the client wrote it."""
    lines: list[str] = []
    file: Any = SimpleNamespace(put=lines.append)
    before = list(logging.getLogger().handlers)
    logs.to_followers(file, EventBus())
    (added,) = [it for it in logging.getLogger().handlers if it not in before]
    try:
        waitress = logging.getLogger("waitress")
        waitress.warning("Client disconnected while serving %s", f"/x\n{FORGED}\x1b[2J\u2028")
        try:
            raise ValueError(f"no /x\n{FORGED}")
        except ValueError:
            waitress.exception("Exception while serving")
    finally:
        logging.getLogger().removeHandler(added)
    first, second = lines
    assert first.endswith("\n")
    assert first[:-1].isprintable()
    assert FORGED in first, "it is told, on its line"
    assert "Traceback" in second
    assert not any(line.startswith(FORGED[:8]) for line in second.splitlines()), second
