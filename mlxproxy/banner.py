"""The output of `mlxproxy serve` once it listens: its address, its models, and what to try next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlxproxy import program
from mlxproxy.settings import SettingError, Settings, load


def lines(
    settings: Settings,
    folders: Sequence[Path],
    models: int,
    complete: bool,
    keys: Sequence[str],
    is_private: bool,
) -> Iterator[str]:
    """Yield the lines; lines that start with spaces are commands.

    Args:
        settings: those of the running proxy.
        folders: the models folders that exist.
        models: how many models can be loaded.
        complete: whether every folder has been read.
        keys: the API keys that clients may use.
        is_private: whether only this machine can reach the proxy.
    """
    reach = "for this machine only" if is_private else f"listening on {settings.proxy_host}"
    yield f"mlxproxy is running at {settings.local_url} ({reach})"
    if settings.ollama_port is not None:
        yield f"Ollama's clients find it on port {settings.ollama_port}, too."
    where = f" in {' and '.join(map(str, folders))}" if folders else ""
    yield f"Models: {models or 'none'}{where}{'' if complete else ' (still reading)'}"
    if not keys and not is_private:
        yield (
            "No API_KEY is set: anyone on your network can list, load and use the models "
            "(PROXY_HOST=127.0.0.1 restricts it to this machine)."
        )
    yield ""
    purpose, command = (
        ("To chat", "chat") if models or not complete else ("To see what is missing", "ls --all")
    )
    yield f"{purpose}, type in another terminal:"
    yield f"  {program.as_typed()} {command}{''.join(_reaching(settings, keys))}"
    if not program.is_on_path():
        yield f"{program.NAME} is not on your PATH. To use it by name in any folder:"
        yield f"  alias {program.NAME}={shlex.quote(shlex.join(program.command()))}"


def _reaching(settings: Settings, keys: Sequence[str]) -> Iterator[str]:
    """Yield the options that a command in a new terminal needs to find and use this proxy."""
    try:
        own = load({}, {})
        own_url, own_keys = own.local_url, own.keys
    except SettingError:
        own_url, own_keys = None, ()
    elsewhere = own_url != settings.local_url
    if elsewhere:
        yield f" --host {shlex.quote(settings.local_url.removeprefix('http://'))}"
    if keys and (elsewhere or own_keys[:1] != tuple(keys[:1])):
        yield " --key YOUR_API_KEY"
