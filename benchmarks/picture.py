"""The run as a picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from benchmarks.figures import Figure
from benchmarks.report import GO, Report, machine
from benchmarks.rounds import MAIN
from mlxproxy import __version__

COLOURS = {"nginx": "#8a8f98", "threads": "#c9ccd1", "mlxproxy": "#2f6fde"}
LABELS = {"nginx": "nginx", "threads": "bare Python\nthreads", "mlxproxy": "mlxproxy"}


def draw(report: Report, file: Path) -> None:
    """Writes the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in report.contestants if name != "direct"]
    rounds = report.rounds
    cpu = rounds.of(MAIN, "nginx", "cpu_per_event").median
    p50 = rounds.of(MAIN, "nginx", "p50").median
    first = rounds.first_byte("nginx").median
    panels: list[tuple[str, str, Callable[[str], Figure], dict[str, float]]] = [
        (
            "Processor time per event",
            "µs",
            lambda name: rounds.of(MAIN, name, "cpu_per_event"),
            {"goal": 2 * cpu, "Go": GO * cpu},
        ),
        (
            "Time of an event, median",
            "µs",
            lambda name: rounds.of(MAIN, name, "p50"),
            {"goal": 1.2 * p50},
        ),
        (
            f"First byte, {MAIN} starting at once",
            "ms",
            rounds.first_byte,
            {"goal": 3 * first},
        ),
        ("Added to a whole answer", "ms", report.whole_added, {"goal": 1.5}),
    ]
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 3.2), layout="constrained")
        for axis, (title, unit, measured, lines) in zip(axes, panels, strict=True):
            values = [measured(name) for name in names]
            axis.bar(
                [LABELS[name] for name in names],
                [value.median for value in values],
                color=[COLOURS[name] for name in names],
                yerr=[
                    [value.median - value.low for value in values],
                    [value.high - value.median for value in values],
                ],
                error_kw={"elinewidth": 0.8, "ecolor": "#444444", "capsize": 2},
            )
            axis.set_title(title, loc="left", fontsize=9)
            axis.set_ylabel(unit)
            axis.set_ylim(bottom=0)
            for label, height in lines.items():
                if math.isfinite(height):
                    axis.axhline(height, color="#444444", linewidth=0.8, linestyle=":")
                    axis.annotate(label, (-0.45, height), va="bottom", fontsize=8)
        figure.suptitle(
            f"{MAIN} streams, an event each 10 ms; mlxproxy {__version__}; {machine()}",
            x=0.01,
            ha="left",
            fontsize=9,
        )
        figure.savefig(file, dpi=150)
        pyplot.close(figure)
