"""Everything that may be found in place of a readable file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILES = ("history.json", "backend-{}.json", "proxy-{}.json", "catalog.json")
LOGS = ("logs/proxy.log", "logs/backend.log", "logs/proxy.log.1")

WRONG_TYPES: list[Any] = [
    {
        "pid": pid,
        "created": wrong,
        "since": wrong,
        "command": command,
        "seconds": {"a": wrong, "b": float("nan"), "c": -1},
        "last": {"model_id": "tiny/alpha", "ttl": wrong, "enable_thinking": wrong},
        "fingerprint": wrong,
        "roots": wrong,
    }
    for pid, wrong, command in (
        (-1, "soon", ["x", "--port", 1]),
        (1 << 70, [[]], "x --port 1"),
        ("7", {"a": None}, {}),
        (True, float("nan"), ["x", "--port"]),
        (0, 10**400, [None, "y"]),
    )
]

TEXTS = {
    "empty": b"",
    "binary": bytes(range(256)) * 9,
    "deep": b"[" * 100_000,
    "deep object": b'{"last": ' * 50_000 + b"1",
    "a list": b"[1, 2]",
    "a long number": b'{"pid": ' + b"9" * 6000 + b"}",
    **{f"wrong types {number}": json.dumps(it).encode() for number, it in enumerate(WRONG_TYPES)},
}


def text(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


def huge(path: Path) -> None:
    path.write_bytes(b"[")
    os.truncate(path, 1 << 40)


def unreadable(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a fifo": os.mkfifo,
    "a directory": lambda path: (path / "folder").mkdir(parents=True),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "huge": huge,
    "unreadable": unreadable,
    **{name: text(content) for name, content in TEXTS.items()},
}


def damaged(path: Path, kind: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    DAMAGES[kind](path)
    return path
