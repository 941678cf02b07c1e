"""The tests' stand-in does what its script says."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support import scripted_server, tiny_models
from tests.support.server_process import QUESTION, Server, serve, text_of
from tests.support.waiting import until


def test_the_stand_in_records_a_disconnect(standin: tuple[Server, Path]) -> None:
    server, program = standin
    scripted_server.change(program, events=1000, interval=0.02)
    answer = server.send("POST", "/v1/chat/completions", {"messages": QUESTION, "stream": True})
    while b"ada2" not in answer.readline():
        pass
    answer.close()
    (end,) = until(lambda: scripted_server.record(program, "finished"), 2, "the end in the record")
    assert end["how"] == "client_gone"
    assert 3 <= end["events"] < 100
    (request,) = scripted_server.record(program, "request")
    assert request["body"] == {"messages": QUESTION, "stream": True}
    (start,) = scripted_server.record(program, "started")
    assert start["pid"] == server.process.pid
    assert start["offline"] == "1"
    assert "--model" in start["argv"]


@pytest.mark.parametrize("fault", ["die_after", "drop_after", "generation_dies_after"])
def test_a_scripted_fault_comes_after_exactly_that_many_events(
    standin: tuple[Server, Path], fault: str
) -> None:
    server, program = standin
    scripted_server.change(program, **{fault: 3})
    events = server.stream()
    assert text_of(events) == tiny_models.answer("ada", 3)
    assert events[-1] != "data: [DONE]"
    if fault == "die_after":
        assert server.process.wait(5) == -signal.SIGKILL
    else:
        healthy = server.send("GET", "/health").status
        assert healthy == (503 if fault == "generation_dies_after" else 200)


def test_a_scripted_load_failure_is_in_the_log_and_in_each_answer(tmp_path: Path) -> None:
    failure = {"load_failure": "Missing 12 parameters:", "load_seconds": 0.2}
    program = scripted_server.install(tmp_path / "bin", models={"beta": failure})
    with serve(program, Path("/models/beta"), tmp_path / "log") as server:
        assert server.chat() == {"error": "generation thread died"}
        assert server.send("GET", "/health").status == 503
        log = server.log.read_text()
    assert "ERROR - mlx_lm.server generation thread died: Missing 12 parameters:" in log
    with serve(program, Path("/models/alpha"), tmp_path / "log") as server:
        assert server.chat(max_tokens=1)["choices"][0]["message"]["content"] == "alpha0 "


def test_the_stand_in_serves_three_hundred_streams_at_once(standin: tuple[Server, Path]) -> None:
    server, program = standin
    scripted_server.change(program, events=5, interval=0.1, prefill_seconds=1)
    body = {"messages": QUESTION, "stream": True}
    answers = [server.send("POST", "/v1/chat/completions", body) for _ in range(300)]
    for answer in answers:
        text = answer.read().decode()
        assert text.endswith("data: [DONE]\n\n")
        assert all(f"ada{number} " in text for number in range(5))
