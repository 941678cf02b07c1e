"""One backend process, as far as it can be seen without one: what is asked of it, and how often."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from mlxproxy.backend import process
from mlxproxy.backend.process import ANSWER_BYTES, Backend
from mlxproxy.backend.protocol import Address, Command
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.errors import ProxyError
from tests.support.fake_backend import model_spec
from tests.support.fake_connection import SILENCE, FakeConnection, Piece, after
from tests.support.second_engine.engine import Second

Made = Callable[..., tuple[Backend, list[str]]]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Made:
    """A backend whose probes get that answer, and the reasons of its end."""

    def make(pieces: Iterable[Piece] = (), status: int = 200) -> tuple[Backend, list[str]]:
        connection = FakeConnection(pieces, status)
        monkeypatch.setattr(process, "BackendConnection", lambda *_, **__: connection)
        config: Any = None
        ended: list[str] = []
        address = Address("127.0.0.1", 1)
        return Backend(model_spec("a"), Second(), address, config, ended.append), ended

    return make


def test_the_command_line_that_is_recorded_is_the_one_that_is_run(
    backend: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program is looked for once: it may change between two looks."""
    looks: list[str] = []

    def command(self: Second, spec: ModelSpec, address: Address) -> Command:
        looks.append(spec.model_id)
        return Command(("/no/such/program", str(len(looks))), remedy="")

    monkeypatch.setattr(Second, "command", command)
    made, _ = backend()
    assert made.command() == made.command() == ["/no/such/program", "1"]


def test_only_a_final_fault_of_the_health_check_is_a_crash(backend: Made) -> None:
    busy, ended = backend(status=503)
    assert busy.check() is None
    dead, ended = backend(status=500)
    assert dead.check() == "its core has stopped"
    assert dead.check() == "its core has stopped"
    assert ended == ["its core has stopped"]


def test_an_answer_to_a_probe_that_never_ends_is_not_kept(backend: Made) -> None:
    pieces = 0

    def endless() -> Iterable[bytes]:
        nonlocal pieces
        while True:
            pieces += 1
            yield b" " * 65536

    made, _ = backend(endless())
    assert made.answers_probe(30)
    assert pieces == ANSWER_BYTES // 65536


def test_a_probe_is_given_up_at_its_time_and_at_the_end_of_the_process(backend: Made) -> None:
    silent = [SILENCE] * 10
    made, _ = backend(silent)
    assert not made.answers_probe(-1)
    made, ended = backend([*silent[:3], after(lambda: made.declare_hung("gone"), SILENCE), *silent])
    assert made.answers_probe(30) is False
    assert ended == ["gone"]


def test_a_failed_load_says_what_the_process_did_to_the_connection(backend: Made) -> None:
    made, _ = backend()
    told = made.failure("it does not speak HTTP")
    assert isinstance(told, ProxyError)
    assert told.message == "a: second.server could not load it: it does not speak HTTP"


def test_a_failed_load_shows_the_exceptions_of_its_log_but_no_traceback(backend: Made) -> None:
    made, _ = backend()
    log = [
        "2026-11-25 - ERROR - Error loading model",
        "Traceback (most recent call last):",
        '  File "server.py", line 1, in load',
        "ValueError: no weights",
        "",
        "During handling of the above exception, another exception occurred:",
        "",
        "ERROR:    Traceback (most recent call last):",
        "RuntimeError: cannot start",
    ]
    output: Any = SimpleNamespace(tail=lambda: log)
    made._output = output
    assert made.last_words() == [log[0], "ValueError: no weights", "RuntimeError: cannot start"]


def test_a_failed_load_quotes_the_output_up_to_the_end_of_the_process(
    backend: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reason that comes over the link may overtake the output."""
    output: list[str] = []
    monkeypatch.setattr(Backend, "stop", lambda self: output.append("the last line"))
    monkeypatch.setattr(Backend, "last_words", lambda self: list(output))
    made, _ = backend()
    made.declare_hung("its weights are odd")
    with pytest.raises(ProxyError) as raised:
        made._check_load(threading.Event(), time.monotonic() + 60)
    assert raised.value.body()["error"]["log"] == ["the last line"]
