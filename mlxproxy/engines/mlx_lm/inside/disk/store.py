"""The folder of all models' entries: one folder for each fingerprint, one file for each entry.

Several processes may use it at the same time. Each writes whole files only, any may delete any, and
a file that is gone is not missed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

SUFFIX = ".kv"
PART = ".part"
ABOUT = "about.json"  # in each folder, for people and `mlxproxy cache ls`
ABOUT_BYTES = 1 << 16
STALE_SECONDS = 3600.0  # no file is written for as long
MOST_ENTRIES = 4096
# Room that is always left on the disk: a full one breaks more than a cache is worth.
RESERVE_BYTES = 1 << 30


class NoRoom(Exception):
    """An entry cannot be stored; the message says why."""


@dataclass(frozen=True)
class Stored:
    """A file of the store.

    Attributes:
        used: when it was last used, in Unix seconds.
    """

    path: Path
    size: int
    used: float


class Store:
    """All entries on disk.

    Args:
        root: the folder.
        budget: the bytes that all entries of all models may take.
    """

    def __init__(self, root: Path, budget: int) -> None:
        self.root = root
        self._budget = budget

    def folder(self, name: str, about: dict[str, Any]) -> Path:
        """Return the folder of that name; make it if it is missing.

        Raises:
            OSError: it cannot be made.
        """
        folder = self.root / name
        for path in (self.root, folder):
            path.mkdir(mode=0o700, exist_ok=True)
        if self.root.stat().st_mode & 0o077:  # somebody else has made it
            self.root.chmod(0o700)
        with contextlib.suppress(FileExistsError), _new(folder / ABOUT) as file:
            file.write(json.dumps(about).encode())
        return folder

    def entries(self) -> list[Stored]:
        """Return all entries, the one that was not used for the longest time first."""
        found = [stored for folder in folders(self.root) for stored in entries(folder)]
        return sorted(found, key=lambda stored: stored.used)

    def sweep(self) -> None:
        """Delete what processes that were killed have left, and folders without entries."""
        for folder in folders(self.root):
            now = time.time()
            with contextlib.suppress(OSError):
                for file in folder.iterdir():
                    if file.name.endswith(PART) and now - file.stat().st_mtime > STALE_SECONDS:
                        delete(file)
                if now - folder.stat().st_mtime > STALE_SECONDS and not entries(folder):
                    clear(folder)

    def make_room(self, size: int) -> list[Path]:
        """Delete the entries unused for the longest time until one of `size` bytes fits.

        Returns:
            The deleted files.

        Raises:
            NoRoom: it does not fit, whatever is deleted.
        """
        if size > self._budget:
            raise NoRoom("it is larger than PROMPT_CACHE_DISK")
        stored = self.entries()
        total = sum(each.size for each in stored)
        free = shutil.disk_usage(self.root).free - RESERVE_BYTES
        if size > free + total:
            raise NoRoom("the disk is almost full")
        evicted = []
        while stored and (
            total + size > self._budget or size > free or len(stored) >= MOST_ENTRIES
        ):
            oldest = stored.pop(0)
            delete(oldest.path)
            evicted.append(oldest.path)
            total -= oldest.size
            free += oldest.size
        return evicted


def name_of(tokens: bytes) -> str:
    """Return the name of the file for these tokens: two processes write the same entry once."""
    return blake2b(tokens, digest_size=16).hexdigest() + SUFFIX


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Write a file that appears only when it is whole.

    Raises:
        OSError: such as a full disk; nothing is left behind.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    with contextlib.suppress(FileNotFoundError):  # of an earlier process with this number
        part.unlink()
    try:
        with _new(part) as file:
            yield file
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def reading(path: Path) -> BinaryIO:
    """Open an entry.

    Raises:
        OSError: it is missing, or no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} is not a regular file")
    return os.fdopen(descriptor, "rb")


def used(path: Path) -> None:
    """Record that an entry has been used now."""
    with contextlib.suppress(OSError):
        os.utime(path)


def delete(path: Path) -> None:
    """Delete a file, unless another process has done that."""
    with contextlib.suppress(OSError):
        path.unlink()


def folders(root: Path) -> list[Path]:
    """Return the folders of all models."""
    try:
        with os.scandir(root) as found:
            return sorted(Path(it.path) for it in found if it.is_dir(follow_symlinks=False))
    except OSError:
        return []


def entries(folder: Path) -> list[Stored]:
    """Return the entries in a model's folder."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as items:
        for item in items:
            with contextlib.suppress(OSError):
                if item.name.endswith(SUFFIX) and item.is_file(follow_symlinks=False):
                    status = item.stat(follow_symlinks=False)
                    found.append(Stored(Path(item.path), status.st_size, status.st_mtime))
    return found


def clear(folder: Path) -> None:
    """Delete a model's entries, and its folder if nothing else is in it."""
    for stored in entries(folder):
        delete(stored.path)
    if not entries(folder):
        delete(folder / ABOUT)
        with contextlib.suppress(OSError):
            folder.rmdir()


def about(folder: Path) -> dict[str, Any]:
    """Return what a model's folder says about itself; empty if that cannot be read."""
    try:
        with reading(folder / ABOUT) as file:
            value = json.loads(file.read(ABOUT_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _new(path: Path) -> BinaryIO:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o600), "wb")
