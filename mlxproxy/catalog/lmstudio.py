"""The folder in which LM Studio keeps its models, found as LM Studio itself finds it."""

from __future__ import annotations

from pathlib import Path

from mlxproxy.files import MB, Unreadable, read_object, read_text

POINTER = ".lmstudio-home-pointer"  # LM Studio writes its home's path here if it is moved


def models_folder(home: Path | None = None) -> Path:
    """Return the folder to which LM Studio downloads models; it need not exist.

    Settings that cannot be read or make no sense are ignored.

    Args:
        home: the user's home folder; None for the current user's.
    """
    home = Path.home() if home is None else home
    lmstudio = _lmstudio_home(home)
    try:
        chosen = read_object(str(lmstudio / "settings.json"), 4 * MB).get("downloadsFolder")
    except Unreadable:
        chosen = None
    return _absolute(chosen, home) or lmstudio / "models"


def _lmstudio_home(home: Path) -> Path:
    try:
        pointed = _absolute(read_text(str(home / POINTER), 1 * MB).strip(), home)
    except Unreadable:
        pointed = None
    if pointed is not None:
        return pointed
    older = home / ".cache" / "lm-studio"
    return older if older.is_dir() else home / ".lmstudio"


def _absolute(text: object, home: Path) -> Path | None:
    """Return the path in a text, with `~` expanded; None if it is not an absolute path."""
    if not isinstance(text, str) or "\0" in text:
        return None
    if text == "~" or text.startswith("~/"):
        return home / text[2:]
    return Path(text) if text.startswith("/") else None
