"""`make bench`: measures, prints the tables, and renews what docs/performance.md shows.

The exit status is 0 whatever was measured.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from benchmarks import contestants, lifecycle, picture, report, rounds, tables
from benchmarks.part import Part, Place

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results.json"
DOCUMENT = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "performance.png"
DEMO = ROOT / "instance" / "models"  # where `make run` keeps it


@click.command(help=__doc__)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures here")
@click.option("--quick", is_flag=True, help="One round of little: for work on the benchmark itself")
@click.option(
    "--delay", type=float, default=0.0, help="Make the relay so many ms slower: it must show"
)
@click.option("--stored", is_flag=True, help="Measure nothing: show the results of the last run")
@click.option(
    "--only",
    type=click.Choice(list(report.PARTS)),
    multiple=True,
    help="Renew only this part, and keep the other results; may be repeated",
)
def main(
    json_file: Path | None, quick: bool, delay: float, stored: bool, only: tuple[str, ...]
) -> None:
    console = Console(width=max(130, Console().width))
    begin = time.monotonic()

    def say(what: str) -> None:
        console.print(f"{time.monotonic() - begin:4.0f} s  {what}", style="dim", highlight=False)

    if stored or only:
        results = report.Report.from_json(json.loads(RESULTS.read_text()))
        results = replace(results, parts={**results.parts, **renewed(only, quick, say)})
    else:
        results = measure(quick, delay, say)
    tables.show(results, console)
    if json_file:
        write(results, json_file)
    if not quick and not delay:
        write(results, RESULTS)
        DOCUMENT.write_text(tables.put(DOCUMENT.read_text(), results))
        try:
            picture.draw(results, PICTURE)
        except ImportError:
            say("matplotlib is not installed: no picture")


def measure(quick: bool, delay: float, say: rounds.Say) -> report.Report:
    """Return the figures of this machine, measured now."""
    with tempfile.TemporaryDirectory(prefix="mlxproxy-bench-") as name:
        folder = Path(name)
        models = lifecycle.build_models(folder / "models")
        with contestants.all_of_them(folder, models, delay, say) as them:
            names = [contestant.name for contestant in them]
            measured = rounds.measure(them, quick, say)
        alone = lifecycle.measure(folder, models, quick, say)
    always = [name for name, part in report.PARTS.items() if part.ALWAYS]
    parts = renewed(always, quick, say)
    say("done")
    return report.Report(names, measured, alone, parts)


def renewed(names: Sequence[str], quick: bool, say: rounds.Say) -> dict[str, Part]:
    """Return these parts, measured now."""
    with tempfile.TemporaryDirectory(prefix="mlxproxy-bench-") as folder:
        models = lifecycle.build_models(Path(folder) / "models")
        measured: dict[str, Part] = {}
        for name in names:
            (own := Path(folder) / name).mkdir()
            measured[name] = report.PARTS[name].measure(Place(own, models, DEMO, say), quick)
        return measured


def write(results: report.Report, file: Path) -> None:
    """Write all figures as JSON."""
    file.write_text(json.dumps(results.to_json(), indent=1) + "\n")


if __name__ == "__main__":
    main()
