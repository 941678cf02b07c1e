"""The run as a picture: what a person waits for, and what the proxy adds to it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import Report
from benchmarks.rounds import WHOLE_TOKENS

TOKEN_MILLISECONDS = 10.0  # of a model that generates a hundred tokens per second
MODEL, PROXY, OTHER = "#c9ccd1", "#2f6fde", "#8a8f98"
NAMES = {"mlxproxy": "mlxproxy adds", "nginx": "nginx would add"}


def panels(report: Report) -> list[tuple[str, dict[str, float]]]:
    """Return each panel's title and the lengths of its bars in milliseconds, the model's first.

    The figure for a token is taken with one stream: a single user experiences that one, and it is
    the least favourable (more streams keep the processor awake).
    """
    added = [name for name in NAMES if name in report.contestants]
    per_token = {NAMES[name]: report.added(name, "p50", 1).median / 1000 for name in added}
    per_answer = {NAMES[name]: report.whole_added(name).median for name in added}
    return [
        ("One token", {"the model takes": TOKEN_MILLISECONDS, **per_token}),
        (
            f"An answer of {WHOLE_TOKENS} tokens",
            {"the model takes": TOKEN_MILLISECONDS * WHOLE_TOKENS, **per_answer},
        ),
    ]


def draw(report: Report, file: Path) -> None:
    """Write the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 10, **{f"axes.spines.{side}": False for side in ("top", "right", "left")}}
    with pyplot.rc_context(style):
        shown = panels(report)
        figure, axes = pyplot.subplots(1, len(shown), figsize=(11, 2.3), layout="constrained")
        for axis, (title, lengths) in zip(axes, shown, strict=True):
            names, values = list(lengths), list(lengths.values())
            colours = [MODEL, PROXY, OTHER][: len(names)]
            axis.barh(names, values, color=colours, height=0.6)
            for name, value in lengths.items():
                digits = 2 if value < TOKEN_MILLISECONDS else 0
                axis.annotate(
                    f" {value:.{digits}f} ms",
                    (max(value, 0.0), name),
                    va="center",
                    fontweight="bold" if name == NAMES["mlxproxy"] else None,
                )
            axis.invert_yaxis()
            axis.set_xlim(0, values[0] * 1.12)
            axis.tick_params(axis="y", length=0)
            axis.set_title(title, loc="left", fontsize=11)
            axis.set_xlabel("milliseconds")
        figure.supxlabel(
            f"Measured: {report.origin}. The model is taken to generate "
            f"{1000 / TOKEN_MILLISECONDS:.0f} tokens/s.",
            x=0.01,
            ha="left",
            fontsize=8,
            color="#555555",
        )
        figure.savefig(file, dpi=150)
        pyplot.close(figure)
