"""The last lines of a log file and the lines added after them, across rotations."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from mlxproxy.files import Unreadable, opened
from mlxproxy.text import harmless

LINE_BYTES = 200  # of an average line; decides how far back to look for a number of lines
BLOCK_BYTES = 1 << 16


class LogTail:
    """Reads whole lines of a file that another thread writes and rotates (`logfile.LogFile`).

    A slow reader loses only what the rotation has deleted, and costs no memory.

    Args:
        path: the file; it need not exist yet.
        lines: how many of the existing lines :meth:`read` returns first.
    """

    def __init__(self, path: Path, lines: int) -> None:
        self._path = path
        older = _opened(path.with_name(path.name + ".1"))
        self._file = _opened(path)
        kept = [line for file in (older, self._file) if file for line in _last(file, lines)]
        if older is not None:
            older.close()
        self._rest = b"".join(kept[len(kept) - min(lines, len(kept)) :])

    def __enter__(self) -> LogTail:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        stats: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def read(self) -> str:
        """Return the whole lines written since the last call; an empty text if there are none."""
        data = self._rest + self._more()
        end = data.rfind(b"\n") + 1
        self._rest = data[end:]
        return harmless(data[:end].decode("utf-8", "replace"))

    def _more(self) -> bytes:
        data = self._file.read(BLOCK_BYTES) if self._file is not None else b""
        if data or not self._rotated():
            return data
        if self._file is not None:
            data = self._file.read()  # written between the read above and the rotation
            self._file.close()
        self._file = _opened(self._path)
        return data

    def _rotated(self) -> bool:
        """Return whether the path names another file than the one that is open."""
        try:
            now = os.stat(self._path)
        except OSError:
            return False
        return self._file is None or not os.path.samestat(now, os.fstat(self._file.fileno()))


def _opened(path: Path) -> BinaryIO | None:
    try:
        return os.fdopen(opened(str(path)), "rb", buffering=0)
    except Unreadable:
        return None


def _last(file: BinaryIO, lines: int) -> list[bytes]:
    """Return roughly the last `lines` lines; leave the file positioned at its end."""
    size = os.fstat(file.fileno()).st_size
    start = max(0, size - lines * LINE_BYTES)
    file.seek(start)
    found = file.read(size - start).splitlines(keepends=True)
    return found[1:] if start else found  # the first line is incomplete
