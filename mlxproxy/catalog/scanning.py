"""One walk through a models folder, cheap if nothing has changed since the last walk."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from mlxproxy.catalog.layout import (
    CONFIG,
    DIFFUSERS,
    NAMES,
    Folder,
)
from mlxproxy.catalog.model import Model
from mlxproxy.files import Unreadable, read_text

# A change within the clock's granularity after the last look is not visible in the times; on FAT
# the granularity is 2 s.
_GRAIN = 2_000_000_000
# The number of files, besides configs, that are checked each time: all files of a hundred models;
# of thousands of models a different part each time.
_LOOKS = 1_500
# The errors of a disk that is going away. Every other error concerns one folder only.
_GONE = {errno.EIO, errno.ENXIO, errno.ENODEV, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT}
_GONE |= {errno.EHOSTDOWN, errno.EHOSTUNREACH}

_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # control, or invalid UTF-8
_WEIGHTS = (".safetensors", ".gguf")
_RELEVANT = re.compile(
    "|".join(map(re.escape, NAMES))
    + r"|adapter_config\.json|added_tokens\.json|modules\.json"
    + r"|config_sentence_transformers\.json|vocab\.(json|txt)|tekken\.json"
    + r"|.*\.(safetensors|gguf|bin|pt|pth|model|tiktoken)"
)
_HUB = re.compile(r"models--(.+)")  # a Hugging Face cache: models--org--name/snapshots/revision
_NO_MODELS = ("datasets--", "spaces--", "__pycache__")
_REVISION = re.compile(r"\w+")

# The endings of a model's files that are read: those that mlx-lm and mlx-vlm download.
_READ = (".json", ".safetensors", ".py", ".model", ".tiktoken", ".txt", ".jsonl", ".jinja")

Signature = tuple[int, int, int]  # modified and changed, in nanoseconds; size in bytes
Identity = tuple[int, int]  # device and inode
Inspect = Callable[[Folder], Model]
# The real path of a folder, and the name, size, mtime in nanoseconds and inode of its files.
Fingerprint = tuple[str, tuple[tuple[str, int, int, int], ...]]


@dataclass(frozen=True)
class Directory:
    """A directory's contents when it had this signature; `files` is empty unless it is a model."""

    signature: Signature
    settled: bool
    files: tuple[str, ...]
    model_folders: tuple[str, ...]
    links: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """A model, and the signatures that its files had when it was read; the config's comes first."""

    model: Model
    files: tuple[tuple[str, Signature | None], ...]
    settled: bool

    def to_json(self) -> dict[str, Any]:
        """Return it in JSON's types, for the next start of the program."""
        return {"model": self.model.to_json(), "files": self.files, "settled": self.settled}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Entry:
        """Return the entry; raise KeyError, TypeError or ValueError if the values are not one's."""
        files = tuple((name, tuple(found) if found else None) for name, found in values["files"])
        return cls(Model.from_json(values["model"]), files, values["settled"] is True)


@dataclass(frozen=True)
class Snapshot:
    """The result of one walk.

    Attributes:
        missing: the root does not exist; the rest is what was known about it before.
        entries: the models, by the path of their folder.
        identities: the models' folders, to detect that two paths lead to the same one.
        problems: sentences about folders that could not be read.
        watched: the paths whose signatures show whether another walk is needed; the files of
            models, except their configs, come last.
        first_file: the index at which those files begin.
        settled: any change after the walk will show in the signatures.
        turn: the number of checks since the walk.
    """

    missing: bool = False
    directories: Mapping[str, Directory] = field(default_factory=dict)
    entries: Mapping[str, Entry] = field(default_factory=dict)
    identities: Mapping[str, Identity] = field(default_factory=dict)
    problems: frozenset[str] = frozenset()
    watched: Sequence[tuple[str, Signature | None]] = ()
    first_file: int = 0
    settled: bool = False
    turn: int = 0

    def holds(self) -> bool:
        """Return whether nothing has changed, as far as a check of some of the files can show."""
        turns = 1 + (len(self.watched) - self.first_file) // _LOOKS
        return (
            self.settled
            and not self.missing
            and _all_hold(self.watched[: self.first_file])
            and _all_hold(self.watched[self.first_file + self.turn % turns :: turns])
        )


def fingerprint(folder: str) -> Fingerprint:
    """Return what distinguishes one state of a model's files from another, without reading them.

    It changes if a link leads to another folder, and if a file is replaced or rewritten.

    Raises:
        OSError: the folder cannot be read, or a file in it has disappeared meanwhile.
    """
    with os.scandir(folder) as listing:
        names = sorted(it.name for it in listing if it.name.endswith(_READ))
    found = [(name, os.stat(f"{folder}/{name}")) for name in names]
    files = tuple((name, it.st_size, it.st_mtime_ns, it.st_ino) for name, it in found)
    return os.path.realpath(folder), files


def scan(root: str, previous: Snapshot, inspect: Inspect) -> Snapshot:
    """Bring a snapshot up to date.

    Args:
        root: an absolute path without a trailing slash.
        previous: the last snapshot; what has not changed since is not read again.
        inspect: reads one model folder.
    """
    try:
        if previous.holds():
            return replace(previous, turn=previous.turn + 1)
        before = os.stat(root)
        snapshot = _Walk(root, previous, inspect).run()
        if os.path.samestat(before, os.stat(root)):
            return snapshot
        problem = "does not exist"  # unmounted during the walk
    except (FileNotFoundError, NotADirectoryError):
        problem = "does not exist"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    problems = frozenset([f"The models folder {root!r} {problem}."])
    return replace(previous, missing=True, problems=problems)


class _Place(NamedTuple):
    """A directory to visit.

    Attributes:
        territory: the folder that links below it must not leave.
        linked: it was reached through a link, so it may have been visited already.
    """

    path: str
    id: str
    territory: str
    linked: bool


class _Walk:
    def __init__(self, root: str, previous: Snapshot, inspect: Inspect) -> None:
        self._root = root
        self._previous = previous
        self._inspect = inspect
        self._directories: dict[str, Directory] = {}
        self._entries: dict[str, Entry] = {}
        self._identities: dict[str, Identity] = {}
        self._problems: list[str] = []
        self._watched: dict[str, Signature | None] = {}
        self._files: dict[str, Signature | None] = {}
        self._visited: set[Identity] = set()
        self._folders: list[_Place] = [_Place(root, "", root, linked=False)]
        self._links: list[_Place] = []

    def run(self) -> Snapshot:
        # Links come last: a folder that is reached both ways gets the id of its real path.
        while self._folders or self._links:
            place = self._folders.pop() if self._folders else self._links.pop(0)
            try:
                self._visit(place)
            except OSError as error:
                if error.errno in _GONE or place.path == self._root:
                    raise
                if error.errno != errno.ENOENT:  # removed meanwhile, or a dangling link
                    self._problems.append(f"{place.path!r} cannot be read ({error.strerror}).")
        settled = all(it.settled for it in self._directories.values())
        settled = settled and all(it.settled for it in self._entries.values())
        return Snapshot(
            directories=self._directories,
            entries=self._entries,
            identities=self._identities,
            problems=frozenset(self._problems),
            watched=(*self._watched.items(), *self._files.items()),
            first_file=len(self._watched),
            settled=settled,
        )

    def _visit(self, place: _Place) -> None:
        path = place.path
        self._watched[path] = None
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        if place.linked and status.st_ino and identity in self._visited:
            return
        self._visited.add(identity)
        signature = (status.st_mtime_ns, status.st_ctime_ns, status.st_size)
        self._watched[path] = signature
        directory = self._previous.directories.get(path)
        if directory is None or not directory.settled or directory.signature != signature:
            directory = self._list(path, signature)
        self._directories[path] = directory
        self._problems += directory.problems
        if directory.files:
            self._identities[path] = identity
            self._model(path, place.id or os.path.basename(path), directory)
        for name in directory.model_folders:
            self._descend(place, name)
        for name in directory.links:
            self._follow(place, name)

    def _descend(self, place: _Place, name: str) -> None:
        path, id_ = f"{place.path}/{name}", f"{place.id}/{name}" if place.id else name
        if bus := _HUB.fullmatch(name):
            for moved in (f"{path}/snapshots", f"{path}/refs/main"):
                self._watched[moved] = _signature(moved)
            path, id_ = _hub_snapshot(path), bus[1].replace("--", "/")
        self._folders.append(_Place(path, id_, place.territory, place.linked))

    def _follow(self, place: _Place, name: str) -> None:
        path, id_ = f"{place.path}/{name}", f"{place.id}/{name}" if place.id else name
        territory = place.territory
        if place.path == self._root:
            territory = path  # a link in the root itself was put there for what it leads to
        elif not _inside(os.path.realpath(path), os.path.realpath(territory)):
            self._problems.append(
                f"{path!r} links to a place outside the models folder and is ignored."
            )
            return
        self._links.append(_Place(path, id_, territory, linked=True))

    def _list(self, path: str, signature: Signature) -> Directory:
        now = time.time_ns()
        files: list[str] = []
        model_folders: list[str] = []
        links: list[str] = []
        problems: list[str] = []
        with os.scandir(path) as listing:
            for item in listing:
                name = item.name
                if name.startswith("."):
                    continue
                if item.is_dir(follow_symlinks=False):
                    kind = model_folders
                elif item.is_symlink() and _leads_to_folder(item):
                    kind = links
                else:
                    files.append(name)
                    continue
                if _UNFIT.search(name):
                    problems.append(
                        f"{item.path!r} has a name that is not valid UTF-8 and is ignored."
                    )
                elif not name.startswith(_NO_MODELS):
                    kind.append(name)
        relevant = _relevant(files, alone=not model_folders and not links, root=path == self._root)
        if relevant and path != self._root:
            model_folders, links = [], []
        return Directory(
            signature,
            _settled([signature], now),
            relevant,
            tuple(model_folders),
            tuple(sorted(links)),
            tuple(problems),
        )

    def _model(self, path: str, id_: str, directory: Directory) -> None:
        now = time.time_ns()
        files = tuple((name, _signature(f"{path}/{name}")) for name in directory.files)
        entry = self._previous.entries.get(path)
        if entry is None or not entry.settled or entry.files != files or entry.model.id != id_:
            sizes = {name: found[2] if found else None for name, found in files}
            changed = next((found[0] for _, found in files if found), directory.signature[0])
            settled = _settled((found for _, found in files if found), now)
            entry = Entry(self._inspect(Folder(path, id_, sizes, changed)), files, settled)
        self._entries[path] = entry
        for name, found in files:
            (self._watched if name == CONFIG else self._files)[f"{path}/{name}"] = found


def _relevant(files: Iterable[str], *, alone: bool, root: bool) -> tuple[str, ...]:
    """Return the files by which a model is judged; none if the directory is not a model.

    A folder is a model if it has weights, or a config and no subfolders: a stray file in a
    publisher's folder must not hide the models below it. A root is one only if it has both.
    """
    relevant = sorted(filter(_RELEVANT.fullmatch, files), key=lambda name: (name != CONFIG, name))
    weights = any(name.endswith(_WEIGHTS) for name in relevant)
    config = CONFIG in relevant
    if root:
        is_model = config and any(name.endswith(".safetensors") for name in relevant)
    else:
        is_model = weights or (config and alone) or DIFFUSERS in relevant
    return tuple(relevant) if is_model else ()


def _all_hold(watched: Iterable[tuple[str, Signature | None]]) -> bool:
    """Return whether all these paths still have their signatures.

    This takes most of the time of a listing.
    """
    stat = os.stat
    for path, signature in watched:
        try:
            status = stat(path)
            found = (status.st_mtime_ns, status.st_ctime_ns, status.st_size)
        except OSError as error:
            if signature is not None or error.errno in _GONE:
                return False
        else:
            if found != signature:
                return False
    return True


def _leads_to_folder(link: os.DirEntry[str]) -> bool:
    """Return whether a link leads to a folder, or may do so once its disk is connected."""
    if os.path.isdir(link.path):
        return True
    return not os.path.exists(link.path) and not _RELEVANT.fullmatch(link.name)


def _signature(path: str) -> Signature | None:
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno in _GONE:
            raise
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size


def _settled(signatures: Iterable[Signature], now: int) -> bool:
    """Return whether the times are old enough that the next change will show in them."""
    return all(abs(now - time_) > _GRAIN for found in signatures for time_ in found[:2])


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _hub_snapshot(repository: str) -> str:
    """Return the folder of the revision that a Hugging Face cache fetched last."""
    snapshots = f"{repository}/snapshots"
    try:
        revision = read_text(f"{repository}/refs/main", 1_000_000).strip()
    except Unreadable:
        revision = ""
    if _REVISION.fullmatch(revision) and os.path.isdir(f"{snapshots}/{revision}"):
        return f"{snapshots}/{revision}"
    try:
        with os.scandir(snapshots) as listing:
            model_folders = [item for item in listing if item.is_dir(follow_symlinks=False)]
            return max(model_folders, key=lambda item: item.stat().st_mtime_ns).path
    except (OSError, ValueError):  # not a cache, or an empty one: treated like any other folder
        return repository
