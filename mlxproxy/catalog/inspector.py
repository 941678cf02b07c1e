"""What the catalogue asks of engines: which models they serve, and what these need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mlxproxy.catalog.layout import Folder
from mlxproxy.catalog.model import Model


class Inspector(Protocol):
    """Reads model folders for an engine."""

    @property
    def fingerprint(self) -> str:
        """Differs from that of another day if the same folder may be judged otherwise."""

    def __call__(self, folder: Folder) -> Model:
        """Return the model in a folder; whatever is wrong with it stands in its `reason`."""


class Inspectors:
    """Several engines' inspectors as one: the first engine that can load a model serves it.

    Args:
        inspectors: at least one; if no engine can load a model, the reason is the first one's.
    """

    def __init__(self, inspectors: Sequence[Inspector]) -> None:
        self._inspectors = inspectors

    @property
    def fingerprint(self) -> str:
        """Differs if that of any of them does."""
        return "|".join(inspector.fingerprint for inspector in self._inspectors)

    def __call__(self, folder: Folder) -> Model:
        """Return the model in a folder."""
        models = (inspector(folder) for inspector in self._inspectors)
        first = next(models)
        if first.loadable:
            return first
        return next((model for model in models if model.loadable), first)
