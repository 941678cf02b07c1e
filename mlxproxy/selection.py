"""The selection of the model, and of its options, that a request or a load means."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlxproxy.backend.protocol import Engine
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.catalog import Catalog, Model
from mlxproxy.catalog.scanning import Fingerprint, fingerprint
from mlxproxy.controller import Controller, History
from mlxproxy.controller.state import Fallback
from mlxproxy.errors import AmbiguousModel, ModelNotFound, ModelsRootUnavailable, ProxyError
from mlxproxy.guard.check import Kind, Rules, Terms
from mlxproxy.guard.shapes import Limits
from mlxproxy.preferences import LOADED, Options, Preferences, Profile
from mlxproxy.settings import Settings

log = logging.getLogger("mlxproxy.selection")

WRITTEN: tuple[Kind, ...] = ("chat", "text", "score")
# What models answer that do not write, by their type.
ANSWERED: Mapping[str, tuple[Kind, ...]] = {"embedding": ("embed",), "reranker": ("rerank",)}
SUGGESTIONS = 3  # models that an error names
PRELOAD_RETRY_SECONDS = 2.0  # between checks for a model whose disk is not mounted yet


@dataclass(frozen=True)
class Selection:
    """The mapping from names, as clients and settings write them, to the models that they mean."""

    settings: Settings
    engines: Mapping[str, Engine]  # by their names, the preferred one first
    catalog: Catalog
    controller: Controller
    history: History
    preferences: Preferences

    def spec_for(self, name: str, fresh: bool = True, **options: Any) -> ModelSpec:
        """Return the load that a name means, with the settings' defaults.

        Args:
            name: an id, a path, the unambiguous end of an id, a profile, or an alias of these.
            fresh: check the disk, so that a model that has changed there is loaded again. A chat
                that names a known model skips this, because it would cost each chat too much.

        Raises:
            ProxyError: no model has that name, several have it, or it cannot be loaded.
        """
        model, profile = self.find(name, fresh)
        model.require_loadable()
        chosen = self._options(model, profile)
        tuning, draft = chosen.tuned(), None
        if tuning.draft_model is not None:
            draft = self.catalog.find(tuning.draft_model, fresh=False)
            tuning = replace(tuning, draft_model=str(draft.path))
        if (context := options.get("context")) is not None:
            tuning = replace(tuning, context=context)
        files = files_of(model) if fresh else None
        return ModelSpec(
            model, tuning=tuning, draft=draft, files=files, **{**chosen.load, **options}
        )

    def find(self, name: str, fresh: bool = True) -> tuple[Model, Profile | None]:
        """Return the model that a name means, and the profile if it means one.

        Args:
            name, fresh: see :meth:`spec_for`.

        Raises:
            ProxyError: no model has that name, or several have it.
        """
        profile = self.profile(name)
        meant = profile.model if profile else self._meant(name)
        return self.catalog.find(meant, fresh=fresh), profile

    def _meant(self, name: str) -> str:
        """Return the name of the model or profile that a name means. A model's own name counts more
        than an alias; what an alias names is not looked up as an alias again."""
        if name in self.preferences.profiles:
            return name
        meant = self.preferences.meaning(name)
        if meant in (None, LOADED):
            return name
        try:
            return meant if self.catalog.lookup(name) is None else name
        except AmbiguousModel:
            return name

    def needed_bytes(self, model: Model) -> int:
        """Return the memory that a load of the model needs, its draft model's included."""
        name = self.preferences.of(model.id).tuning.get("draft_model")
        if name is not None:
            with contextlib.suppress(ProxyError):
                return model.needed_bytes + self.catalog.find(name, fresh=False).needed_bytes
        return model.needed_bytes

    def _options(self, model: Model, profile: Profile | None) -> Options:
        """Return what is set for a model, from the general to the particular."""
        own = model.sampling if self.settings.sampling_defaults == "model" else {}
        general = Options({"enable_thinking": self.settings.enable_thinking}, {}, own)
        chosen = self.preferences.of(model.id).over(general)
        return profile.options.over(chosen) if profile else chosen

    def named_spec(self, name: object) -> ModelSpec | None:
        """Return the model that a request names; None if the name is not that of a model.

        Raises:
            ProxyError: several models have that name, or it cannot be loaded.
        """
        if not isinstance(name, str) or not name:
            return None
        if (resident := self.resident(name)) is not None:
            return resident
        meant = self._meant(name)
        if meant not in self.preferences.profiles:
            if (resident := self.resident(meant)) is not None:
                return resident
            if self.catalog.lookup(meant) is None:
                return None
        try:
            return self.spec_for(name, fresh=False)
        except (ModelNotFound, ModelsRootUnavailable):
            return None

    def profile(self, name: object) -> Profile | None:
        """Return the profile that a request names, directly or by an alias."""
        return self.preferences.profiles.get(self._meant(name)) if isinstance(name, str) else None

    def profile_for(self, name: object, spec: ModelSpec | None) -> Profile | None:
        """Return the profile that a request names, unless another model answers it.

        Args:
            spec: the model that answers; None: not known yet.
        """
        profile = self.profile(name)
        if profile is None or spec is None:
            return profile
        try:
            model = self.catalog.lookup(profile.model)
        except AmbiguousModel:
            return None
        return profile if model is not None and str(model.path) == spec.path else None

    def profiles(self) -> list[tuple[Profile, Model]]:
        """Return the profiles whose models are on disk, each with its model."""
        found = []
        for profile in self.preferences.profiles.values():
            with contextlib.suppress(ProxyError):
                found.append((profile, self.catalog.find(profile.model, fresh=False)))
        return found

    def strangers(self) -> list[str]:
        """Return, each as a sentence, the settings that name a model which is not on disk."""
        return self.preferences.strangers(self.catalog.knows)

    def in_force(self, model: Model, profile: Profile | None = None) -> dict[str, Any]:
        """Return the effective settings of a model: its load options and request defaults."""
        options = self._options(model, profile)
        return {"load": {**options.load, **options.tuning}, "requests": options.request}

    def fallback(self) -> Fallback:
        """Return what to load for a request that names no model while nothing is loaded.

        That is the model that was loaded last, else the only one on disk; nothing if a client has
        requested an unload since, or if there are several models and none was ever loaded.
        """
        if self.settings.model_selection != "requested":
            return Fallback()
        last = self.history.last()
        loadable = [m for m in self.catalog.models() if m.loadable and "chat" in _answered(m)]
        try:
            if last is not None:
                options = dict(last)
                spec = self.spec_for(options.pop("model_id"), **options)
                if "chat" in _answered(spec.model):
                    return Fallback(spec)
            if len(loadable) == 1 and self.history.is_empty:
                return Fallback(self.spec_for(str(loadable[0].path)))
        except ProxyError:
            pass  # it is gone, or cannot be loaded any more
        names = [model.id for model in loadable[:SUGGESTIONS]]
        if not names:
            return Fallback()
        more = ", …" if len(loadable) > len(names) else ""
        shown = ", ".join(names) + more
        return Fallback(
            advice=f"Name one as the model ({shown}), load one with POST /v1/models/load, or run "
            f"`mlxproxy load {names[0]}`."
        )

    def engine_of(self, spec: ModelSpec | None) -> Engine:
        """Return the engine of this model, or the preferred one (None)."""
        return self.engines[spec.model.engine] if spec else next(iter(self.engines.values()))

    def resident(self, name: object) -> ModelSpec | None:
        """Return the loaded model with that id or path; a profile of that name counts more."""
        if name in self.preferences.profiles:
            return None
        loaded = self.controller.residents()
        return next((spec for spec in loaded if name in (spec.path, spec.model_id)), None)

    def meant(self, name: object, kind: Kind) -> ModelSpec | None:
        """Return the model for a request of this kind; None: whatever is loaded.

        For embeddings and rankings, a name that no model has means the model that is loaded for
        them, else the only one on disk: clients insist on names such as ``text-embedding-3-small``.

        Raises:
            ModelNotFound: the request needs a name.
            ProxyError: several models have that name, or it cannot be loaded.
        """
        spec = self.named_spec(name)
        if spec is not None or kind in WRITTEN:
            return spec
        resident = (one for one in self.controller.residents() if kind in _answered(one.model))
        if (spec := next(resident, None)) is not None:
            return spec
        models = [m for m in self.catalog.models() if m.loadable and kind in _answered(m)]
        if len(models) == 1:
            return self.spec_for(str(models[0].path), fresh=False)
        what = {"embed": "an embedding model", "rerank": "a reranker"}[kind]
        if not models:
            raise ModelNotFound(
                f"No model can be loaded as {what}. GET /v1/models?all=true gives the reasons.",
                param="model",
            )
        names = ", ".join(model.id for model in models[:SUGGESTIONS])
        raise ModelNotFound(f"Name {what} as the model: {names}.", param="model")

    def expected(self, name: object, kind: Kind = "chat") -> ModelSpec | None:
        """Return the model that will most likely answer a request with that name; None if nothing
        is loaded.

        Raises:
            ProxyError: several models have that name, or it cannot be loaded.
        """
        if kind not in WRITTEN:
            return self.meant(name, kind)
        if self.settings.model_selection == "requested":
            return self.named_spec(name) or self.controller.current()
        return self.resident(name) or self.controller.current()

    def path_of(self, name: str) -> str:
        """Return the path of a model that is loaded, is being loaded, or is on disk.

        Raises:
            ProxyError: no model has that name, or several have it.
        """
        resident = self.resident(name)
        return resident.path if resident is not None else str(self.find(name)[0].path)

    def terms(self, spec: ModelSpec | None, profile: Profile | None = None) -> Terms:
        """Return what a request to this model may say.

        Args:
            spec: the model; None: any model, as far as that is known.
            profile: the profile by which the request names it, if any.
        """
        defaults = self._options(spec.model, profile).request if spec else {}
        return Terms(self._rules(spec), self._limits(spec), defaults)

    def _rules(self, spec: ModelSpec | None) -> Mapping[Kind, Rules]:
        """Return the rules for what this model answers; None: any, by the preferred engine's."""
        if spec is None:
            ranked = reversed([*self.engines.values()])
            return {kind: rules for engine in ranked for kind, rules in engine.rules.items()}
        rules = self.engine_of(spec).rules
        return {kind: rules[kind] for kind in _answered(spec.model) if kind in rules}

    def _limits(self, spec: ModelSpec | None) -> Limits:
        names = frozenset(self.settings.template_kwargs)
        if spec is None:
            return Limits(template_kwargs=names)
        return Limits(
            template_kwargs=names,
            adapters=spec.adapters,
            draft_models=spec.draft_models,
            vocab_size=spec.model.vocab_size or 0,
            max_context=spec.max_context,
            images=spec.model.capabilities.vision,
        )

    def preload(self, closed: Callable[[], bool]) -> None:
        """Load the model that PRELOAD names, in the background; wait for a disk mounted late.

        Args:
            closed: returns whether the proxy is shutting down.
        """
        name = self.settings.preload
        options: dict[str, Any] = {}
        if name == "last":
            last = self.history.last()
            if last is None:
                return
            options = dict(last)
            name = options.pop("model_id")
        if name is not None:
            threading.Thread(
                target=self._preload, args=(name, options, closed), name="preload", daemon=True
            ).start()

    def _preload(self, name: str, options: dict[str, Any], closed: Callable[[], bool]) -> None:
        pause = threading.Event()
        reported = False
        while not closed() and self.controller.never_asked():
            try:
                self.controller.load(self.spec_for(name, **options))
                return
            except ProxyError as error:
                absent = isinstance(error, ModelNotFound)
                if not reported and not (absent and self.catalog.missing_roots()):
                    ending = " Waiting for it to appear." if absent else ""
                    log.warning("PRELOAD: %s%s", error.message, ending)
                    reported = True
            pause.wait(PRELOAD_RETRY_SECONDS)


def _answered(model: Model) -> tuple[Kind, ...]:
    """Return the kinds of requests that a model answers."""
    return ANSWERED.get(model.type, WRITTEN)


def as_it_is_now(spec: ModelSpec, catalog: Catalog) -> ModelSpec:
    """Return the load with the model that is at its path now, which may have changed meanwhile.

    A model that is gone is left to the backend, which reports what is wrong with it.
    """
    try:
        model = catalog.find(spec.path)
    except ProxyError:
        model = spec.model
    return replace(spec, model=model, files=files_of(model))


def files_of(model: Model) -> Fingerprint | None:
    """Return a fingerprint of the model's files, which detects changes; None if its disk does not
    respond, because reading it might hang."""
    if model.stale:
        return None
    try:
        return fingerprint(str(model.path))
    except OSError:
        return None
