"""`mlxproxy chat`: a conversation at the terminal, or one question in a pipe."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import click
from rich.console import Console

from mlxproxy.commands import load, terminal
from mlxproxy.commands.client import Client, ClientError, Event, Refused

HELP = """\
/think, /no_think  turn thinking on and off
/clear             clear the conversation
/quit              leave (or press Ctrl-D)
Ctrl-C             stop an answer; at the prompt, leave
\"\"\"                begin and end a message of several lines"""
QUOTES = '"""'


def chat(client: Client, model: str | None, prompt: str | None, thinking: bool | None) -> None:
    """Talks until `/quit`; with a prompt or a pipe, answers that alone.

    Args:
        model: loaded first, if it is not loaded already.
        thinking: None: as the model was loaded.

    Raises:
        ClientError: no server, no such model, or (of one question) no whole answer.
    """
    piped = ""
    if not sys.stdin.isatty():
        piped = sys.stdin.buffer.read().decode("utf-8", "replace").strip()
    question = "\n\n".join(part for part in (prompt, piped) if part)
    if not question and not sys.stdin.isatty():
        raise click.UsageError("The input is empty: there is no prompt to answer.")
    if model is not None and not _is_loaded(client, model):
        load.bring(client, model, enable_thinking=thinking)
    conversation = Conversation(client, thinking)
    if question:
        conversation.ask(question)
    else:
        _talk(client, conversation)


def _is_loaded(client: Client, model: str) -> bool:
    """Whether that model is loaded, with whatever options: a chat is no reason to load it anew."""
    state = client.get("/v1/models/loaded")
    names = (str(state.get("id")).casefold(), str(state.get("model_id")).casefold())
    return model.casefold() in names or names[0].endswith("/" + model.casefold())


class Conversation:
    """What has been said, and whether the model is to think."""

    def __init__(self, client: Client, thinking: bool | None) -> None:
        self.thinking = thinking
        self._client = client
        self._output = terminal.output()
        self._messages: list[dict[str, str]] = []

    def clear(self) -> None:
        """Forgets what has been said."""
        self._messages.clear()

    def ask(self, question: str) -> None:
        """Asks and prints the answer as it comes; what there is of it is kept, if it is stopped.

        Raises:
            ClientError: there is no answer, or it was cut off.
        """
        self._messages.append({"role": "user", "content": question})
        answer = _Answer(self._output)
        try:
            self._receive(answer)
        finally:
            answer.end()
            if answer.text:
                self._messages.append({"role": "assistant", "content": answer.text})
            else:
                self._messages.pop()

    def _receive(self, answer: _Answer) -> None:
        # -1: as much as the model can; left out, the backend would stop at 512 tokens.
        body: dict[str, Any] = {"messages": self._messages, "stream": True, "max_tokens": -1}
        if self.thinking is not None:
            body["enable_thinking"] = self.thinking
        with closing(self._client.events("POST", "/v1/chat/completions", body)) as events:
            event = _first(events)
            while event is not None and event.data != "[DONE]":
                answer.take(event.json())
                event = next(events, None)
        if event is None:
            raise ClientError("The answer is incomplete: the connection was closed.")


def _first(events: Iterator[Event]) -> Event | None:
    """The first event that is no comment: those tell what the server waits for, or how far it has
    come in the prompt (a word and two numbers)."""
    with terminal.spinner(terminal.messages(), "waiting") as show:
        for event in events:
            if event.kind != "comment":
                return event
            if event.data:
                reading = r"reading the prompt: \1 of \2 tokens"
                show(re.sub(r"^\w+ (\d+)/(\d+)$", reading, event.data))
    return None


class _Answer:
    """One answer on its way to the screen; in a pipe, without the reasoning."""

    def __init__(self, output: Console) -> None:
        self.text = ""
        self._output = output
        self._reasoned = False

    def take(self, event: dict[str, Any]) -> None:
        """Prints what has come.

        Raises:
            Refused: the answer has failed.
        """
        if "error" in event:
            raise Refused(event["error"])
        for choice in event.get("choices", ()):
            self._add(choice.get("delta") or {})

    def _add(self, delta: dict[str, Any]) -> None:
        reasoning = delta.get("reasoning") or delta.get("reasoning_content")
        if reasoning and self._output.is_terminal:
            self._print(reasoning if self._reasoned else reasoning.lstrip(), style="dim italic")
            self._reasoned = True
        content = delta.get("content") or ""
        if not self.text:
            content = content.lstrip("\n")
            if content and self._reasoned:
                self._print("\n\n")
        self.text += content
        self._print(content)

    def end(self) -> None:
        """Leaves the line."""
        if self.text or self._reasoned:
            self._print("\n")

    def _print(self, text: str, style: str | None = None) -> None:
        if self._output.is_terminal:
            self._output.print(text, style=style, end="", soft_wrap=True)
        else:
            self._output.file.write(text)
            self._output.file.flush()


def _talk(client: Client, conversation: Conversation) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing and history

    console = terminal.output()
    state = client.get("/v1/models/loaded")
    name = state["id"] if state["loaded"] else "No model is loaded yet"
    console.print(f"{name}   /help for commands", style="dim")
    while True:
        try:
            question = _read()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        word = question.strip()
        if not word:
            continue
        if re.fullmatch(r"/\w+", word):
            if word in ("/quit", "/exit", "/bye"):
                return
            _obey(word, conversation, console)
            continue
        try:
            conversation.ask(question)
        except KeyboardInterrupt:
            console.print("(stopped)", style="dim")
        except ClientError as error:
            console.print(error.message, style="red", soft_wrap=True)
        console.print()


def _obey(command: str, conversation: Conversation, console: Console) -> None:
    if command in ("/think", "/no_think"):
        conversation.thinking = command == "/think"
        said = f"Thinking is {terminal.switch(conversation.thinking)}."
    elif command == "/clear":
        conversation.clear()
        said = "Conversation cleared."
    else:
        said = HELP if command == "/help" else f"Unknown command: {command}.\n{HELP}"
    console.print(said, style="dim")


def _read() -> str:
    """What the user says: a line, or many between triple quotes.

    Raises:
        EOFError, KeyboardInterrupt: the user leaves.
    """
    line = input("> ")
    if not line.startswith(QUOTES):
        return line
    lines = [line.removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(input(". "))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines).strip()
