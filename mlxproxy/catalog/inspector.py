"""The catalogue's questions to the engines: which models they serve, and what these need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from mlxproxy.catalog.layout import Folder
from mlxproxy.catalog.model import Model


class Inspector(Protocol):
    """A reader of model folders for an engine."""

    @property
    def kinds(self) -> frozenset[str]:
        """The types of model that the engine is made for (`Model.type`)."""

    @property
    def fingerprint(self) -> str:
        """An identifier that changes if the same folder may be judged differently than before."""

    def __call__(self, folder: Folder) -> Model:
        """Return the model in a folder; its `reason` says what is wrong with it, if anything is."""


class Choice(Protocol):
    """The user's choice of engines for models."""

    @property
    def fingerprint(self) -> str:
        """An identifier that changes with the choice."""

    def __call__(self, model_id: str) -> str | None:
        """Return the name of the engine chosen for a model; None: the best one."""


class Inspectors:
    """The inspectors of several engines as one, which decides the engine of each model.

    A model goes where it does most: of the engines that can load it, to the first that passes
    images to it, else to the first. If none can, the reason is that of the engine made for its
    type, else the first one's. The first engine's word is enough for a model that it can load and
    that no other is made for: a library is read once, not once per engine.

    Args:
        inspectors: at least one, the preferred one first.
        chosen: the user's choice, which overrides all this.
    """

    def __init__(self, inspectors: Sequence[Inspector], chosen: Choice | None = None) -> None:
        self._inspectors = inspectors
        self._chosen = chosen

    @property
    def kinds(self) -> frozenset[str]:
        """The types of model that there is an engine for."""
        return frozenset().union(*(inspector.kinds for inspector in self._inspectors))

    @property
    def fingerprint(self) -> str:
        """The fingerprints of all inspectors, joined, and that of the choice."""
        parts = [inspector.fingerprint for inspector in self._inspectors]
        parts.append(self._chosen.fingerprint if self._chosen else "")
        return "|".join(filter(None, parts))

    def __call__(self, folder: Folder) -> Model:
        """Return the model in a folder."""
        chosen = self._chosen(folder.id) if self._chosen else None
        first, *others = self._inspectors
        model = first(folder)
        if model.loadable and not chosen and not any(model.type in it.kinds for it in others):
            return model
        found = [model, *(inspector(folder) for inspector in others)]
        if chosen:
            return next((one for one in found if one.engine == chosen), model)
        made = [
            one
            for inspector, one in zip(self._inspectors, found, strict=True)
            if model.type in inspector.kinds and model.compatibility_type == "mlx"
        ]
        able = [one for one in found if one.loadable]
        if not able:
            return made[0] if made else model
        best = max(able, key=_reach)
        more = (one.reason for one in made if one is not model and not one.loadable)
        return replace(best, lacking=next(more, None))


def _reach(model: Model) -> bool:
    """Return whether an engine uses all of a model; the first of the best counts."""
    return model.capabilities.vision
