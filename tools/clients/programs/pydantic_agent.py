"""pydantic-ai, with the model class that the environment names."""

import asyncio
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
    async def pieces():
        async with Agent(model()).run_stream(QUESTION) as result:
            async for piece in result.stream_text(delta=True, debounce_by=None):
                yield piece

    loop, each = asyncio.new_event_loop(), pieces()
    try:
        while True:
            yield loop.run_until_complete(anext(each))
    except StopAsyncIteration:
        pass
    finally:
        loop.run_until_complete(each.aclose())


def tools():
    return Agent(model(), tools=[get_weather]).run_sync(QUESTION).output


main(chat, stream, tools)
