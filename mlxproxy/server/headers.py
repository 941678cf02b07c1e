"""The headers of every answer, whether the application makes it or the server in front of it."""

from __future__ import annotations

import os
import re

# On everything that a browser might display.
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def request_id(given: str) -> str:
    """Return the id of a request: the client's own if it is well-formed, else a new one."""
    return given if _REQUEST_ID.fullmatch(given) else os.urandom(16).hex()
