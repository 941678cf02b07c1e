"""The system's Chromium or Chrome, which the tests and the benchmark of the page drive."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
MISSING = "there is no Chromium or Chrome here (on Debian: apt-get install chromium)"
ARGUMENTS = ("--no-sandbox",)


def program() -> str | None:
    """Return the path of the system's browser; the variable BROWSER_PROGRAM may name another."""
    named = os.environ.get("BROWSER_PROGRAM")
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    return named or found or (MAC if Path(MAC).exists() else None)
