"""The tests' tiny models answer in the real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import tiny_models
from tests.support.server_process import SERVER_BIN, Server, serve, text_of

NO_THOUGHTS = {"enable_thinking": False}

TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_tiny_model_gives_the_expected_answer_to_the_last_token(
    real: Server, temperature: int
) -> None:
    fields = {"max_tokens": 300, "temperature": temperature, "chat_template_kwargs": NO_THOUGHTS}
    assert text_of(real.stream(**fields)) == tiny_models.answer("ada", 300)
    assert real.chat(**fields)["choices"][0]["message"]["content"] == tiny_models.answer("ada", 300)


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


def test_a_tiny_model_calls_a_tool(real: Server) -> None:
    (choice,) = real.chat(max_tokens=50, tools=TOOLS)["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert json.loads(call["function"]["arguments"]) == tiny_models.TOOL_CALL["arguments"]


def test_a_quantized_model_in_shards_ends_its_answer_itself(tmp_path: Path) -> None:
    model = tiny_models.build(
        tmp_path / "m", arch="llama", quantize=4, shards=2, heads=2, length=5, thinking=False
    )
    with serve(SERVER_BIN, model, tmp_path / "log") as server:
        (choice,) = server.chat(max_tokens=50)["choices"]
    assert choice["message"]["content"] == tiny_models.answer("w", 5)
    assert choice["finish_reason"] == "stop"
