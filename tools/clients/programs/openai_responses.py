"""openai for Python, Responses."""

import json

from harness import MODEL, QUESTION, TOOL, URL, get_weather, main
from openai import OpenAI

client = OpenAI(base_url=f"{URL}/v1", api_key="none")


def chat():
    return client.responses.create(model=MODEL, input=QUESTION).output_text


def stream():
    with client.responses.stream(model=MODEL, input=QUESTION) as events:
        for event in events:
            if event.type == "response.output_text.delta":
                yield event.delta


def tools():
    items = [{"role": "user", "content": QUESTION}]
    offered = [{"type": "function", "strict": False, **TOOL}]
    previous = None
    while True:
        with client.responses.stream(
            model=MODEL, input=items, tools=offered, previous_response_id=previous
        ) as events:
            response = events.get_final_response()
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            return response.output_text
        previous = response.id
        items = [
            {
                "type": "function_call_output",
                "call_id": call.call_id,
                "output": get_weather(**json.loads(call.arguments)),
            }
            for call in calls
        ]


main(chat, stream, tools)
