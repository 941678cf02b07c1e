"""`make bench`: measures, prints the tables, writes the picture. The exit status is always 0."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console

from benchmarks import contestants, lifecycle, picture, report, rounds, tables

PICTURE = Path(__file__).parent / "results.png"


@click.command(help=__doc__)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures here")
@click.option("--quick", is_flag=True, help="One round of little: for work on the benchmark itself")
@click.option(
    "--delay", type=float, default=0.0, help="Make the relay so many ms slower: it must show"
)
def main(json_file: Path | None, quick: bool, delay: float) -> None:
    console = Console(width=max(130, Console().width))
    begin = time.monotonic()

    def say(what: str) -> None:
        console.print(f"{time.monotonic() - begin:4.0f} s  {what}", style="dim", highlight=False)

    with tempfile.TemporaryDirectory(prefix="mlxproxy-bench-") as name:
        folder = Path(name)
        models = lifecycle.build_models(folder / "models")
        with contestants.all_of_them(folder, models, delay, say) as them:
            names = [contestant.name for contestant in them]
            measured = rounds.measure(them, quick, say)
        alone = lifecycle.measure(folder, models, quick, say)
    results = report.Report(names, measured, alone)
    say("done")
    tables.show(results, console)
    if json_file:
        json_file.write_text(json.dumps(results.to_json(), indent=1) + "\n")
    if not quick and not delay:
        try:
            picture.draw(results, PICTURE)
        except ImportError:
            say("matplotlib is not installed: no picture")


if __name__ == "__main__":
    main()
