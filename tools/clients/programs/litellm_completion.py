"""litellm, with the provider that the environment names."""

import os

import litellm
from harness import MODEL, QUESTION, TOOL, URL, main, with_results

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
        messages += with_results(message)


main(chat, stream, tools)
