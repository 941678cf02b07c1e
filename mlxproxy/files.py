"""Small JSON files of the instance folder, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file; an empty one where it is missing or not ours to understand."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replaces the file in one step; a full disk is no reason to fail what is recorded."""
    with contextlib.suppress(OSError):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(json.dumps(value))  # json.dump has no fast path
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
