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


# -- what a person sees

FACTS = {
    "id": "0123456789abcdef0123456789abcdef",
    "client": "192.168.1.50",
    "method": "POST",
    "path": "/v1/chat/completions",
    "status": 200,
    "seconds": 12.345,
    "model": "lmstudio-community/Qwen3-Coder-30B-A3B-Instruct-2507-MLX-4bit",
    "outcome": "done",
    "tokens_in": 3073,
    "cached_tokens": 3000,
    "tokens_out": 100,
    "waited": 0.0,
    "first_token": 0.4,
    "tokens_per_second": 45.12,
}


def record(level: int = logging.INFO, **facts: Any) -> logging.LogRecord:
    made = logging.LogRecord("mlxproxy.request", level, "", 0, "%s", ("id=…",), None)
    if facts:
        setattr(made, logs.REQUEST, facts)
    return made


def test_a_request_takes_one_line_of_80_columns_at_a_terminal() -> None:
    line = logs._ForPeople().format(record(**FACTS))
    said = line.partition(" ")[2]
    assert said == "192.168.1.50 POST /v1/chat/completions 200 12.3s 3073+100 tokens 45/s"
    assert len(line) <= 80


def test_an_answer_that_failed_says_how() -> None:
    line = logs._ForPeople().format(record(**{**FACTS, "outcome": "client_gone"}))
    assert line.endswith(" client_gone")


def test_a_long_or_hostile_path_stays_one_line() -> None:
    facts = {"client": "127.0.0.1", "method": "GET", "status": 404, "seconds": 0.0}
    line = logs._ForPeople().format(record(**facts, path="/\x1b[2J" + "x" * 200))
    assert len(line) <= 80
    assert line.isprintable()


def test_the_log_file_keeps_all_of_a_request() -> None:
    assert logs._OneLine(logs.FORMAT).format(record(**FACTS)).endswith(": id=…")


def test_other_lines_at_a_terminal_say_their_level_if_it_is_not_the_usual_one() -> None:
    people = logs._ForPeople()
    assert people.format(record()).partition(" ")[2] == "id=…"
    assert people.format(record(logging.WARNING)).partition(" ")[2] == "WARNING id=…"
