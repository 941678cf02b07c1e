"""Reading of files that anybody may have written: bounded, and never waiting for a FIFO."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MB = 1_000_000


class Unreadable(Exception):
    """A file cannot be used. The message is a phrase that begins with the file's name."""


@contextmanager
def open_regular(path: str) -> Iterator[tuple[int, int]]:
    """Opens a file for reading if it is a regular one.

    Yields:
        The file's descriptor, and its size in bytes.

    Raises:
        Unreadable: it is missing, not a regular file, or the system refuses it.
    """
    name = os.path.basename(path)
    try:
        # Without O_NONBLOCK the opening of a FIFO waits for a writer that never comes.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable(f"{name} is not a regular file")
            yield descriptor, status.st_size
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise Unreadable(f"{name} is missing") from None
    except IsADirectoryError:
        raise Unreadable(f"{name} is not a regular file") from None
    except OSError as error:
        raise Unreadable(f"{name} cannot be read ({error.strerror})") from None


def read_text(path: str, limit: int) -> str:
    """The text of a file of at most `limit` bytes.

    Raises:
        Unreadable: it cannot be opened, is larger, or is not UTF-8.
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
    """The JSON object in a file of at most `limit` bytes.

    Raises:
        Unreadable: it cannot be read, is not JSON, or holds something else than an object.
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
