"""The README's command section, made from the commands themselves.

``python -m tools.reference`` prints it; with a file's name, puts it into the file
between the two markers.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

from mlxproxy.cli import SettingOption, main

SHARED = 5  # commands that take an option, for it to be told once for all
BEGIN, END = "<!-- commands -->", "<!-- /commands -->"


def markdown() -> str:
    """All commands with their options."""
    with click.Context(main, info_name="mlxproxy") as context:
        every = list(contexts(context))
        lines = Counter(_option(option) for it in every for option in options(it))
        shared = [line for line, times in lines.items() if times >= SHARED]
        return "\n".join(part for it in every for part in _command(it, shared))


def put(text: str) -> str:
    """The text with what stands between the markers made anew.

    Raises:
        ValueError: it has no markers.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise ValueError(f"there is no {BEGIN} … {END}")
    return f"{head}{begin}\n{markdown()}{end}{tail}"


def contexts(context: click.Context) -> Iterator[click.Context]:
    """A command's and all of its subcommands'."""
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            child = context.command.get_command(context, name)
            assert child is not None
            if child.hidden:
                continue
            with click.Context(child, info_name=name, parent=context) as inner:
                yield from contexts(inner)


def options(context: click.Context) -> list[click.Option]:
    """A command's own options, without `--help`."""
    found = context.command.get_params(context)
    return [it for it in found if isinstance(it, click.Option) and "--help" not in it.opts]


def _command(context: click.Context, shared: list[str]) -> Iterator[str]:
    command = context.command
    if context.parent is not None:
        arguments = [it for it in command.params if isinstance(it, click.Argument)]
        words = [it.name.upper() if it.required else f"[{it.name.upper()}]" for it in arguments]
        yield f"#### `{' '.join((context.command_path, *words))}`\n"
    yield _text(command.help or "") + "\n"
    own = [it for it in options(context) if not isinstance(it, SettingOption)]
    lines = [line for it in own if (line := _option(it)) not in shared]
    if len(own) < len(options(context)):
        lines.append(
            "- `--NAME VALUE`: any setting from the table above, such as `--proxy-port 9000`"
        )
    common = [f"`{it.opts[0]}`" for it in own if _option(it) in shared]
    if common:
        lines.append(f"- as described above: {', '.join(common)}")
    if context.parent is None:
        lines += ["", "Options shared by several commands:", "", *shared]
    if lines:
        yield "\n".join(lines) + "\n"


def _option(option: click.Option) -> str:
    names = "/".join((*option.opts, *option.secondary_opts))
    value = "" if option.is_flag else f" {option.metavar or 'TEXT'}"
    variable = f" Environment variable: `{option.envvar}`." if option.envvar else ""
    return f"- `{names}{value}`: {option.help}{variable}"


def _text(help_: str) -> str:
    r"""A docstring as Markdown: click's \b, which keeps lines apart, becomes a code block."""
    paragraphs = []
    for paragraph in help_.strip().split("\n\n"):
        lines = [line.strip() for line in paragraph.splitlines()]
        if lines[0] == "\b":
            paragraphs.append("\n".join(("```", *lines[1:], "```")))
        else:
            paragraphs.append("\n".join(lines).replace("<", "&lt;"))
    return "\n\n".join(paragraphs)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        file = Path(sys.argv[1])
        file.write_text(put(file.read_text()))
    else:
        sys.stdout.write(markdown())
