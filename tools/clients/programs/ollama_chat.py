"""ollama for Python."""

from harness import MODEL, QUESTION, URL, get_weather, main
from ollama import Client

client = Client(host=URL)
USER = [{"role": "user", "content": QUESTION}]


def chat():
    assert MODEL in [model.model for model in client.list().models]
    return client.chat(MODEL, USER).message.content


def stream():
    for part in client.chat(MODEL, USER, stream=True):
        if part.message.content:
            yield part.message.content


def tools():
    assert "tools" in client.show(MODEL).capabilities
    messages = list(USER)
    while True:
        answer = client.chat(MODEL, messages, tools=[get_weather])
        if not answer.message.tool_calls:
            return answer.message.content
        messages.append(answer.message)
        for call in answer.message.tool_calls:
            name, result = call.function.name, get_weather(**call.function.arguments)
            messages.append({"role": "tool", "tool_name": name, "content": result})


main(chat, stream, tools)
