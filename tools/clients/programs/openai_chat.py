"""openai for Python, chat completions."""

import json

from harness import MODEL, TOOL, URL, get_weather, main
from openai import OpenAI

client = OpenAI(base_url=f"{URL}/v1", api_key="none")
MESSAGES = [{"role": "user", "content": "How is the weather in Paris and in London?"}]


def chat():
    return client.chat.completions.create(model=MODEL, messages=MESSAGES).choices[0].message.content


def stream():
    for chunk in client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True):
        for choice in chunk.choices:
            if choice.delta.content:
                yield choice.delta.content


def tools():
    offered = [{"type": "function", "function": TOOL}]
    messages = list(MESSAGES)
    while True:
        with client.chat.completions.stream(
            model=MODEL, messages=messages, tools=offered
        ) as events:
            message = events.get_final_completion().choices[0].message
        if not message.tool_calls:
            return message.content
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            result = get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


main(chat, stream, tools)
