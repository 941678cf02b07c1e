"""The tests' own tools: tiny models answer in the real server, and the stand-in speaks like it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SERVER_BIN, free_port, until
from tests.support import scripted_server, tiny_models

pytestmark = pytest.mark.standin

QUESTION = [{"role": "user", "content": "Hello!"}]
NO_THOUGHTS = {"enable_thinking": False}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]


class Server:
    """A running `mlx_lm.server`, or its stand-in."""

    def __init__(self, program: Path, model: Path, log: Path) -> None:
        self.port, self.log = free_port(), log
        command = [str(program), "--model", str(model), "--port", str(self.port)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--chat-template-args", "{}"],
                stdout=output,
                stderr=output,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )

    def opens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
            return True
        return False

    def send(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, None if body is None else json.dumps(body))
        return connection.getresponse()

    def chat(self, **fields: Any) -> Any:
        answer = self.send("POST", "/v1/chat/completions", {"messages": QUESTION, **fields})
        return json.load(answer)

    def stream(self, path: str = "/v1/chat/completions", **fields: Any) -> list[Any]:
        """The events of a stream; comments and `[DONE]` as the text they are."""
        body = {"messages": QUESTION, "prompt": "Hello!", "stream": True, **fields}
        blocks = self.send("POST", path, body).read().decode().split("\n\n")
        assert blocks.pop() == ""
        return [json.loads(block[6:]) if block.startswith("data: {") else block for block in blocks]


@contextlib.contextmanager
def serve(program: Path, model: Path, log: Path) -> Iterator[Server]:
    server = Server(program, model, log)
    try:
        until(server.opens, 30, "the open port")
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("real")
    with serve(SERVER_BIN, tiny_models.build(folder / "ada", says="ada"), folder / "log") as server:
        yield server


@pytest.fixture
def pretender(tmp_path: Path) -> Iterator[tuple[Server, Path]]:
    """A running stand-in and its executable."""
    program = scripted_server.install(tmp_path / "bin")
    with serve(program, Path("/models/ada"), tmp_path / "log") as server:
        yield server, program


def text_of(events: list[Any]) -> str:
    choices = [event["choices"] for event in events if isinstance(event, dict)]
    return "".join(choice[0]["delta"].get("content", "") for choice in choices if choice)


# -- tiny models


@pytest.mark.backend
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_tiny_model_says_what_it_must_to_the_last_token(real: Server, temperature: int) -> None:
    fields = {"max_tokens": 300, "temperature": temperature, "chat_template_kwargs": NO_THOUGHTS}
    assert text_of(real.stream(**fields)) == tiny_models.answer("ada", 300)
    assert real.chat(**fields)["choices"][0]["message"]["content"] == tiny_models.answer("ada", 300)


@pytest.mark.backend
def test_thinking_shows_in_the_answer_and_in_the_length_of_the_prompt(real: Server) -> None:
    thoughtful = real.chat(max_tokens=tiny_models.THOUGHTS + 2 + 5)
    plain = real.chat(max_tokens=5, chat_template_kwargs=NO_THOUGHTS)
    message = thoughtful["choices"][0]["message"]
    assert message["reasoning"] == tiny_models.thoughts()
    assert (
        message["content"]
        == plain["choices"][0]["message"]["content"]
        == tiny_models.answer("ada", 5)
    )
    # <think>, "\n\n", </think>, "\n\n"
    assert plain["usage"]["prompt_tokens"] == thoughtful["usage"]["prompt_tokens"] + 4


@pytest.mark.backend
def test_a_tiny_model_calls_a_tool(real: Server) -> None:
    (choice,) = real.chat(max_tokens=50, tools=TOOLS)["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert json.loads(call["function"]["arguments"]) == tiny_models.TOOL_CALL["arguments"]


@pytest.mark.backend
def test_a_quantized_model_in_shards_ends_its_answer_itself(tmp_path: Path) -> None:
    model = tiny_models.build(
        tmp_path / "m", arch="llama", quantize=4, shards=2, heads=2, length=5, thinking=False
    )
    with serve(SERVER_BIN, model, tmp_path / "log") as server:
        (choice,) = server.chat(max_tokens=50)["choices"]
    assert choice["message"]["content"] == tiny_models.answer("w", 5)
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("how", tiny_models.DEFECTS)
def test_a_broken_model_differs_from_a_whole_one(tmp_path: Path, how: str) -> None:
    def content(folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    whole = tiny_models.build(tmp_path / "whole", shards=2)
    broken = tiny_models.break_model(tiny_models.build(tmp_path / "broken", shards=2), how)
    assert content(whole) != content(broken)


# -- the stand-in


def shape(answer: Any) -> Any:
    """The keys and types of an answer, without its values; of keepalives that there are some."""
    if isinstance(answer, dict):
        return {key: shape(value) for key, value in answer.items()}
    if isinstance(answer, list):
        kept = [value for value in answer if not str(value).startswith(": keepalive")]
        return [len(kept) < len(answer), *map(shape, kept)]
    return answer if answer == "data: [DONE]" else type(answer).__name__


@pytest.mark.backend
@pytest.mark.parametrize("thoughts", [0, 1])
def test_the_stand_in_answers_in_the_shape_of_the_real_server(
    real: Server, pretender: tuple[Server, Path], thoughts: int
) -> None:
    fake, program = pretender
    scripted_server.change(program, thoughts=thoughts)
    # A thinking model's first token, <think>, makes no event.
    of_fake = {"max_tokens": 1, "stream_options": {"include_usage": True}}
    of_real = {**of_fake, "max_tokens": 2} if thoughts else of_fake
    of_real = {**of_real, "chat_template_kwargs": {"enable_thinking": bool(thoughts)}}
    assert shape(fake.chat(**of_fake)) == shape(real.chat(**of_real))
    assert shape(fake.stream(**of_fake)) == shape(real.stream(**of_real))


@pytest.mark.backend
@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}])
def test_the_stand_in_ends_a_stream_as_the_real_server_does(
    real: Server, pretender: tuple[Server, Path], options: Any
) -> None:
    fields = {"path": "/v1/completions", "max_tokens": 2, "stream_options": options}
    assert shape(pretender[0].stream(**fields)) == shape(real.stream(**fields))


@pytest.mark.backend
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/health", None),
        ("GET", "/nothing", None),
        ("POST", "/nothing", {}),
        ("POST", "/v1/chat/completions", {}),
        ("POST", "/v1/chat/completions", {"messages": QUESTION, "max_tokens": 1}),
        ("POST", "/v1/chat/completions", {"messages": QUESTION, "max_tokens": 1, "stream": True}),
        ("POST", "/v1/completions", {"prompt": None}),
    ],
)
def test_the_stand_in_has_the_status_and_headers_of_the_real_server(
    real: Server, pretender: tuple[Server, Path], method: str, path: str, body: Any
) -> None:
    def head(server: Server) -> tuple[int, int, list[str], str | None, bytes]:
        answer = server.send(method, path, body)
        names = sorted(name.lower() for name, _ in answer.getheaders())
        start = b"" if answer.status == 200 else answer.read()[:20]
        return answer.version, answer.status, names, answer.getheader("Content-type"), start

    assert head(pretender[0]) == head(real)


def test_the_stand_in_records_a_client_that_leaves(pretender: tuple[Server, Path]) -> None:
    server, program = pretender
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
def test_a_scripted_end_comes_after_exactly_that_many_events(
    pretender: tuple[Server, Path], fault: str
) -> None:
    server, program = pretender
    scripted_server.change(program, **{fault: 3})
    events = server.stream()
    assert text_of(events) == tiny_models.answer("ada", 3)
    assert events[-1] != "data: [DONE]"
    if fault == "die_after":
        assert server.process.wait(5) == -signal.SIGKILL
    else:
        healthy = server.send("GET", "/health").status
        assert healthy == (503 if fault == "generation_dies_after" else 200)


def test_a_load_that_fails_says_so_in_the_log_and_to_each_request(tmp_path: Path) -> None:
    failure = {"load_failure": "Missing 12 parameters:", "load_seconds": 0.2}
    program = scripted_server.install(tmp_path / "bin", models={"beta": failure})
    with serve(program, Path("/models/beta"), tmp_path / "log") as server:
        assert server.chat() == {"error": "generation thread died"}
        assert server.send("GET", "/health").status == 503
        log = server.log.read_text()
    assert "ERROR - mlx_lm.server generation thread died: Missing 12 parameters:" in log
    with serve(program, Path("/models/alpha"), tmp_path / "log") as server:
        assert server.chat(max_tokens=1)["choices"][0]["message"]["content"] == "alpha0 "


def test_three_hundred_streams_at_once_lose_nothing(pretender: tuple[Server, Path]) -> None:
    server, program = pretender
    scripted_server.change(program, events=5, interval=0.1, prefill_seconds=1)
    body = {"messages": QUESTION, "stream": True}
    answers = [server.send("POST", "/v1/chat/completions", body) for _ in range(300)]
    for answer in answers:
        text = answer.read().decode()
        assert text.endswith("data: [DONE]\n\n")
        assert all(f"ada{number} " in text for number in range(5))
