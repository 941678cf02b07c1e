"""The name of the folder for a model's entries, from everything that these depend on.

An entry must never meet a model that would compute something else for the same tokens. The chat
template and the sampling do not count: what a template has made are tokens, which are compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any


class NoFolder(Exception):
    """A model, an adapter or a draft model is not a folder on this disk."""


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Return a short name that changes if any of these JSON values does."""
    text = json.dumps(parts, sort_keys=True).encode()
    return blake2b(text, digest_size=16).hexdigest()


def files(folder: str | None) -> list[tuple[str, int, int]] | None:
    """Return name, size and time of change (in nanoseconds) of each file in a model's folder.

    Raises:
        NoFolder: there is no such folder, or it cannot be read.
    """
    if folder is None:
        return None
    try:
        with os.scandir(folder) as entries:
            found = [(it.name, it.stat()) for it in entries if it.name[0] != "." and it.is_file()]
    except OSError:
        raise NoFolder(folder) from None
    return sorted((name, status.st_size, status.st_mtime_ns) for name, status in found)
