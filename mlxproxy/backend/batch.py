"""Which requests a process may answer at the same time."""

from __future__ import annotations

from typing import NamedTuple

from mlxproxy.backend.spec import ModelSpec


class Batch(NamedTuple):
    """The requests that a process may answer at the same time: those whose batches are equal.

    Attributes:
        engine: the engine for which it was found; None: any.
        model: the path of the model for which it was found; None: any of the engine's.
        settings: what the requests have in common; None: each of them is answered alone.
    """

    engine: str | None = None
    model: str | None = None
    settings: tuple[object, ...] | None = ()

    @property
    def is_alone(self) -> bool:
        return self.settings is None

    def admits(self, other: Batch, spec: ModelSpec) -> bool:
        """Return whether a process of this load may answer both at the same time.

        A request may wait for one model and be answered by another. What was found for the former
        does not count for the latter, so it is answered alone.
        """
        return (
            self.settings is not None
            and self == other
            and (self.engine is None or self.engine == spec.model.engine)
            and (self.model is None or self.model == spec.path)
        )


ANY_BATCH = Batch()
