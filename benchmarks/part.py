"""The parts of the benchmark: each is measured, stored and shown by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from benchmarks.figures import Goal
from benchmarks.sheet import Sheet


@dataclass(frozen=True)
class Place:
    """Where a part is measured.

    Attributes:
        folder: an empty folder of its own.
        models: a models folder with the tiny models `bench/alpha` to `bench/delta`.
        demo: the models folder of the demo model, which is downloaded if it is missing.
        say: called with a word about what comes next.
    """

    folder: Path
    models: Path
    demo: Path
    say: Callable[[str], None]


class Part(Protocol):
    """A part, as a dataclass of what was measured; an empty one has measured nothing.

    Attributes:
        NAME: for `--only`.
        ALWAYS: whether a run without `--only` includes it.
        NOTE: a paragraph for the reader of its tables.
    """

    NAME: ClassVar[str]
    ALWAYS: ClassVar[bool]
    NOTE: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @classmethod
    def measure(cls, place: Place, quick: bool) -> Part:
        """Measure everything; `quick` does one round of the least that is useful."""

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Part:
        """Return what :func:`to_json` and JSON have converted."""

    def sheets(self) -> Iterator[Sheet]:
        """Yield its tables."""

    def goals(self) -> Iterator[Goal]:
        """Yield its goals, each with the measured value."""


def to_json(part: Part) -> dict[str, Any]:
    """Return all values of a part."""
    return asdict(part)
