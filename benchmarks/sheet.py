"""A table, independent of its output format."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.figures import Figure


@dataclass
class Sheet:
    """A table.

    Attributes:
        columns: their heads; the first one is that of the rows.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        self.rows.append(cells)


def spread(figure: Figure, digits: int) -> str:
    """Return the median of a figure, with the least and the most of its rounds."""
    if not any(figure.rounds):
        return ""
    median = f"{figure.median:.{digits}f}"
    if len(figure.rounds) < 2:
        return median
    return f"{median} ({figure.low:.{digits}f}-{figure.high:.{digits}f})"
