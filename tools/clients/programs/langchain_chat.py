"""LangChain, with the package that the environment names."""

import os

from harness import MODEL, QUESTION, URL, get_weather, main
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool


def model():
    package = os.environ["PROVIDER"]
    if package == "openai":
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(base_url=f"{URL}/v1", api_key="none", model=MODEL)
    if package == "responses":
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(base_url=f"{URL}/v1", api_key="none", model=MODEL, use_responses_api=True)
    if package == "anthropic":
        from langchain_anthropic import ChatAnthropic

        return ChatAnthropic(base_url=URL, api_key="none", model=MODEL, max_tokens=1000)
    from langchain_ollama import ChatOllama

    return ChatOllama(base_url=URL, model=MODEL)


def chat():
    return model().invoke(QUESTION).text


def stream():
    for chunk in model().stream(QUESTION):
        if chunk.text:
            yield chunk.text


def tools():
    bound = model().bind_tools([tool(get_weather)])
    messages = [HumanMessage(QUESTION)]
    while True:
        whole = None
        for chunk in bound.stream(messages):
            whole = chunk if whole is None else whole + chunk
        if not whole.tool_calls:
            return whole.text
        messages.append(whole)
        messages += [
            ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"])
            for call in whole.tool_calls
        ]


main(chat, stream, tools)
