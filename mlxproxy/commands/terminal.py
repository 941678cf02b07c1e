"""What the commands print to: colours and bars for a terminal, plain text for a pipe."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from mlxproxy.text import harmless, harmless_json

PIPE_WIDTH = 10_000  # columns: a line of a table is one line for whoever reads the pipe


class _Harmless(Console):
    """A console on which nothing but its own colours and movements moves the terminal."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=harmless(segment.text))


def output() -> Console:
    """Standard output: what was asked for."""
    return _console(sys.stdout)


def messages() -> Console:
    """Standard error: progress, and what is said beside."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # what a terminal cannot show is no reason to fail
    width = None if stream.isatty() else PIPE_WIDTH
    return _Harmless(file=stream, width=width, markup=False, highlight=False, emoji=False)


@contextmanager
def spinner(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """Shows on a terminal that something is waited for; yields what changes the text."""
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(text) as status:
        yield lambda text: status.update(Text(text))


def print_json(value: Any) -> None:
    """For programs."""
    print(harmless_json(json.dumps(value, indent=2, ensure_ascii=False)))


def table(*headings: str, right: tuple[str, ...] = ()) -> Table:
    """A table without lines; the columns in `right` are numbers."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        made.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    return made


def natural_width(console: Console, made: Table) -> int:
    """Columns that the table takes where nothing is folded."""
    return console.measure(made, options=console.options.update(width=PIPE_WIDTH)).maximum


def show(console: Console, made: Table) -> None:
    """Prints the table without the spaces that fill up its last column."""
    with console.capture() as captured:
        console.print(made)
    for line in captured.get().splitlines():
        console.file.write(line.rstrip() + "\n")


def size(number: int | None) -> str:
    """Bytes for a person, as a Mac counts them: 17.2 GB."""
    if number is None:
        return ""
    amount = float(number)
    for unit in ("bytes", "kB", "MB"):
        if amount < 999.5:
            return f"{amount:.0f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def duration(seconds: float) -> str:
    """Seconds for a person: 4.2 s, 12 min, 3 h 5 min, 2 d."""
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
    """A flag in words."""
    return "on" if value else "off"
