"""The commands: thin, each parses, calls and prints."""

from __future__ import annotations

from typing import Any

import click

from mlxproxy import __version__, settings


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlxproxy")
def main() -> None:
    """Serve the MLX models that LM Studio keeps on this machine."""


def _setting_options(command: Any) -> Any:
    """One flag for each setting, with its meaning and default from settings.py."""
    for name, shown, meaning in reversed(settings.describe()):
        flag = "--" + name.lower().replace("_", "-")
        command = click.option(flag, name.lower(), help=f"{meaning}. [{shown}]")(command)
    return command


@main.command()
@_setting_options
def serve(**flags: str | None) -> None:
    """Start the proxy (this is what `make run` does).

    Each flag is a setting; the same names work in instance/config.py and, as MLXPROXY_<NAME>, in
    the environment.
    """
    from mlxproxy import serving  # Flask and waitress: the other commands need neither

    given = {name.upper(): value for name, value in flags.items() if value is not None}
    try:
        serving.serve(settings.load(given))
    except (settings.SettingError, serving.CannotServe) as error:
        raise click.ClickException(str(error)) from None
