"""The command line: each command parses, calls and prints; what it does is in `commands`.

A command imports what it needs when it runs, so that `mlxproxy --version` answers at once.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import click

from mlxproxy import __version__
from mlxproxy.text import harmless

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C has ended


class Commands(click.Group):
    """The group of all commands: Ctrl-C ends any of them without a word."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                click.echo(err=True)  # the line that has the ^C
            ctx.exit(INTERRUPTED)


class SettingOption(click.Option):
    """A setting's flag."""


class SettingsCommand(click.Command):
    """A command that takes a flag for each setting, with its meaning and default."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from mlxproxy import settings  # here, for the sake of the commands without settings

        *own, help_ = super().get_params(ctx)
        flags = [
            SettingOption(
                ["--" + name.lower().replace("_", "-"), name.lower()], help=f"{meaning}. [{shown}]"
            )
            for name, shown, meaning in settings.describe()
        ]
        return [*own, *flags, help_]


def _given(flags: dict[str, str | None]) -> dict[str, str]:
    return {name.upper(): value for name, value in flags.items() if value is not None}


def _server(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --host and --key, and hands the command the client for them."""

    @click.option(
        "--host",
        envvar="MLXPROXY_URL",
        show_envvar=True,
        metavar="HOST[:PORT]|URL",
        help="The server; without it, the one of this machine.",
    )
    @click.option("--key", envvar="MLXPROXY_API_KEY", show_envvar=True, help="Its API key.")
    @functools.wraps(command)
    def talking(host: str | None, key: str | None, **options: Any) -> None:
        from mlxproxy.client import connect

        command(connect(host, key), **options)

    return talking


def _models(ctx: click.Context, _: click.Parameter, begun: str) -> list[str]:
    """For the shell's completion."""
    from mlxproxy.commands import ls

    return ls.completions(ctx.params.get("host"), ctx.params.get("key"), begun)


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
_thinking = click.option(
    "--thinking/--no-thinking", default=None, help="Whether the model is to think."
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlxproxy")
def main() -> None:
    """Serve the MLX models that LM Studio keeps on this machine.

    `mlxproxy serve` starts the server. The other commands talk to it, from any machine: the
    server is the one of this machine, unless --host or MLXPROXY_URL name another.

    Shell completion: put this line into ~/.zshrc (bash: bash_source, in ~/.bashrc).

    \b
    eval "$(_MLXPROXY_COMPLETE=zsh_source mlxproxy)"
    """


@main.command(cls=SettingsCommand)
def serve(**flags: str | None) -> None:
    """Start the proxy (this is what `make run` does).

    Each flag is a setting; the same names work in instance/config.py and, as MLXPROXY_<NAME>, in
    the environment.
    """
    from mlxproxy import serving, settings

    try:
        serving.serve(settings.load(_given(flags)))
    except (settings.SettingError, serving.CannotServe) as error:
        raise click.ClickException(harmless(str(error))) from None


@main.command()
@click.option("--all", "everything", is_flag=True, help="Those too that cannot be loaded, and why.")
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
    """Show what is loaded, and how it does."""
    from mlxproxy.commands import ps

    ps.ps(client, as_json)


@main.command()
@click.argument("model", shell_complete=_models)
@_thinking
@click.option("--ttl", metavar="30m", help="Unload it when idle for so long; 0: never.")
@click.option("--force", is_flag=True, help="Load it even if it seems not to fit into memory.")
@_json
@_server
def load(
    client: Any, model: str, thinking: bool | None, ttl: str | None, force: bool, as_json: bool
) -> None:
    """Load MODEL, and tell when it answers.

    MODEL is an id of `mlxproxy ls`, or its end. It replaces what is loaded, whose answers in
    flight are waited for.
    """
    from mlxproxy.commands import load

    load.load(client, model, as_json, enable_thinking=thinking, ttl=ttl, force=force or None)


@main.command()
@_json
@_server
def unload(client: Any, as_json: bool) -> None:
    """Unload what is loaded, or cancel a load."""
    from mlxproxy.commands import load

    load.unload(client, as_json)


@main.command()
@click.argument("model", required=False, shell_complete=_models)
@click.option("-p", "--prompt", metavar="TEXT", help="Answer this alone; a pipe is added to it.")
@_thinking
@_server
def chat(client: Any, model: str | None, prompt: str | None, thinking: bool | None) -> None:
    """Talk with a model at the terminal.

    With MODEL, that one is loaded first. In the chat /think and /no_think switch thinking,
    /clear forgets what was said, /quit leaves; Ctrl-C stops an answer.

    \b
    mlxproxy chat alpha
    git diff | mlxproxy chat -p "review this"
    """
    from mlxproxy.commands import chat

    chat.chat(client, model, prompt, thinking)


@main.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with the lines to come.")
@click.option("--backend", is_flag=True, help="The log of mlx_lm.server, not the proxy's.")
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(0, 10_000),
    default=200,
    metavar="NUMBER",
    help="How many lines (200).",
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
    """Tell the server's health, by exit status too.

    \b
    0  it answers, with a model loaded or not
    1  no server answers
    3  it answers, but a models folder is missing, or the backend or its last load failed
    """
    from mlxproxy.commands import status

    ctx.exit(status.status(client, as_json))


@main.command()
@_json
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check this machine: what is wrong, and the command that mends it.

    Needs no server. The exit status is 1 if anything is wrong.
    """
    from mlxproxy.commands import doctor

    ctx.exit(doctor.doctor(as_json))


@main.group()
def service() -> None:
    """Keep mlxproxy running, from login on.

    By a launchd agent on macOS, elsewhere by a systemd user unit.
    """


@service.command("install", cls=SettingsCommand)
@click.option("--dry-run", is_flag=True, help="Only print the file.")
def service_install(dry_run: bool, **flags: str | None) -> None:
    """Install the service and start it.

    It keeps the settings that are given here, by flags or in the environment.
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
    """Tell whether the service runs.

    \b
    0  it runs
    3  it is installed, but does not run
    4  it is not installed
    """
    from mlxproxy.commands import service

    ctx.exit(service.status())


@service.command("restart")
def service_restart() -> None:
    """Restart the service; answers in flight are waited for."""
    from mlxproxy.commands import service

    service.restart()
