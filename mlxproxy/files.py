"""Files that anybody may have written or replaced: bounded reads and atomic writes.

A FIFO in place of a file is never waited for, and a directory in its place is moved aside.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MB = 1_000_000
RECORD_BYTES = MB  # for one of this program's records: a few paths and numbers


class Unreadable(Exception):
    """A file cannot be used; the message is a phrase that begins with the file's name."""


class Missing(Unreadable):
    """There is no such file."""


def opened(path: str) -> int:
    """Return a descriptor for reading a regular file; the caller closes it.

    Raises:
        Unreadable: the file is missing, is not a regular file, or the system refuses to open it.
    """
    name = os.path.basename(path)
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer that never comes.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Missing(f"{name} is missing") from None
    except (OSError, ValueError) as error:  # a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise Unreadable(f"{name} cannot be read ({reason})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unreadable(f"{name} is not a regular file")
    return descriptor


@contextmanager
def open_regular(path: str) -> Iterator[tuple[int, int]]:
    """Open a file for reading if it is a regular file.

    Yields:
        The file's descriptor, and its size in bytes.

    Raises:
        Unreadable: the file is missing, is not a regular file, or the system refuses to open it.
    """
    descriptor = opened(path)
    try:
        yield descriptor, os.fstat(descriptor).st_size
    except OSError as error:
        name = os.path.basename(path)
        raise Unreadable(f"{name} cannot be read ({error.strerror})") from None
    finally:
        os.close(descriptor)


def read_text(path: str, limit: int) -> str:
    """Return the text of a file of at most `limit` bytes.

    Raises:
        Unreadable: the file cannot be opened, is larger, or is not UTF-8.
    """
    name = os.path.basename(path)
    with open_regular(path) as (file, size):
        if size > limit:
            raise Unreadable(f"{name} is larger than {limit // MB} MB")
        content = os.read(file, size)
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise Unreadable(f"{name} is not UTF-8 text") from None


def read_object(path: str, limit: int) -> dict[str, Any]:
    """Return the JSON object in a file of at most `limit` bytes.

    Raises:
        Unreadable: the file cannot be read, is not JSON, or does not contain an object.
    """
    name = os.path.basename(path)
    try:
        value = json.loads(read_text(path, limit))
    except json.JSONDecodeError as error:
        raise Unreadable(f"{name} is not valid JSON (line {error.lineno})") from None
    except (ValueError, RecursionError):  # a number of 5,000 digits; 100,000 brackets
        raise Unreadable(f"{name} is not valid JSON") from None
    if not isinstance(value, dict):
        raise Unreadable(f"{name} does not hold a JSON object")
    return value


def read_record(path: Path, limit: int = RECORD_BYTES) -> dict[str, Any]:
    """Return the object in one of this program's files, or an empty object if there is none."""
    try:
        return read_object(str(path), limit)
    except Unreadable:
        return {}


def write_record(path: Path, value: dict[str, Any]) -> None:
    """Replace the file atomically.

    Raises:
        OSError: the disk is full, or the folder is not writable; the old file is still there.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(value))  # json.dump has no fast path
        try:
            os.replace(temporary, path)
        except IsADirectoryError:
            _put_aside(path)
            os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def note(path: Path, value: dict[str, Any]) -> None:
    """Replace the file if possible; for data that is only kept for convenience."""
    with contextlib.suppress(OSError):
        write_record(path, value)


def remove(path: Path) -> None:
    """Remove one of this program's files if it exists and can be removed."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _put_aside(path: Path) -> None:
    """Move a foreign directory out of the way; somebody may still need its content."""
    path.rename(Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}.")) / path.name)
