"""The command line: each command parses its options and calls the function in `commands`.

A command imports what it needs when it runs, so that `mlxproxy --version` answers at once.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mlxproxy import __version__
from mlxproxy.text import harmless, wrapped

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C has ended


class Commands(click.Group):
    """The group of all commands. Ctrl-C ends any of them without a message."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError:
            raise
        except click.ClickException as error:
            start = "Error: "  # which click puts before it
            message = wrapped(start + error.message, sys.stderr).removeprefix(start)
            raise click.ClickException(message) from None
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                click.echo(err=True)  # the line that has the ^C
            ctx.exit(INTERRUPTED)


class SettingOption(click.Option):
    """A setting's flag."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete one of few values, or a path."""
        from click.shell_completion import CompletionItem

        kind = self.metavar or ""
        if kind.startswith("PATH"):
            return [CompletionItem(incomplete, type="file")]
        if "|" not in kind:
            return []
        words = set(kind.split("|")) - {"INTEGER"}
        return [CompletionItem(word) for word in sorted(words) if word.startswith(incomplete)]


class SettingsCommand(click.Command):
    """A command that takes a flag for each setting, with its meaning and default."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from mlxproxy import settings  # here, for the sake of the commands without settings

        *own, help_ = super().get_params(ctx)
        flags = [
            SettingOption(
                ["--" + name.lower().replace("_", "-"), name.lower()],
                metavar=settings.metavar(name),
                help=f"{meaning}. [default: {_spaced(shown)}]",
            )
            for name, shown, meaning in settings.describe()
        ]
        return [*own, *flags, help_]


def _spaced(names: str) -> str:
    """Return a list with a space after each comma, where a line of help may end."""
    return re.sub(",(?! )", ", ", names)


def _given(flags: dict[str, str | None]) -> dict[str, str]:
    return {name.upper(): value for name, value in flags.items() if value is not None}


def _server(command: Callable[..., None]) -> Callable[..., None]:
    """Add --host and --key to a command, and pass it the client for them."""

    @click.option(
        "--host",
        envvar="MLXPROXY_URL",
        show_envvar=True,
        metavar="HOST[:PORT]|URL",
        help="Server to use (default: this machine).",
    )
    @click.option(
        "--key", envvar="MLXPROXY_API_KEY", show_envvar=True, help="The server's API key."
    )
    @functools.wraps(command)
    def talking(host: str | None, key: str | None, **options: Any) -> None:
        from mlxproxy.commands.client import connect

        command(connect(host, key), **options)

    return talking


def _models(ctx: click.Context, _: click.Parameter, begun: str) -> list[str]:
    """Return the names of models that begin so, for the shell's completion."""
    from mlxproxy.commands import ls

    return ls.completions(ctx.params.get("host"), ctx.params.get("key"), begun)


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_thinking = click.option("--thinking/--no-thinking", default=None, help="Turn thinking on or off.")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlxproxy")
def main() -> None:
    """Serve the MLX models that LM Studio keeps on this machine.

    `mlxproxy serve` starts the server. Most other commands talk to a running server: the one on
    this machine, unless --host or MLXPROXY_URL names another.

    `mlxproxy completion` makes the shell complete commands and the names of models.
    """


@main.command(cls=SettingsCommand)
def serve(**flags: str | None) -> None:
    """Start the proxy (this is what `make run` does).

    Each flag is a setting. The same names work in instance/config.py and, prefixed with
    MLXPROXY_, in the environment.
    """
    from mlxproxy import main, settings

    try:
        main.serve(settings.load(_given(flags)))
    except (settings.SettingError, main.CannotServe) as error:
        raise click.ClickException(harmless(str(error))) from None


@main.command()
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Also list models that cannot be loaded, with the reason.",
)
@_json
@_server
def ls(client: Any, everything: bool, as_json: bool) -> None:
    """List the models on disk."""
    from mlxproxy.commands import ls

    ls.ls(client, everything, as_json)


@main.command()
@_json
@_server
def ps(client: Any, as_json: bool) -> None:
    """Show the loaded models and their status."""
    from mlxproxy.commands import ps

    ps.ps(client, as_json)


@main.command()
@click.argument("model", shell_complete=_models)
@_thinking
@click.option(
    "--ttl",
    metavar="DURATION",
    help="Unload after this much idle time (90, 30m, 2h); 0: never.",
)
@click.option("--force", is_flag=True, help="Load even if it is not expected to fit in memory.")
@click.option("--pin", is_flag=True, help="Never evict it for another model.")
@_json
@_server
def load(
    client: Any,
    model: str,
    thinking: bool | None,
    ttl: str | None,
    force: bool,
    pin: bool,
    as_json: bool,
) -> None:
    """Load MODEL and wait until it is ready.

    MODEL is an id from `mlxproxy ls`, or its last part. If there is no room for it (MAX_LOADED,
    MEMORY_BUDGET), it replaces the longest unused model once that one's answers in flight have
    finished (or DRAIN_TIMEOUT has passed).
    """
    from mlxproxy.commands import load

    options = {"enable_thinking": thinking, "ttl": ttl, "force": force or None, "pin": pin or None}
    load.load(client, model, as_json, **options)


@main.command()
@click.argument("model", required=False, shell_complete=_models)
@_json
@_server
def unload(client: Any, model: str | None, as_json: bool) -> None:
    """Unload MODEL, or cancel its load in progress.

    Without MODEL, this is the model that was loaded last.
    """
    from mlxproxy.commands import load

    load.unload(client, model, as_json)


@main.command()
@click.argument("model", required=False, shell_complete=_models)
@click.option(
    "-p", "--prompt", metavar="TEXT", help="Answer this prompt and exit; piped input is appended."
)
@click.option("-s", "--system", metavar="TEXT", help="Instructions for the model.")
@_thinking
@_server
def chat(
    client: Any,
    model: str | None,
    prompt: str | None,
    system: str | None,
    thinking: bool | None,
) -> None:
    """Chat with a model in the terminal.

    If MODEL is given, it is loaded first. If no model is loaded, the only one is, or you are asked
    which. In the chat, /help lists what you can do; Ctrl-C stops an answer.

    \b
    mlxproxy chat
    git diff | mlxproxy chat -p "review this"
    """
    from mlxproxy.commands import chat

    chat.chat(client, model, prompt, thinking, system)


@main.command()
@click.argument("agent", type=click.Choice(["claude", "codex", "opencode", "aider"]))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "-m",
    "--model",
    metavar="MODEL",
    shell_complete=_models,
    help="Model to use (default: the loaded one).",
)
@click.option(
    "--print",
    "only_print",
    is_flag=True,
    help="Print what to type in a shell instead; nothing is loaded or started.",
)
@_server
def launch(
    client: Any, agent: str, arguments: tuple[str, ...], model: str | None, only_print: bool
) -> None:
    """Start a coding agent that uses this server.

    AGENT is claude (Claude Code), codex, opencode or aider. The model is loaded first. The agent
    gets its settings in its environment and as flags; its own files stay as they are. ARGUMENTS
    after `--` are passed to it.

    \b
    mlxproxy launch claude
    mlxproxy launch codex -m Qwen3-Coder-30B-4bit -- exec "Explain this"
    """
    from mlxproxy.commands import launch

    launch.launch(client, agent, model, arguments, only_print)


@main.command()
@click.option("-f", "--follow", is_flag=True, help="Keep printing new lines as they arrive.")
@click.option(
    "--backend", is_flag=True, help="Print the log of mlx_lm.server instead of the proxy's."
)
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(0, 10_000),
    default=200,
    metavar="NUMBER",
    help="Number of lines to print (default: 200).",
)
@_server
def logs(client: Any, follow: bool, backend: bool, lines: int) -> None:
    """Print the last lines of the log."""
    from mlxproxy.commands import logs

    logs.logs(client, "backend" if backend else "proxy", follow, lines)


@main.command()
@_json
@_server
@click.pass_context
def status(ctx: click.Context, client: Any, as_json: bool) -> None:
    """Report the server's health, also as the exit status.

    \b
    0  the server is running, with or without a model
    1  the server cannot be reached
    3  a models folder is missing, the backend crashed, or a load failed
    """
    from mlxproxy.commands import status

    ctx.exit(status.status(client, as_json))


@main.command()
@_json
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check this machine for problems and show a fix for each.

    This works without a running server. The exit status is 1 if there is a problem.
    """
    from mlxproxy.commands import doctor

    ctx.exit(doctor.doctor(as_json))


@main.group()
def cache() -> None:
    """Show or delete the prompts that are kept on disk.

    What a model has computed for a prompt is kept in the instance folder (PROMPT_CACHE_DISK), so
    that it need not be computed again after a swap or a restart. Both commands work without a
    running server.
    """


@cache.command("ls")
@_json
def cache_ls(as_json: bool) -> None:
    """List how many prompts are kept for each model."""
    from mlxproxy import settings
    from mlxproxy.commands import cache

    try:
        cache.ls(settings.load().instance.prompt_cache, as_json)
    except settings.SettingError as error:
        raise click.ClickException(harmless(str(error))) from None


@cache.command("clear")
@click.argument("model", required=False)
def cache_clear(model: str | None) -> None:
    """Delete the prompts of MODEL, or all of them.

    MODEL is a name from `mlxproxy cache ls`. A running server computes them again when they are
    needed.
    """
    from mlxproxy import settings
    from mlxproxy.commands import cache

    try:
        cache.clear(settings.load().instance.prompt_cache, model)
    except (settings.SettingError, cache.NotKept) as error:
        raise click.ClickException(harmless(str(error))) from None


@main.command()
@click.argument("shell", required=False, type=click.Choice(["zsh", "bash", "fish"]))
def completion(shell: str | None) -> None:
    """Print the line that turns on completion in your shell.

    Add the line to your shell's start-up file. With SHELL, the script that this line loads is
    printed.
    """
    from mlxproxy.commands import completion

    completion.completion(shell)


@main.command(hidden=True)
@click.argument("words", nargs=-1)
def complete(words: tuple[str, ...]) -> None:
    """Print what the last of WORDS may become, for the scripts of `mlxproxy completion`."""
    from mlxproxy.commands import completion

    completion.complete(main, words)


@main.group()
def service() -> None:
    """Start mlxproxy at login and keep it running.

    This uses a launchd agent on macOS and a systemd user unit elsewhere.
    """


@service.command("install", cls=SettingsCommand)
@click.option("--dry-run", is_flag=True, help="Print the service file instead of installing it.")
def service_install(dry_run: bool, **flags: str | None) -> None:
    """Install the service and start it.

    Settings given here, as flags or in the environment, are saved with it.
    """
    from mlxproxy import settings
    from mlxproxy.commands import service

    try:
        service.install(_given(flags), dry_run)
    except settings.SettingError as error:
        raise click.ClickException(harmless(str(error))) from None


@service.command("uninstall")
def service_uninstall() -> None:
    """Stop the service and remove it."""
    from mlxproxy.commands import service

    service.uninstall()


@service.command("status")
@click.pass_context
def service_status(ctx: click.Context) -> None:
    """Show whether the service is running, also as the exit status.

    \b
    0  running
    3  installed, but not running
    4  not installed
    """
    from mlxproxy.commands import service

    ctx.exit(service.status())


@service.command("restart")
def service_restart() -> None:
    """Restart the service; answers in flight may finish first."""
    from mlxproxy.commands import service

    service.restart()
