"""OpenAI's own library over a stand-in that calls tools; `make clients` drives all the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.support import scripted_server
from tests.support.proxy import Proxy

QUESTION = [{"role": "user", "content": "How is the weather in Paris and in London?"}]
WEATHER = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALLS = [{"name": "get_weather", "arguments": {"city": city}} for city in ("Paris", "London")]


@pytest.fixture
def client(start: Callable[..., Proxy], models: Path, tmp_path: Path) -> OpenAI:
    program = scripted_server.install(tmp_path / "standin", calls=CALLS, thoughts=1, events=4)
    proxy = start(models, MLX_SERVER_BIN=program)
    return OpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0)


def test_a_streamed_message_goes_back_into_the_conversation_as_it_is(client: OpenAI) -> None:
    messages: list[Any] = list(QUESTION)
    tools: Any = [{"type": "function", "function": WEATHER}]
    with client.chat.completions.stream(
        model="tiny/alpha", messages=messages, tools=tools
    ) as events:
        message = events.get_final_completion().choices[0].message
    assert message.role == "assistant"
    messages.append(message.model_dump(exclude_none=True))
    for call in message.tool_calls or ():
        city = json.loads(call.function.arguments)["city"]
        messages.append({"role": "tool", "tool_call_id": call.id, "content": f"sunny in {city}"})
    with client.chat.completions.stream(
        model="tiny/alpha", messages=messages, tools=tools
    ) as events:
        message = events.get_final_completion().choices[0].message
    said = "The tool said: sunny in Paris; sunny in London. alpha1 alpha2 alpha3 "
    assert message.content == said


def test_a_streamed_response_goes_on_by_its_id(client: OpenAI) -> None:
    tools: Any = [{"type": "function", "strict": False, **WEATHER}]
    items: Any = QUESTION
    with client.responses.stream(model="tiny/alpha", input=items, tools=tools) as events:
        response = events.get_final_response()
    calls = [item for item in response.output if item.type == "function_call"]
    assert [json.loads(call.arguments)["city"] for call in calls] == ["Paris", "London"]
    results: Any = [
        {"type": "function_call_output", "call_id": call.call_id, "output": call.arguments}
        for call in calls
    ]
    response = client.responses.create(
        model="tiny/alpha", input=results, previous_response_id=response.id, tools=tools
    )
    assert response.output_text.startswith('The tool said: {"city": "Paris"}; {"city": "London"}.')
