"""The catalogue: every model in the models folders, as the folders are now."""

from __future__ import annotations

import difflib
import hashlib
import heapq
import json
import logging
import os
import threading
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mlxproxy import __version__
from mlxproxy.catalog.inspector import Inspector
from mlxproxy.catalog.model import Model
from mlxproxy.catalog.root_scanner import RootScanner
from mlxproxy.catalog.scanning import Entry, Identity, Snapshot, scan
from mlxproxy.errors import AmbiguousModel, ModelNotFound, ModelsRootUnavailable
from mlxproxy.files import MB, note, read_record

__all__ = ["LONGEST_NAME", "Catalog", "Model"]

log = logging.getLogger("mlxproxy.catalog")

PATIENCE = 1.0  # seconds that a caller waits for a disk to answer
FIRST_PATIENCE = 5.0  # the same for a listing when nothing has been read yet
_GLANCE = 0.1  # the same when a quick answer matters more than a fresh one
LOOK_AGAIN_SECONDS = 2.0  # between two looks at the disk for unknown names
_FORMAT = 6  # version of the cache file's format
_CACHE_BYTES = 256 * MB  # ten thousand models take 30 MB
_SUGGESTIONS = 3
# Linux's PATH_MAX: no model has a longer name. The time that Unicode normalization takes grows with
# the square of the combining characters: 2 ms for this many bytes, minutes for a megabyte.
LONGEST_NAME = 4096
_SHOWN = 300  # characters of a name that an error repeats
_COMPARED = 100  # characters of a name that are compared with those of the models
_CLOSEST = 20  # names that are compared in full, which takes time in the square of their length


class Catalog:
    """The models in the models folders. Safe to use from many threads at the same time.

    Args:
        roots: folders, in order of precedence; they need not exist yet.
        inspect: reads a model folder, for all engines.
        cache_file: keeps what was read, so that the next start need not read it again.
        patience: seconds that a call waits for the disks before it answers with what was known.
        first_patience: seconds that the first scan may take before callers stop waiting for it.
    """

    def __init__(
        self,
        roots: Sequence[Path],
        inspect: Inspector,
        *,
        cache_file: Path | None = None,
        patience: float = PATIENCE,
        first_patience: float = FIRST_PATIENCE,
    ) -> None:
        self._patience = patience
        self._first_patience = first_patience
        self._cache_file = cache_file
        self._fingerprint = f"{__version__}:{_FORMAT}:{inspect.fingerprint}"
        self._saving = threading.Lock()
        self._merging = threading.Lock()
        self._listing = _Listing()
        self._looked_at = -LOOK_AGAIN_SECONDS
        self._shelves = [
            RootScanner(
                root,
                self._remembered,
                lambda root, previous: scan(root, previous, inspect),
                self._write_cache,
            )
            for root in dict.fromkeys(os.path.abspath(root) for root in roots)
        ]

    def models(self) -> list[Model]:
        """Return all models, usable or not, sorted by id; stale if their disk does not answer."""
        return list(self._fresh().models)

    def find(self, name: str, *, fresh: bool = True) -> Model:
        """Return the model with that name: an id, a folder's absolute path, or the end of an id.

        An exact match wins; otherwise case is ignored. A model that cannot be loaded is found
        too; if a short name matches several models, the only loadable one among them is meant.

        Args:
            name: as a client sent it.
            fresh: look at the disk first; otherwise only if the name is not known.

        Raises:
            ModelNotFound: there is none; the message suggests up to three similar names.
            AmbiguousModel: a short name matches several models.
            ModelsRootUnavailable: no models folder exists, or none has answered yet.
        """
        if _is_too_long(name):
            raise ModelNotFound(self._not_found(name, ()), param="model")
        if not fresh and (known := self._listing.named(name)):
            return _single(name, known)
        listing = self._fresh()
        if not (found := listing.named(name)) and not self.known and self.is_complete():
            listing = self._fresh()  # the first scan may take a while
            found = listing.named(name)
        if found:
            return _single(name, found)
        self.require_disk()
        raise ModelNotFound(self._not_found(name, listing.similar(name)), param="model")

    def knows(self, name: str) -> bool:
        """Return whether a model has that name, as far as the disks have told."""
        try:
            self.find(name, fresh=False)
        except (ModelNotFound, ModelsRootUnavailable):
            return False
        except AmbiguousModel:
            pass
        return True

    def lookup(self, name: str) -> Model | None:
        """Return the model with that name; None if there is none.

        This is called for every request, whose name need not be a model's: an unknown name costs a
        look at the disk only if the last such look was LOOK_AGAIN_SECONDS ago.

        Raises:
            AmbiguousModel: a short name matches several models.
        """
        if _is_too_long(name):
            return None
        if not (found := self._listing.named(name)) and self._is_time_to_look():
            found = self._fresh().named(name)
        return _single(name, found) if found else None

    def _is_time_to_look(self) -> bool:
        now = time.monotonic()
        if self.known and now - self._looked_at < LOOK_AGAIN_SECONDS:
            return False
        self._looked_at = now
        return True

    @property
    def roots(self) -> list[Path]:
        """The models folders, in order of precedence."""
        return [Path(shelf.root) for shelf in self._shelves]

    @property
    def known(self) -> bool:
        """Whether every models folder has been read, so that what is not listed was not there."""
        return all(shelf.known for shelf in self._shelves)

    def is_complete(self) -> bool:
        """Wait for the first scan of a large or slow library, then return :attr:`known`."""
        patience = self._first_patience
        until = time.monotonic() + patience
        for shelf in self._shelves:
            if not shelf.known:
                shelf.request()
        return all(shelf.known or shelf.wait(1, patience, until) for shelf in self._shelves)

    def require_disk(self) -> None:
        """Raise an error if a model that is not listed may exist nevertheless.

        Raises:
            ModelsRootUnavailable: a folder has not been read yet, or none of them exists.
        """
        silent = [shelf.root for shelf in self._shelves if not shelf.known]
        if silent:
            raise ModelsRootUnavailable(
                f"The models folder '{silent[0]}' is still being read. Try again in a moment.",
                retry_after=5,
            )
        missing = [shelf.root for shelf in self._shelves if shelf.snapshot.missing]
        if len(missing) == len(self._shelves):
            places = "' and '".join(missing)
            raise ModelsRootUnavailable(
                f"The models folder '{places}' does not exist. Connect its disk, or set "
                "MODELS_ROOT."
            )

    def missing_roots(self) -> list[Path]:
        """Return the models folders that are missing or cannot be read, almost immediately."""
        self._look(min(_GLANCE, self._patience))
        return [Path(shelf.root) for shelf in self._shelves if shelf.snapshot.missing]

    def _look(self, patience: float) -> list[bool]:
        """Have all roots scanned; return for each whether its disk answered in time."""
        numbers = [shelf.request() for shelf in self._shelves]
        until = time.monotonic() + patience
        return [
            shelf.wait(number, self._patience, until)
            for shelf, number in zip(self._shelves, numbers, strict=True)
        ]

    def _fresh(self) -> _Listing:
        """Return the current listing; of a disk that does not answer, what it last held."""
        answered = self._look(self._patience)
        shelves = [
            (shelf.root, shelf.snapshot, not fresh)
            for shelf, fresh in zip(self._shelves, answered, strict=True)
        ]
        with self._merging:
            if not self._listing.is_of(shelves):
                before, self._listing = self._listing, _Listing.of(shelves)
                for problem in sorted(self._listing.problems - before.problems):
                    log.warning("%s", problem)
            return self._listing

    def _not_found(self, name: str, similar: Sequence[str]) -> str:
        message = f"No model {_quoted(name)}."
        if similar:
            choice = " or ".join([", ".join(similar[:-1]), similar[-1]] if similar[1:] else similar)
            return f"{message} Did you mean {choice}?"
        return f"{message} GET /v1/models lists what is available."

    def _remembered(self, root: str) -> Snapshot:
        """Return what an earlier run saved about a root; nothing unless the record is intact."""
        kept = read_record(self._cache_file, _CACHE_BYTES) if self._cache_file else {}
        try:
            if kept["fingerprint"] != self._fingerprint or kept["digest"] != _digest(kept["roots"]):
                return Snapshot()
            entries = kept["roots"].get(root, {})
            return Snapshot(entries={it: Entry.from_json(entries[it]) for it in entries})
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            return Snapshot()

    def _write_cache(self) -> None:
        if self._cache_file is None:
            return
        with self._saving:
            roots: dict[str, Any] = {
                shelf.root: {path: it.to_json() for path, it in shelf.snapshot.entries.items()}
                for shelf in self._shelves
            }
            known = {"fingerprint": self._fingerprint, "digest": _digest(roots), "roots": roots}
            note(self._cache_file, known)


def _digest(value: Any) -> str:
    """Return a digest that proves a value to be the one that was written, as a whole."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@dataclass(frozen=True)
class _Listing:
    """The models of all roots together, and the names by which they are found."""

    shelves: Sequence[tuple[str, Snapshot, bool]] = ()  # root, snapshot, stale
    models: Sequence[Model] = ()
    problems: frozenset[str] = frozenset()
    names: Mapping[str, Model] = field(default_factory=dict)  # ids and paths as they are

    @classmethod
    def of(cls, shelves: Sequence[tuple[str, Snapshot, bool]]) -> _Listing:
        models: dict[str, Model] = {}
        problems = set()
        for root, model in _without_doubles(shelves):
            if first := models.get(model.id):
                other = _told_apart(model.id, root, models)
                problems.add(
                    f"'{first.path}' and '{model.path}' have the same id; the second is '{other}'."
                )
                model = replace(model, id=other)
            models[model.id] = model
        return cls(
            shelves,
            [models[id_] for id_ in sorted(models)],
            frozenset(problems),
            {**{str(model.path): model for model in models.values()}, **models},
        )

    def is_of(self, shelves: Sequence[tuple[str, Snapshot, bool]]) -> bool:
        """Return whether it was made from these shelves and nothing in them has changed since."""
        return len(shelves) == len(self.shelves) and all(
            root == old_root
            and stale == old_stale
            and snapshot.missing == old.missing
            and (snapshot.entries is old.entries or snapshot.entries == old.entries)
            for (root, snapshot, stale), (old_root, old, old_stale) in zip(
                shelves, self.shelves, strict=True
            )
        )

    @cached_property
    def _folded(self) -> Mapping[str, list[Model]]:
        """The models by folded path, id and end of an id; a path or whole id wins over an end."""
        whole: dict[str, list[Model]] = {}
        ends: dict[str, list[Model]] = {}
        for model in self.models:
            id_ = _folded(model.id)
            whole.setdefault(id_, []).append(model)
            whole.setdefault(_folded(str(model.path)), []).append(model)
            while "/" in id_:
                id_ = id_.partition("/")[2]
                ends.setdefault(id_, []).append(model)
        return {**ends, **whole}

    @cached_property
    def _short_names(self) -> Mapping[str, str]:
        """The folded last parts of loadable models' ids, with the id of the first that has it."""
        ids: dict[str, str] = {}
        for model in self.models:
            if model.loadable:
                ids.setdefault(_folded(model.id).rpartition("/")[2], model.id)
        return ids

    def named(self, name: str) -> Sequence[Model]:
        """Return the models that best match a name of at most LONGEST_NAME bytes."""
        name = name.rstrip("/") if len(name) > 1 else name
        if exact := self.names.get(name):
            return [exact]
        return self._folded.get(_folded(name), ())

    def similar(self, name: str) -> list[str]:
        """Return up to three ids of loadable models whose spelling is close to the name."""
        ids = self._short_names
        wanted = _folded(name.rpartition("/")[2][:_COMPARED])
        near = [short for short in ids if wanted and wanted in short]
        matcher = difflib.SequenceMatcher(b=wanted)

        def likeness(short: str) -> float:
            matcher.set_seq1(short[:_COMPARED])
            return matcher.quick_ratio()  # an upper bound, in linear time

        closest = heapq.nlargest(_CLOSEST, ids, likeness)
        near += difflib.get_close_matches(wanted, closest, n=_SUGGESTIONS, cutoff=0.5)
        return [ids[short] for short in dict.fromkeys(near)][:_SUGGESTIONS]


def _without_doubles(
    shelves: Iterable[tuple[str, Snapshot, bool]],
) -> Iterable[tuple[str, Model]]:
    """Yield each root's models; a folder that two roots contain belongs to the first."""
    seen: set[Identity] = set()
    for root, snapshot, stale in shelves:
        missing = Path(root) if snapshot.missing else None
        for path in sorted(snapshot.entries):
            identity = snapshot.identities.get(path)
            if identity is not None and identity[1] and identity in seen:
                continue
            if identity is not None:
                seen.add(identity)
            model = snapshot.entries[path].model
            if stale or missing:
                model = replace(model, stale=True, missing_root=missing)
            yield root, model


def _told_apart(id_: str, root: str, taken: Mapping[str, Model]) -> str:
    """Return another id for the second model with an id: with its root's name, or a number."""
    other, number = f"{id_}@{os.path.basename(root)}", 2
    while other in taken:
        other, number = f"{id_}@{number}", number + 1
    return other


def _single(name: str, found: Sequence[Model]) -> Model:
    loadable = [model for model in found if model.loadable]
    candidates = loadable or found
    if len(candidates) == 1:
        return candidates[0]
    ids = [model.id for model in candidates]
    shown = ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
    raise AmbiguousModel(
        f"{_quoted(name)} matches {len(ids)} models: {shown}. Give the full id of one of them.",
        param="model",
        candidates=ids,
    )


def _is_too_long(name: str) -> bool:
    """Return whether a name has more bytes than any path, without encoding a huge one."""
    return len(name) > LONGEST_NAME or len(name.encode(errors="surrogatepass")) > LONGEST_NAME


def _folded(name: str) -> str:
    """Return a name for comparison: macOS decomposes some letters, and users forget the case."""
    return unicodedata.normalize("NFC", name).casefold()


def _quoted(name: str) -> str:
    return repr(name if len(name) <= _SHOWN else name[:_SHOWN] + "…")
