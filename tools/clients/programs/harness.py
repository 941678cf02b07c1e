"""What the programs share: they are run as ``program.py CHECK``, with the server in URL and MODEL.

A program prints one JSON object: `text`, `pieces` (of a stream) or `error`.
"""

import json
import os
import sys

URL = os.environ["URL"]
MODEL = os.environ["MODEL"]
QUESTION = "How is the weather in Paris and in London?"
TOOL = {
    "name": "get_weather",
    "description": "Return the weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city's name"}},
        "required": ["city"],
    },
}


def get_weather(city: str) -> str:
    """Return the weather in a city.

    Args:
        city: The city's name
    """
    return f"sunny in {city}"


def with_results(message):
    """Return a message of a chat completion with calls, and the results of its calls."""
    results = [
        {
            "role": "tool",
            "tool_call_id": call.id,
            "content": get_weather(**json.loads(call.function.arguments)),
        }
        for call in message.tool_calls
    ]
    return [message.model_dump(exclude_none=True), *results]


def main(chat, stream, tools):
    """Run the check that the command line names.

    Args:
        chat: returns the text of a whole answer.
        stream: yields the pieces of an answer's text.
        tools: answers the model's calls until it says something, and returns that.
    """
    check = sys.argv[1]
    try:
        if check == "tools":
            told = {"text": tools()}
        elif check == "chat":
            told = {"text": chat()}
        elif check == "leave":
            pieces = stream()
            told = {"text": next(pieces)}
            pieces.close()
        else:
            pieces = list(stream())
            told = {"text": "".join(pieces), "pieces": len(pieces)}
    except Exception as error:
        told = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(told))
