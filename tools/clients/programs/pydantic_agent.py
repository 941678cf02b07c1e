"""pydantic-ai, with the model class that the environment names."""

import os

from harness import MODEL, QUESTION, URL, get_weather, main
from pydantic_ai import Agent


def model():
    kind = os.environ["PROVIDER"]
    if kind == "anthropic":
        from pydantic_ai.models.anthropic import AnthropicModel
        from pydantic_ai.providers.anthropic import AnthropicProvider

        return AnthropicModel(MODEL, provider=AnthropicProvider(base_url=URL, api_key="none"))
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
    if kind == "responses":
        from pydantic_ai.models.openai import OpenAIResponsesModel

        return OpenAIResponsesModel(MODEL, provider=provider)
    from pydantic_ai.models.openai import OpenAIChatModel

    return OpenAIChatModel(MODEL, provider=provider)


def chat():
    return Agent(model()).run_sync(QUESTION).output


def stream():
    result = Agent(model()).run_stream_sync(QUESTION)
    yield from result.stream_text(delta=True, debounce_by=None)


def tools():
    return Agent(model(), tools=[get_weather]).run_sync(QUESTION).output


main(chat, stream, tools)
