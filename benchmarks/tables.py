"""The report as tables: medians of the rounds, with the minimum and the maximum next to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.figures import Figure
from benchmarks.report import Report
from benchmarks.rounds import MAIN, TOGETHER, WHOLE_INTERVAL, WHOLE_TOKENS
from benchmarks.sheet import Sheet, spread

BEGIN, END = "<!-- results -->", "<!-- /results -->"
NOTES = f"""\
The time of an event runs from the backend's send to the client's receive. "Added" is the difference
from a direct connection, whose own figures show how quiet the machine was. "In step" means that all
{TOGETHER.streams} streams have their event at the same moment, like a batch of the backend's. nginx
has one worker and no buffering. "threads" passes bytes on without HTTP, one Python thread per
stream: the floor of the language. A whole (unstreamed) answer has {WHOLE_TOKENS} tokens, one every
{WHOLE_INTERVAL} ms, and is complete when its last byte is there; mlxproxy requests it as a stream
and assembles it."""


def show(report: Report, console: Console) -> None:
    """Print all tables."""
    console.print(f"\n{report.origin}; median (least-most) of the rounds\n")
    for sheet in sheets(report):
        table = Table(title=sheet.title, title_justify="left", box=box.SIMPLE_HEAD)
        for number, column in enumerate(sheet.columns):
            table.add_column(column, justify="right" if number else "left", no_wrap=not number)
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
    console.print(notes(report), highlight=False)


def markdown(report: Report) -> str:
    """Return all tables as Markdown for a document."""
    parts = [f"{report.origin}. Each cell: median (least-most) of the rounds."]
    for sheet in sheets(report):
        head = "| " + " | ".join(column.replace("\n", " ") for column in sheet.columns) + " |"
        rule = "|---|" + "--:|" * (len(sheet.columns) - 1)
        rows = ("| " + " | ".join(cell.strip() for cell in row) + " |" for row in sheet.rows)
        parts.append("\n".join((f"**{sheet.title}**", "", head, rule, *rows)))
    return "\n\n".join((*parts, notes(report)))


def put(document: str, report: Report) -> str:
    """Return the document with the tables between its two markers.

    Raises:
        ValueError: the document has no markers.
    """
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise ValueError(f"there is no {BEGIN} … {END}")
    return f"{head}{begin}\n{markdown(report)}\n{end}{tail}"


def sheets(report: Report) -> Iterator[Sheet]:
    """Yield all tables."""
    for sheet in (_comparison, _by_streams, _by_itself):
        yield sheet(report)
    for part in report.parts.values():
        yield from part.sheets()
    yield _goals(report)


def notes(report: Report) -> str:
    """Return what a reader of the tables has to know."""
    return "\n\n".join((NOTES, *(part.NOTE for part in report.parts.values())))


def _comparison(report: Report) -> Sheet:
    rounds = report.rounds
    figures: list[tuple[str, Callable[[str], Figure], int]] = [
        ("CPU per event, µs", lambda name: rounds.of(MAIN, name, "cpu_per_event"), 1),
        ("event p50, µs", lambda name: rounds.of(MAIN, name, "p50"), 0),
        ("  of it added", lambda name: report.added(name, "p50"), 0),
        ("event p99, µs", lambda name: rounds.of(MAIN, name, "p99"), 0),
        (
            "event p50, all in step, µs",
            lambda name: Figure([it.p50 for it in rounds.together[name]]),
            0,
        ),
        (f"first byte of {MAIN} at once, ms", rounds.first_byte, 1),
        ("  the last one's, ms", rounds.last_byte, 1),
        ("whole answer, ms", rounds.whole_answer, 2),
        ("  of it added", report.whole_added, 2),
        ("  added, all tokens at once", report.whole_at_once_added, 2),
    ]
    table = Sheet(
        f"{MAIN} streams, one event every 10 ms, in front of the same backend",
        ("", *report.contestants, "x nginx", "x direct"),
    )
    for head, figure, digits in figures:
        ours = figure("mlxproxy")
        shares = [
            ours.ratio(figure(name)) if name in report.contestants else math.nan
            for name in ("nginx", "direct")
        ]
        table.add(
            head,
            *(spread(figure(name), digits) for name in report.contestants),
            *("" if math.isnan(share) else f"{share:.2f}" for share in shares),
        )
    return table


def _by_streams(report: Report) -> Sheet:
    names = [name for name in report.contestants if name != "threads"]
    columns = [
        (what, attribute, name)
        for what, attribute in (("CPU", "cpu_per_event"), ("p50", "p50"), ("p99", "p99"))
        for name in names
        if (name, attribute) != ("direct", "cpu_per_event")
    ]
    heads = (f"{what}\n{name}" for what, _, name in columns)
    table = Sheet("By the number of streams, µs", ("streams", *heads, "memory\nMB", "not\nwhole"))
    for streams, outcomes in report.rounds.streams.items():
        table.add(
            str(streams),
            *(f"{report.rounds.of(streams, name, it).median:.0f}" for _, it, name in columns),
            f"{report.rounds.of(streams, 'mlxproxy', 'resident').high:.0f}",
            str(sum(outcome.broken for outcome in outcomes["mlxproxy"])),
        )
    return table


def _by_itself(report: Report) -> Sheet:
    life = report.lifecycle
    table = Sheet("mlxproxy by itself", ("", ""))
    for head, name, digits in (
        ("start to the first answer, s", "start_seconds", 2),
        ("memory when idle, MB", "idle_megabytes", 0),
        ("a token of it, ms", "free_token_milliseconds", 2),
        ("a token of it that a schema allows, ms", "schema_token_milliseconds", 2),
        (f"first scan of {life.library} models, s", "scan_seconds", 2),
        ("GET /v1/models of them, ms", "listing_milliseconds", 1),
    ):
        table.add(head, spread(life.figure(name), digits))
    return table


def _goals(report: Report) -> Sheet:
    table = Sheet("Goals", ("", "measured", "at most", ""))
    for goal in report.goals():
        value = "" if math.isnan(goal.value) else f"{goal.value:.2f} {goal.unit}"
        table.add(goal.name, value, f"{goal.limit:.4g} {goal.unit}", goal.verdict)
    return table
