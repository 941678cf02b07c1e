"""Output of the commands: colours and bars on a terminal, plain text in a pipe."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TextIO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from mlxproxy.text import harmless, harmless_json, wrapped

GAP = 2  # columns between two cells of a table
PIPE_WIDTH = 10_000  # columns: in a pipe, each row of a table stays on one line


class _Harmless(Console):
    """A console on which only its own colours and cursor movements control the terminal."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=harmless(segment.text))


def output() -> Console:
    """Return a console on standard output, for what the user asked for."""
    return _console(sys.stdout)


def messages() -> Console:
    """Return a console on standard error, for progress and remarks."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # for what the terminal cannot show
    width = None if stream.isatty() else PIPE_WIDTH
    return _Harmless(file=stream, width=width, markup=False, highlight=False, emoji=False)


@contextmanager
def spinner(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal that the command is waiting; yield a function that changes the text."""
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(text) as status:
        yield lambda text: status.update(Text(text))


def print_json(value: Any) -> None:
    """Print a value as JSON, for programs."""
    print(harmless_json(json.dumps(value, indent=2, ensure_ascii=False)))


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print sentences; on a terminal, break lines between words."""
    console.print(wrapped(harmless(text), console.file), style=style, soft_wrap=True)


class Row(NamedTuple):
    """A row of a table: a name, the other cells, and the style of all of them."""

    name: str
    cells: tuple[str, ...]
    style: str | None = None


def table(console: Console, head: Row, rows: Sequence[Row], right: tuple[int, ...] = ()) -> None:
    """Print a table in which no cell is ever cut or wrapped.

    A name that leaves no room for the other cells gets a line of its own above them, so that it
    can be copied.

    Args:
        right: the indexes of the cells that are numbers.
    """
    lines = [
        Row(harmless(row.name), tuple(map(harmless, row.cells)), row.style) for row in (head, *rows)
    ]
    widths = [
        max(map(cell_len, cells)) for cells in zip(*(row.cells for row in lines), strict=True)
    ]
    room = console.width - sum(GAP + width for width in widths)
    lengths = [length for row in lines if (length := cell_len(row.name)) <= room]
    first = max(lengths, default=0)
    for row in lines:
        name = row.name
        if cell_len(name) > first:
            console.print(name, style=row.style, soft_wrap=True)
            name = ""
        line = _padded(name, first) + "".join(
            " " * GAP + _padded(cell, width, index in right)
            for index, (cell, width) in enumerate(zip(row.cells, widths, strict=True))
        )
        console.print(line.rstrip(), style=row.style, soft_wrap=True)


def _padded(text: str, width: int, right: bool = False) -> str:
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


def size(number: int | None) -> str:
    """Return bytes for a person, in decimal units as a Mac shows them: 17.2 GB."""
    if number is None:
        return ""
    amount = float(number)
    for unit in ("bytes", "kB", "MB"):
        if amount < 999.5:
            return f"{amount:.0f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def duration(seconds: float) -> str:
    """Return seconds for a person: 4.2 s, 12 min, 3 h 5 min, 2 d."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
    return f"{minutes // (24 * 60)} d"


def switch(value: object) -> str:
    """Return a flag as a word."""
    return "on" if value else "off"
