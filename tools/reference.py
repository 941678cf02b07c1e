"""The parts of docs/ that are generated from the program itself: its commands and its settings.

``python -m tools.reference`` (or ``make reference``) rewrites them between their markers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import click

from mlxproxy import settings
from mlxproxy.cli import SettingOption, main

DOCS = Path(__file__).parents[1] / "docs"
SHARED = 5  # an option of this many commands is described once for all of them


def settings_table() -> str:
    """Return the table of all settings."""
    rows = (f"| `{name}` | {shown} | {meaning} |\n" for name, shown, meaning in settings.describe())
    return "| Name | Default | Meaning |\n|---|---|---|\n" + "".join(rows)


def commands() -> str:
    """Return all commands with their options."""
    with click.Context(main, info_name="mlxproxy") as context:
        every = list(contexts(context))
        lines = Counter(_option(option) for it in every for option in options(it))
        shared = [line for line, times in lines.items() if times >= SHARED]
        return "\n".join(part for it in every for part in _command(it, shared))


PARTS: Mapping[str, Callable[[], str]] = {"commands": commands, "settings": settings_table}


def rewritten(text: str, part: str) -> str:
    """Return a document's text with the part regenerated.

    Raises:
        ValueError: the document does not have the part's two markers.
    """
    return put(text, part, PARTS[part]())


def put(text: str, part: str, content: str) -> str:
    """Return a document's text with this content between the part's markers.

    Raises:
        ValueError: the document does not have the part's two markers.
    """
    begin, end = f"<!-- {part} -->", f"<!-- /{part} -->"
    head, found, rest = text.partition(begin)
    _, ended, tail = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"there is no {begin} … {end}")
    return f"{head}{begin}\n{content}{end}{tail}"


def contexts(context: click.Context) -> Iterator[click.Context]:
    """Yield the context of a command and those of all its subcommands."""
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
    """Return a command's own options, without `--help`."""
    found = context.command.get_params(context)
    return [it for it in found if isinstance(it, click.Option) and "--help" not in it.opts]


def _command(context: click.Context, shared: list[str]) -> Iterator[str]:
    command = context.command
    if context.parent is not None:
        arguments = [it for it in command.params if isinstance(it, click.Argument)]
        words = [it.name.upper() if it.required else f"[{it.name.upper()}]" for it in arguments]
        yield f"## `{' '.join((context.command_path, *words))}`\n"
    yield _text(command.help or "") + "\n"
    own = [it for it in options(context) if not isinstance(it, SettingOption)]
    lines = [line for it in own if (line := _option(it)) not in shared]
    if len(own) < len(options(context)):
        lines.append(
            "- `--NAME VALUE`: any of the [settings](settings.md), such as `--proxy-port 9000`"
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
    r"""Return a docstring as Markdown: click's \b, which keeps lines, becomes a code block."""
    paragraphs = []
    for paragraph in help_.strip().split("\n\n"):
        lines = [line.strip() for line in paragraph.splitlines()]
        if lines[0] == "\b":
            paragraphs.append("\n".join(("```", *lines[1:], "```")))
        else:
            paragraphs.append("\n".join(lines).replace("<", "&lt;"))
    return "\n\n".join(paragraphs)


if __name__ == "__main__":
    for part in PARTS:
        document = DOCS / f"{part}.md"
        document.write_text(rewritten(document.read_text(), part))
