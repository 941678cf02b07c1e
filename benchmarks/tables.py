"""The report as tables: medians of the rounds, the least and the most beside them."""

from __future__ import annotations

import math
from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.figures import Figure
from benchmarks.report import Report, machine
from benchmarks.rounds import MAIN, TOGETHER, WHOLE_INTERVAL, WHOLE_TOKENS
from mlxproxy import __version__

NOTES = f"""\
The time of an event is from the backend's sending to the client's receiving; "added" is what is
more than by the direct connection, whose own figures show how quiet the machine was. In step: all
{TOGETHER.streams} at the same moment, as a batch of the backend's. nginx: one worker, no buffering.
"threads" passes bytes on without HTTP, one Python thread a stream: the floor of the language.
A whole answer has {WHOLE_TOKENS} tokens, one each {WHOLE_INTERVAL} ms, and is there when its last
byte is; mlxproxy asks for it as a stream and puts it together."""


def show(report: Report, console: Console) -> None:
    """Prints all tables."""
    console.print(f"\nmlxproxy {__version__}, {machine()}; median (least-most) of the rounds\n")
    for table in (_comparison, _by_streams, _by_itself, _goals):
        console.print(table(report))
    console.print(NOTES, highlight=False)


def _comparison(report: Report) -> Table:
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
    table = _table(
        f"{MAIN} streams, an event each 10 ms, in front of the same backend",
        *("", *report.contestants, "x nginx", "x direct"),
    )
    for head, figure, digits in figures:
        ours = figure("mlxproxy")
        shares = [
            ours.ratio(figure(name)) if name in report.contestants else math.nan
            for name in ("nginx", "direct")
        ]
        table.add_row(
            head,
            *(_spread(figure(name), digits) for name in report.contestants),
            *("" if math.isnan(share) else f"{share:.2f}" for share in shares),
        )
    return table


def _by_streams(report: Report) -> Table:
    names = [name for name in report.contestants if name != "threads"]
    columns = [
        (what, attribute, name)
        for what, attribute in (("CPU", "cpu_per_event"), ("p50", "p50"), ("p99", "p99"))
        for name in names
        if (name, attribute) != ("direct", "cpu_per_event")
    ]
    heads = (f"{what}\n{name}" for what, _, name in columns)
    table = _table("By the number of streams, µs", "streams", *heads, "memory\nMB", "not\nwhole")
    for streams, outcomes in report.rounds.streams.items():
        table.add_row(
            str(streams),
            *(f"{report.rounds.of(streams, name, it).median:.0f}" for _, it, name in columns),
            f"{report.rounds.of(streams, 'mlxproxy', 'resident').high:.0f}",
            str(sum(outcome.broken for outcome in outcomes["mlxproxy"])),
        )
    return table


def _by_itself(report: Report) -> Table:
    life = report.lifecycle
    table = _table("mlxproxy by itself", "", "")
    for head, name, digits in (
        ("start to the first answer, s", "start_seconds", 2),
        ("memory when idle, MB", "idle_megabytes", 0),
        ("swap of a tiny model, to the first token, s", "swap_seconds", 2),
        ("a bare mlx_lm.server with it, to the first token, s", "bare_seconds", 2),
        (f"first scan of {life.library} models, s", "scan_seconds", 2),
        ("GET /v1/models of them, ms", "listing_milliseconds", 1),
    ):
        table.add_row(head, _spread(life.figure(name), digits))
    return table


def _goals(report: Report) -> Table:
    table = _table("Goals", "", "measured", "at most", "")
    for goal in report.goals():
        value = "" if math.isnan(goal.value) else f"{goal.value:.2f} {goal.unit}"
        table.add_row(goal.name, value, f"{goal.limit:.4g} {goal.unit}", goal.verdict)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=not number)
    return table


def _spread(figure: Figure, digits: int) -> str:
    if not any(figure.rounds):
        return ""
    median = f"{figure.median:.{digits}f}"
    if len(figure.rounds) < 2:
        return median
    return f"{median} ({figure.low:.{digits}f}-{figure.high:.{digits}f})"
