"""openai for Python, chat completions."""

from harness import MODEL, TOOL, URL, main, with_results
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
        messages += with_results(message)


main(chat, stream, tools)
