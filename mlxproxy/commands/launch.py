"""`mlxproxy launch`: start a coding agent that uses this server, without touching its own files."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote

from mlxproxy.commands import load
from mlxproxy.commands.client import Client, ClientError
from mlxproxy.text import harmless

NO_KEY = "none"  # what an agent that insists on a key sends to a server without one
# Agents give up before a large model has been read from disk; the server itself says when to.
PATIENCE_MS = 3_000_000


@dataclass(frozen=True)
class Target:
    """The server and the model that an agent is to use.

    Attributes:
        url: the server's address, without `/v1`.
        key: the server's API key, if it has one.
        model: the model's id.
        context: how many tokens the model can take; None: unknown.
    """

    url: str
    key: str | None
    model: str
    context: int | None = None


class Start(NamedTuple):
    """What an agent is started with: variables for its environment, and arguments."""

    environment: Mapping[str, str]
    arguments: Sequence[str] = ()


class Agent(NamedTuple):
    """A coding agent.

    Attributes:
        title: its name in sentences.
        install: the command that installs it.
        start: returns what makes it use a server.
    """

    title: str
    install: str
    start: Callable[[Target], Start]


def _claude(target: Target) -> Start:
    """Every role gets the same model: others would be asked for in the background."""
    roles = ("MODEL", "SMALL_FAST_MODEL", *(f"DEFAULT_{name}_MODEL" for name in _CLAUDE_MODELS))
    return Start(
        {
            "ANTHROPIC_BASE_URL": target.url,
            "ANTHROPIC_AUTH_TOKEN": target.key or NO_KEY,
            "ANTHROPIC_API_KEY": "",  # the user's own; it would be sent to this server
            **{f"ANTHROPIC_{role}": target.model for role in roles},
            "CLAUDE_CODE_SUBAGENT_MODEL": target.model,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            # Both change in every request, so that the prompt would have to be read anew.
            "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
            "CLAUDE_CODE_TOTAL_TOKENS_REMINDER": "off",
            "API_TIMEOUT_MS": str(PATIENCE_MS),
            # Without it, it takes a model that it does not know for one with a million tokens.
            **({"CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(target.context)} if target.context else {}),
        }
    )


_CLAUDE_MODELS = ("OPUS", "SONNET", "HAIKU")


def _codex(target: Target) -> Start:
    """Codex takes its configuration as flags, each the text of a TOML value."""
    provider = {
        "name": "mlxproxy",
        "base_url": f"{target.url}/v1",
        "wire_api": "responses",
        **({"env_key": "MLXPROXY_API_KEY"} if target.key else {}),
    }
    inside = ", ".join(f"{name} = {_toml(value)}" for name, value in provider.items())
    values = {
        "model": _toml(target.model),  # `codex exec` does not inherit --model
        "model_provider": _toml("mlxproxy"),
        "model_providers.mlxproxy": f"{{{inside}}}",
        "web_search": _toml("disabled"),  # a service of OpenAI's
        **({"model_context_window": str(target.context)} if target.context else {}),
    }
    flags = [word for name, value in values.items() for word in ("-c", f"{name}={value}")]
    key = {"MLXPROXY_API_KEY": target.key} if target.key else {}
    return Start(key, flags)


def _toml(text: str) -> str:
    return json.dumps(text)  # a basic string of TOML has the escapes of JSON


def _opencode(target: Target) -> Start:
    """opencode merges this configuration with the user's own."""
    name = f"mlxproxy/{target.model}"
    model: dict[str, Any] = {"name": target.model}
    if target.context:
        # It compacts the conversation when `output` no longer fits into the rest of `context`.
        model["limit"] = {"context": target.context, "output": target.context // 4}
    options = {"baseURL": f"{target.url}/v1", "apiKey": target.key or NO_KEY}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "mlxproxy",
        "options": options,
        "models": {target.model: model},
    }
    config = {"model": name, "small_model": name, "provider": {"mlxproxy": provider}}
    return Start({"OPENCODE_CONFIG_CONTENT": json.dumps(config, ensure_ascii=False)})


def _aider(target: Target) -> Start:
    base = {"OPENAI_API_BASE": f"{target.url}/v1", "OPENAI_API_KEY": target.key or NO_KEY}
    # It warns about every model that is not in its list.
    return Start(base, ["--model", f"openai/{target.model}", "--no-show-model-warnings"])


AGENTS: Mapping[str, Agent] = {
    "claude": Agent("Claude Code", "npm install -g @anthropic-ai/claude-code", _claude),
    "codex": Agent("Codex", "npm install -g @openai/codex", _codex),
    "opencode": Agent("opencode", "npm install -g opencode-ai", _opencode),
    "aider": Agent("aider", "uv tool install aider-chat --python 3.12", _aider),
}


def launch(
    client: Client, name: str, model: str | None, arguments: Sequence[str], only_print: bool
) -> None:
    """Replace this process by an agent, once the model is loaded.

    Args:
        name: the agent, from :data:`AGENTS`.
        model: None: the loaded model or, if none is loaded, the only one.
        arguments: further arguments for the agent.
        only_print: print what a shell would do instead, and load nothing.

    Raises:
        ClientError: the agent is not installed, or there is no server or no such model.
    """
    agent = AGENTS[name]
    program = shutil.which(name)
    if program is None and not only_print:
        raise ClientError(
            f"{agent.title} is not installed: there is no `{name}` in the PATH. Install it with "
            f"`{agent.install}`."
        )
    entry = _entry(client, model)
    id_ = str(entry["id"])
    start = agent.start(Target(client.url, client.key, id_, entry.get("max_context_length")))
    words = [name, *start.arguments, *arguments]
    if program is None or only_print:
        for variable, value in start.environment.items():
            print(harmless(f"export {variable}={shlex.quote(value)}"))
        print(harmless(shlex.join(words)))
        return
    load.load_with_progress(client, id_)
    sys.stdout.flush()
    os.execve(program, words, {**os.environ, **start.environment})


def _entry(client: Client, model: str | None) -> dict[str, Any]:
    """Return the list entry of the model that the agent is to use.

    Raises:
        ClientError: there is no server or no such model, or the choice is not clear.
    """
    if model is None:
        loaded = client.get("/v1/models/loaded")
        model = loaded.get("id") or (loaded.get("transition") or {}).get("id")
    if model is not None:
        return client.get(f"/v1/models/{quote(model)}")
    models = [each for each in client.get("/v1/models")["data"] if each["loadable"]]
    if not models:
        raise ClientError("No model can be loaded. `mlxproxy ls --all` says why.")
    if len(models) > 1:
        raise ClientError(
            "No model is loaded. Choose one with --model: `mlxproxy ls` lists those there are."
        )
    entry: dict[str, Any] = models[0]
    return entry
