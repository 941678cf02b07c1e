"""`mlxproxy chat`: a conversation at the terminal, or a single question in a pipe."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import click
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType

from mlxproxy.commands import load, ls, terminal
from mlxproxy.commands.client import Client, ClientError, Event, Refused
from mlxproxy.commands.wrapping import Wrapper
from mlxproxy.text import harmless

HELP = """\
/models            list the models
/load NAME         load a model, by a number of that list or its name
/unload            unload the model
/system TEXT       give the model instructions; without TEXT, remove them
/think, /no_think  turn thinking on and off
/clear             clear the conversation
/help              show this
/quit              leave (or press Ctrl-D)
Ctrl-C             stop an answer; at the prompt, leave
\"\"\"                begin and end a message of several lines"""
QUOTES = '"""'


def chat(
    client: Client,
    model: str | None,
    prompt: str | None,
    thinking: bool | None,
    system: str | None,
) -> None:
    """Chat until `/quit`; with a prompt or piped input, answer only that.

    Args:
        model: load it first, unless it is already loaded; None: use the loaded model.
        thinking: None: keep what the model was loaded with.
        system: instructions for the model.

    Raises:
        ClientError: there is no server, no such model, or (for one question) no complete answer.
    """
    piped = ""
    if not sys.stdin.isatty():
        piped = sys.stdin.buffer.read().decode("utf-8", "replace").strip()
    question = "\n\n".join(part for part in (prompt, piped) if part)
    if not question and not sys.stdin.isatty():
        raise click.UsageError("The input is empty: there is no prompt to answer.")
    conversation = Conversation(client, thinking, system)
    if model is not None:
        conversation.model = _require(client, model, thinking)
    if question:
        conversation.ask(question)
    else:
        Dialogue(client, conversation).run()


def _require(client: Client, model: str, thinking: bool | None) -> str:
    """Load the model, unless it is already loaded with any options; return its id."""
    state = client.get("/v1/models/loaded")
    id_ = str(state.get("id"))
    names = (id_.casefold(), str(state.get("model_id")).casefold())
    if model.casefold() in names or names[0].endswith("/" + model.casefold()):
        return id_
    return str(load.load_with_progress(client, model, enable_thinking=thinking)["id"])


class Conversation:
    """The messages so far, the model they go to, and how it is to answer.

    Attributes:
        model: the id of the model; None: whichever one is loaded.
        thinking: None: keep what the model was loaded with.
        system: instructions for the model.
    """

    def __init__(self, client: Client, thinking: bool | None, system: str | None) -> None:
        self.model: str | None = None
        self.thinking = thinking
        self.system = system
        self._client = client
        self._output = terminal.output()
        self._messages: list[dict[str, str]] = []

    def clear(self) -> None:
        """Forget all messages."""
        self._messages.clear()

    def ask(self, question: str) -> str:
        """Ask, and print the answer as it arrives; return its figures in words.

        The part of an aborted answer that has arrived is kept.

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
        return answer.figures()

    def _receive(self, answer: _Answer) -> None:
        with closing(self._client.events("POST", "/v1/chat/completions", self._body())) as events:
            event = _first(events)
            while event is not None and event.data != "[DONE]":
                answer.take(event.json())
                event = next(events, None)
        if event is None:
            raise ClientError("The answer is incomplete: the connection was closed.")

    def _body(self) -> dict[str, Any]:
        instructions = [{"role": "system", "content": self.system}] if self.system else []
        # -1: as many as the model can; without it, the backend would stop at 512 tokens.
        body: dict[str, Any] = {"messages": [*instructions, *self._messages], "max_tokens": -1}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.model is not None:
            body["model"] = self.model
        if self.thinking is not None:
            body["enable_thinking"] = self.thinking
        return body


def _first(events: Iterator[Event]) -> Event | None:
    """Return the first event that isn't a comment; comments say what the server is waiting for."""
    with terminal.spinner(terminal.messages(), "waiting") as show:
        for event in events:
            if event.kind != "comment":
                return event
            if event.data:
                reading = r"reading the prompt: \1 of \2 tokens"
                show(re.sub(r"^\w+ (\d+)/(\d+)$", reading, event.data))
    return None


class _Answer:
    """An answer that is being printed; in a pipe, without the reasoning."""

    def __init__(self, output: Console) -> None:
        self.text = ""
        self._output = output
        self._wrapper = Wrapper()
        self._reasoned = False
        self._first: float | None = None
        self._last = 0.0
        self._tokens = 0

    def take(self, event: dict[str, Any]) -> None:
        """Print the content of an event.

        Raises:
            Refused: the answer has failed.
        """
        if "error" in event:
            raise Refused(event["error"])
        self._tokens = (event.get("usage") or {}).get("completion_tokens") or self._tokens
        for choice in event.get("choices", ()):
            self._last = time.monotonic()
            self._first = self._first or self._last
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
        """Terminate the line."""
        if self.text or self._reasoned:
            self._print("\n")

    def figures(self) -> str:
        """Return the number of tokens and their speed, as far as they are known."""
        if not self._tokens:
            return ""
        said = f"{self._tokens} token{'s' if self._tokens > 1 else ''}"
        seconds = self._last - (self._first or self._last)
        if self._tokens < 2 or seconds <= 0:
            return said
        return f"{said}, {(self._tokens - 1) / seconds:.1f} tokens/s"

    def _print(self, text: str, style: str | None = None) -> None:
        output = self._output
        if not output.is_terminal:
            output.file.write(text)
            output.file.flush()
            return
        erase, shown = self._wrapper.feed(harmless(text), output.width)
        if erase:
            output.control(
                Control((ControlType.CURSOR_BACKWARD, erase), (ControlType.ERASE_IN_LINE, 0))
            )
        output.print(shown, style=style, end="", soft_wrap=True)


class Dialogue:
    """The user's side at a terminal: questions, and commands that begin with a slash."""

    def __init__(self, client: Client, conversation: Conversation) -> None:
        self._client = client
        self._conversation = conversation
        self._console = terminal.output()
        self._listed: list[str] = []  # the ids whose numbers the user has seen

    def run(self) -> None:
        """Chat until the user leaves.

        Raises:
            ClientError: there is no server, or no model that can be loaded.
        """
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() its line editing and history

        with suppress(EOFError):
            self._begin()
            while True:
                try:
                    question = _read()
                except KeyboardInterrupt:
                    break
                if not question.strip():
                    continue
                if question.strip() in ("/quit", "/exit", "/bye"):
                    return
                try:
                    if not self._obey(question):
                        self._say(self._conversation.ask(question))
                        self._console.print()
                except KeyboardInterrupt:
                    self._say("(stopped)")
                except ClientError as error:
                    self._complain(error)
        self._console.print()

    def _begin(self) -> None:
        """Print which model answers; if none is loaded, let the user choose one."""
        state = self._client.get("/v1/models/loaded")
        coming = (state.get("transition") or {}).get("id")
        if state["loaded"]:
            self._conversation.model = self._conversation.model or state["id"]
        elif coming:
            self._say(f"{coming} is being loaded.")
        elif self._conversation.model is None:
            self._choose()
        self._say(f"{self._conversation.model or coming}   /help for commands")

    def _choose(self) -> None:
        """Load the only model, or the one that the user chooses."""
        models = self._models()
        if not models:
            raise ClientError("No model can be loaded. `mlxproxy ls --all` says why.")
        if len(models) == 1:
            self._load(models[0]["id"])
            return
        self._show(models)
        while self._conversation.model is None:
            try:
                self._load(input("Load which model? (number or name) "))
            except KeyboardInterrupt:
                raise EOFError from None
            except ClientError as error:
                self._complain(error)

    # -- commands

    def _obey(self, line: str) -> bool:
        """Run the line if it is a command; return whether it is one."""
        match = re.fullmatch(r"/(\w+)(?:\s+(.*))?", line.strip(), re.DOTALL)
        if match is None:
            return False
        command, argument = match[1], match[2] or ""
        if command == "models":
            self._show(self._models())
        elif command == "load":
            if argument:
                self._load(argument)
            else:
                self._show(self._models())
                self._say("/load with a number or a name loads one of them.")
        elif command == "unload":
            load.unload(self._client, self._conversation.model, as_json=False)
            self._conversation.model = None
        elif command == "system":
            self._conversation.system = argument or None
            self._say(
                "The model has instructions." if argument else "The instructions are removed."
            )
        elif command in ("think", "no_think") and not argument:
            self._think(command == "think")
        elif command == "clear" and not argument:
            self._conversation.clear()
            self._say("Conversation cleared.")
        elif command == "help" and not argument:
            self._say(HELP)
        elif argument:
            return False
        else:
            self._say(f"Unknown command: /{command}.\n{HELP}")
        return True

    def _models(self) -> list[dict[str, Any]]:
        models: list[dict[str, Any]] = self._client.get("/v1/models")["data"]
        return [model for model in models if model["loadable"]]

    def _show(self, models: list[dict[str, Any]]) -> None:
        """List the models with numbers."""
        self._listed = [model["id"] for model in models]
        places = len(str(len(models)))
        head = ls.HEAD._replace(name=f"{'':{places}}  {ls.HEAD.name}")
        rows = [
            row._replace(name=f"{number:{places}}  {row.name}")
            for number, row in enumerate(map(ls.row, models), 1)
        ]
        terminal.table(self._console, head, rows, ls.NUMBERS)

    def _load(self, name: str) -> None:
        """Load the model with that number in the list, or with that name."""
        if name.strip().isdecimal() and 0 < int(name) <= len(self._listed):
            name = self._listed[int(name) - 1]
        self._conversation.model = load.load(
            self._client, name.strip(), False, enable_thinking=self._conversation.thinking
        )["id"]

    def _think(self, thinking: bool) -> None:
        self._conversation.thinking = thinking
        self._say(f"Thinking is {terminal.switch(thinking)}.")
        model = self._conversation.model
        if thinking and model is not None and not load.can_think(self._client, model):
            self._say(f"{model} has no thinking mode, so this changes nothing.")

    # -- input

    def _say(self, text: str) -> None:
        if text:
            terminal.say(self._console, text, "dim")

    def _complain(self, error: ClientError) -> None:
        message = error.message
        if isinstance(error, Refused) and error.code == "no_model_loaded":
            message = "No model is loaded. /models lists what is available, /load NAME loads one."
        terminal.say(self._console, message, "red")


def _read() -> str:
    """Return the user's input: a line, or several lines between triple quotes.

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
