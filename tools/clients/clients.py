"""The clients: what each is, and the command that asks a server something with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.pty import COMMAND
from tools.clients.installation import CLAUDE, OPENCODE, Installation, Place

QUESTION = "Say something."
SHELL_SAYS = "made-42"
SHELL_COMMAND = "echo made-$((40 + 2))"
# What the programs' tool is called with, twice at once, and what it returns.
WEATHER = [{"name": "get_weather", "arguments": {"city": city}} for city in ("Paris", "London")]
WEATHER_SAYS = ("sunny in Paris", "sunny in London")


class Task(NamedTuple):
    """What a client is to do.

    Attributes:
        check: `chat`, `stream`, `tools`, `error`, `load` or `leave`.
        home: a folder for its files and its work.
    """

    check: str
    url: str
    model: str
    home: Path
    installation: Installation


class Command(NamedTuple):
    """A command line, and variables for its environment."""

    words: Sequence[str | Path]
    environment: Mapping[str, str] = {}


@dataclass(frozen=True)
class Client:
    """A client and how it is used.

    Attributes:
        package: the package whose version is told.
        api: the API that it speaks.
        command: returns the command for a task.
        calls: what the backend is to call when the client offers it; None: it has no tools.
        result: what the tools return.
        checks: the checks that make sense.
        is_program: whether it is one of this package's programs, which print JSON.
        has_whole_answers: whether it can ask for an answer that is not streamed.
        is_launched: whether `mlxproxy launch` starts it, which loads the model itself.
        known: why a check fails, where the client is known to be the reason.
    """

    name: str
    package: str
    place: Place
    api: str
    command: Callable[[Task], Command]
    calls: Sequence[Mapping[str, Any]] | None = field(default_factory=lambda: WEATHER)
    result: Sequence[str] = WEATHER_SAYS
    is_program: bool = True
    has_whole_answers: bool = True
    is_launched: bool = False
    known: Mapping[str, str] = field(default_factory=dict)


def _program(
    name: str, package: str, place: Place, api: str, file: str, provider: str = "", **known: str
) -> Client:
    def command(task: Task) -> Command:
        folder = task.installation.folder / place
        runner: str | Path = "node" if place == "node" else task.installation.python(place)
        variables = {"URL": task.url, "MODEL": task.model, "PROVIDER": provider}
        return Command([runner, folder / file, task.check], variables)

    return Client(name, package, place, api, command, known=known)


def _launched(
    agent: str,
    name: str,
    package: str,
    place: Place,
    api: str,
    arguments: Callable[[Task], Sequence[str]],
    calls: Sequence[Mapping[str, Any]] | None,
    **environment: str,
) -> Client:
    def command(task: Task) -> Command:
        start = ("launch", agent, "--host", task.url, "--model", task.model, "--")
        path = f"{task.installation.program(place, agent).parent}:/usr/local/bin:/usr/bin:/bin"
        words: list[str | Path] = [COMMAND, *start, *arguments(task)]
        return Command(words, {"PATH": path, **environment})

    return Client(
        name,
        package,
        place,
        api,
        command,
        calls,
        (SHELL_SAYS,),
        is_program=False,
        has_whole_answers=calls is None,
        is_launched=True,
    )


# It gets the server's sentence (`--mode json` shows it), takes the conversation for full, and finds
# nothing to compact.
PI_IS_SILENT = (
    "with `-p`, pi says nothing when a prompt is too long for the model, although it has "
    "understood the error"
)


def _pi(api: str, dialect: str) -> Client:
    def command(task: Task) -> Command:
        base = task.url if dialect == "anthropic-messages" else f"{task.url}/v1"
        provider = {
            "baseUrl": base,
            "api": dialect,
            "apiKey": "none",
            "models": [{"id": task.model}],
        }
        config = task.home / ".pi" / "agent"
        config.mkdir(parents=True, exist_ok=True)
        (config / "models.json").write_text(json.dumps({"providers": {"mlxproxy": provider}}))
        program = task.installation.program("node", "pi")
        words = [program, "-p", "--provider", "mlxproxy", "--model", task.model, QUESTION]
        return Command(words, {"PI_OFFLINE": "1"})

    package = "@mariozechner/pi-coding-agent"
    calls = [{"name": "bash", "arguments": {"command": SHELL_COMMAND}}]
    return Client(
        "pi", package, "node", api, command, calls, (SHELL_SAYS,), False, has_whole_answers=False
    )


def _llm(api: str, responses: bool) -> Client:
    def command(task: Task) -> Command:
        entry = {
            "model_id": "mlxproxy",
            "model_name": task.model,
            "api_base": f"{task.url}/v1",
            "supports_tools": True,
            "responses": responses,
        }
        (task.home / "extra-openai-models.yaml").write_text(json.dumps([entry]))
        words: list[str | Path] = [task.installation.program("python", "llm"), "-m", "mlxproxy"]
        words += ["--key", "none", QUESTION]
        if task.check in ("chat", "error"):
            words.append("--no-stream")
        if task.check == "tools":
            words += ["--functions", "def get_weather(city: str): return f'sunny in {city}'"]
        return Command(words, {"LLM_USER_PATH": str(task.home)})

    return Client("llm", "llm", "python", api, command, is_program=False)


def _claude(task: Task) -> list[str]:
    words = ["-p", QUESTION, "--no-session-persistence", "--allowedTools", "Bash"]
    return [*words, "--output-format", "stream-json", "--verbose", "--include-partial-messages"]


def _codex(task: Task) -> list[str]:
    unasked = ["--dangerously-bypass-approvals-and-sandbox", "--skip-git-repo-check"]
    return ["-c", "features.plugins=false", "exec", "--json", "--ephemeral", *unasked, QUESTION]


def _opencode(task: Task) -> list[str]:
    return ["run", "--format", "json", "--auto", QUESTION]


def _aider(task: Task) -> list[str]:
    quiet = ["--no-git", "--yes-always", "--no-check-update", "--analytics-disable"]
    quiet += ["--no-show-release-notes", "--no-pretty"]
    return [*quiet, *(["--no-stream"] if task.check == "chat" else []), "--message", QUESTION]


CHAT, MESSAGES, RESPONSES, OLLAMA = "Chat", "Messages", "Responses", "Ollama"
CLIENTS = (
    _program("openai for Python", "openai", "python", CHAT, "openai_chat.py"),
    _program("openai for Python", "openai", "python", RESPONSES, "openai_responses.py"),
    _program("openai for Node.js", "openai", "node", CHAT, "openai_chat.mjs"),
    _program("openai for Node.js", "openai", "node", RESPONSES, "openai_chat.mjs", "responses"),
    _program("anthropic for Python", "anthropic", "python", MESSAGES, "anthropic_messages.py"),
    _program(
        "anthropic for Node.js", "@anthropic-ai/sdk", "node", MESSAGES, "anthropic_messages.mjs"
    ),
    _program("ollama for Python", "ollama", "python", OLLAMA, "ollama_chat.py"),
    _program("ollama for Node.js", "ollama", "node", OLLAMA, "ollama_chat.mjs"),
    _program("LiteLLM", "litellm", "python", CHAT, "litellm_completion.py", "openai"),
    _program("LiteLLM", "litellm", "python", MESSAGES, "litellm_completion.py", "anthropic"),
    _program(
        *("LiteLLM", "litellm", "python", OLLAMA, "litellm_completion.py", "ollama_chat"),
        tools="in an Ollama stream, LiteLLM gives each call of an answer the index 0, whatever the "
        "server says, and joins their arguments; one call at a time works",
    ),
    _program("LangChain", "langchain-openai", "python", CHAT, "langchain_chat.py", "openai"),
    _program(
        "LangChain", "langchain-openai", "python", RESPONSES, "langchain_chat.py", "responses"
    ),
    _program(
        "LangChain", "langchain-anthropic", "python", MESSAGES, "langchain_chat.py", "anthropic"
    ),
    _program("LangChain", "langchain-ollama", "python", OLLAMA, "langchain_chat.py", "ollama"),
    _program("pydantic-ai", "pydantic-ai-slim", "python", CHAT, "pydantic_agent.py", "openai"),
    _program(
        "pydantic-ai", "pydantic-ai-slim", "python", RESPONSES, "pydantic_agent.py", "responses"
    ),
    _program(
        "pydantic-ai", "pydantic-ai-slim", "python", MESSAGES, "pydantic_agent.py", "anthropic"
    ),
    _llm(CHAT, responses=False),
    _llm(RESPONSES, responses=True),
    _program("AI SDK", "@ai-sdk/openai-compatible", "node", CHAT, "ai_sdk.mjs", "openai"),
    _program("AI SDK", "@ai-sdk/openai", "node", RESPONSES, "ai_sdk.mjs", "responses"),
    _program("AI SDK", "@ai-sdk/anthropic", "node", MESSAGES, "ai_sdk.mjs", "anthropic"),
    _launched(
        *("claude", "Claude Code", CLAUDE, "node", MESSAGES, _claude),
        [{"name": "Bash", "arguments": {"command": SHELL_COMMAND, "description": "Calculate"}}],
        DISABLE_AUTOUPDATER="1",
    ),
    _launched(
        *("codex", "Codex", "@openai/codex", "node", RESPONSES, _codex),
        [{"name": "exec_command", "arguments": {"cmd": SHELL_COMMAND}}],
    ),
    _launched(
        *("opencode", "opencode", OPENCODE, "node", CHAT, _opencode),
        [{"name": "bash", "arguments": {"command": SHELL_COMMAND, "description": "Calculate"}}],
        OPENCODE_DISABLE_AUTOUPDATE="1",
        OPENCODE_DISABLE_MODELS_FETCH="1",
        OPENCODE_DISABLE_LSP_DOWNLOAD="1",
    ),
    _launched("aider", "aider", "aider-chat", "aider", CHAT, _aider, None),
    _pi(CHAT, "openai-completions"),
    _pi(RESPONSES, "openai-responses"),
    _pi(MESSAGES, "anthropic-messages"),
)
