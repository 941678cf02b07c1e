"""The page: the files of `mlxproxy/page/` for a browser, and the addresses that it shows.

The files are the same for everybody and say nothing about this machine, so they need no key. The
page asks for the key itself, and sends it with everything that it then reads.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePath
from typing import Any

from flask import Blueprint, Request, Response, g, request

from mlxproxy.blueprints import addresses
from mlxproxy.blueprints.services import services
from mlxproxy.errors import NotFound
from mlxproxy.server.headers import SECURITY_HEADERS

blueprint = Blueprint("page", __name__)

KINDS = ("text/plain", "text/html", "application/json")  # of `/`; the first for who accepts any
PREFIX = "/page/"
INDEX = "index.html"
# The page runs its own files and nothing else: no inline script or style, nothing from elsewhere.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {**SECURITY_HEADERS, "Content-Security-Policy": POLICY}
# Not the system's own table: on some machines it calls JavaScript text/plain.
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
FOREVER = "public, max-age=31536000, immutable"  # the path changes with the content


@dataclass(frozen=True)
class Page:
    """The page's files.

    Attributes:
        digest: of all of them; a part of their path, so that a browser may keep them forever.
        index: the document, which names the others.
    """

    digest: str
    index: bytes
    files: Mapping[str, bytes]


@functools.cache
def page() -> Page:
    """Return the page's files, read once."""
    folder = resources.files("mlxproxy") / "page"
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    digest = hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()[:16]
    base = f"{PREFIX}{digest}/"
    modules = [name for name in sorted(files) if name.endswith(".js")]
    links = "\n".join(f'<link rel="modulepreload" href="{base}{name}">' for name in modules)
    index = files.pop(INDEX).decode().replace("{base}", base).replace("{modules}", links)
    return Page(digest, index.encode(), files)


def is_for(asked: Request) -> bool:
    """Return whether a request is for a file of the page."""
    if asked.path == "/":
        return kind(asked) == "text/html"
    return asked.path.startswith(PREFIX)


def kind(asked: Request) -> str:
    """Return what `/` is to answer with: the page to a browser, text or JSON to a program."""
    return asked.accept_mimetypes.best_match(KINDS, KINDS[0]) or KINDS[0]


def index() -> Response:
    """Return the page's document."""
    g.security_headers = HEADERS
    response = Response(page().index, mimetype="text/html")
    response.headers["Cache-Control"] = "no-cache"  # ask each time whether it has changed
    response.headers["Vary"] = "Accept"
    return _tagged(response)


@blueprint.get(PREFIX + "<digest>/<name>")
def file(digest: str, name: str) -> Response:
    """Return one of the page's files."""
    found = page().files.get(name) if digest == page().digest else None
    if found is None:
        raise NotFound("The page has no such file. If mlxproxy was updated, reload the page.")
    g.security_headers = HEADERS
    response = Response(found, mimetype=TYPES[PurePath(name).suffix])
    response.headers["Cache-Control"] = FOREVER
    return _tagged(response)


@blueprint.get("/v1/addresses")
def reachable() -> dict[str, Any]:
    """Return the addresses of this server, each with its QR code as rows of 0 and 1."""
    settings = services().settings
    return {
        "data": [
            {"url": url, "qr": addresses.qr_code(url)}
            for url in addresses.of(settings.proxy_host, settings.proxy_port)
        ],
        "key_required": bool(services().access.keys),
    }


def _tagged(response: Response) -> Response:
    """Return the response, or 304 if the browser already has it."""
    response.set_etag(page().digest)
    response.make_conditional(request)
    return response
