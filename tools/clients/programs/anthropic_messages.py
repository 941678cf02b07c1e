"""anthropic for Python."""

from anthropic import Anthropic
from harness import MODEL, QUESTION, TOOL, URL, get_weather, main

client = Anthropic(base_url=URL, api_key="none")
USER = [{"role": "user", "content": QUESTION}]


def chat():
    message = client.messages.create(model=MODEL, max_tokens=1000, messages=USER)
    return "".join(block.text for block in message.content if block.type == "text")


def stream():
    with client.messages.stream(model=MODEL, max_tokens=1000, messages=USER) as events:
        yield from events.text_stream


def tools():
    offered = [
        {
            "name": TOOL["name"],
            "description": TOOL["description"],
            "input_schema": TOOL["parameters"],
        }
    ]
    messages = list(USER)
    assert client.messages.count_tokens(model=MODEL, messages=messages, tools=offered).input_tokens
    while True:
        with client.messages.stream(
            model=MODEL, max_tokens=1000, messages=messages, tools=offered
        ) as events:
            message = events.get_final_message()
        if message.stop_reason != "tool_use":
            return "".join(block.text for block in message.content if block.type == "text")
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": get_weather(**block.input)}
            for block in message.content
            if block.type == "tool_use"
        ]
        messages += [
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": results},
        ]


main(chat, stream, tools)
