"""The tests' stand-in speaks like the real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import scripted_server
from tests.support.server_process import QUESTION, Server


def outline(answer: Any) -> Any:
    """The keys and types of an answer, without its values; of keepalives that there are some."""
    if isinstance(answer, dict):
        return {key: outline(value) for key, value in answer.items()}
    if isinstance(answer, list):
        kept = [value for value in answer if not str(value).startswith(": keepalive")]
        return [len(kept) < len(answer), *map(outline, kept)]
    return answer if answer == "data: [DONE]" else type(answer).__name__


@pytest.mark.parametrize("thoughts", [0, 1])
def test_the_stand_in_answers_in_the_shape_of_the_real_server(
    real: Server, standin: tuple[Server, Path], thoughts: int
) -> None:
    fake, program = standin
    scripted_server.change(program, thoughts=thoughts)
    # A thinking model's first token, <think>, makes no event.
    of_fake = {"max_tokens": 1, "stream_options": {"include_usage": True}}
    of_real = {**of_fake, "max_tokens": 2} if thoughts else of_fake
    of_real = {**of_real, "chat_template_kwargs": {"enable_thinking": bool(thoughts)}}
    assert outline(fake.chat(**of_fake)) == outline(real.chat(**of_real))
    assert outline(fake.stream(**of_fake)) == outline(real.stream(**of_real))


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}])
def test_the_stand_in_ends_a_stream_as_the_real_server_does(
    real: Server, standin: tuple[Server, Path], options: Any
) -> None:
    fields = {"path": "/v1/completions", "max_tokens": 2, "stream_options": options}
    assert outline(standin[0].stream(**fields)) == outline(real.stream(**fields))


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
    real: Server, standin: tuple[Server, Path], method: str, path: str, body: Any
) -> None:
    def head(server: Server) -> tuple[int, int, list[str], str | None, bytes]:
        answer = server.send(method, path, body)
        names = sorted(name.lower() for name, _ in answer.getheaders())
        start = b"" if answer.status == 200 else answer.read()[:20]
        return answer.version, answer.status, names, answer.getheader("Content-type"), start

    assert head(standin[0]) == head(real)
