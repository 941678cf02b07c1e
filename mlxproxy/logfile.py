"""A bounded, rotated log file that never blocks its callers."""

from __future__ import annotations

import contextlib
import logging.handlers
import os
import stat
from io import TextIOWrapper
from pathlib import Path

from mlxproxy.writing import Writer

FILE_BYTES = 5 << 20
FILES = 3


class LogFile(Writer):
    """A bounded, rotated file that accepts text from any thread and never blocks or raises."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: _RotatingFile | None = None
        super().__init__(str(path), self._append)

    def _append(self, text: str) -> None:
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = _RotatingFile(self.path)
            self._file.write(text)
        except (OSError, ValueError):  # full or vanished disk: reopened for the next block
            file, self._file = self._file, None
            if file is not None:
                with contextlib.suppress(OSError, ValueError):
                    file.close()
            raise


class _RotatingFile(logging.handlers.RotatingFileHandler):
    """The library's rotation, for blocks of text instead of records; it raises its errors."""

    terminator = ""

    def __init__(self, path: Path) -> None:
        super().__init__(
            path, maxBytes=FILE_BYTES, backupCount=FILES - 1, encoding="utf-8", errors="replace"
        )

    def write(self, text: str) -> None:
        record = logging.LogRecord("backend", logging.INFO, "", 0, text, None, None)
        if self.shouldRollover(record):
            self.doRollover()
        if self.stream is None:
            self.stream = self._open()
        self.stream.write(text)
        self.stream.flush()

    def _open(self) -> TextIOWrapper:
        """Open the file if it is regular: a pipe would block the writer or would not be a log."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(self.baseFilename, flags, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError("it is not a regular file")
        return open(descriptor, "a", encoding=self.encoding, errors=self.errors)
