"""The catalogue's questions to the engines: which models they serve, and what these need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mlxproxy.catalog.layout import Folder
from mlxproxy.catalog.model import Model


class Inspector(Protocol):
    """A reader of model folders for an engine."""

    @property
    def fingerprint(self) -> str:
        """An identifier that changes if the same folder may be judged differently than before."""

    def __call__(self, folder: Folder) -> Model:
        """Return the model in a folder; its `reason` says what is wrong with it, if anything is."""


class Inspectors:
    """The inspectors of several engines as one: the first engine that can load a model serves it.

    Args:
        inspectors: at least one; if no engine can load a model, the reason is the first one's.
    """

    def __init__(self, inspectors: Sequence[Inspector]) -> None:
        self._inspectors = inspectors

    @property
    def fingerprint(self) -> str:
        """The fingerprints of all inspectors, joined."""
        return "|".join(inspector.fingerprint for inspector in self._inspectors)

    def __call__(self, folder: Folder) -> Model:
        """Return the model in a folder."""
        models = (inspector(folder) for inspector in self._inspectors)
        first = next(models)
        if first.loadable:
            return first
        return next((model for model in models if model.loadable), first)
