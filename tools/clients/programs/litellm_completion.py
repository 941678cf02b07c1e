"""litellm, with the provider that the environment names."""

import json
import os

import litellm
from harness import MODEL, QUESTION, TOOL, URL, get_weather, main

litellm.suppress_debug_info = True
PROVIDER = os.environ["PROVIDER"]
BASE = f"{URL}/v1" if PROVIDER == "openai" else URL
USER = [{"role": "user", "content": QUESTION}]


def complete(messages, **fields):
    return litellm.completion(
        f"{PROVIDER}/{MODEL}", api_base=BASE, api_key="none", messages=messages, **fields
    )


def chat():
    return complete(USER).choices[0].message.content


def stream():
    for chunk in complete(USER, stream=True):
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


def tools():
    messages = list(USER)
    while True:
        chunks = list(
            complete(messages, tools=[{"type": "function", "function": TOOL}], stream=True)
        )
        message = litellm.stream_chunk_builder(chunks).choices[0].message
        if not message.tool_calls:
            return message.content
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            result = get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


main(chat, stream, tools)
