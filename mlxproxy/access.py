"""Who may call: API keys, and what protects a household's machine from web pages.

A page in any browser of the network can send requests to this proxy. It cannot hide where it comes
from (`Origin`), nor, when it lets its own name point at this machine (DNS rebinding), that name
(`Host`). Clients that are no browsers send no Origin and an address or a known name.
"""

from __future__ import annotations

import functools
import hmac
import ipaddress
import os
import re
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from mlxproxy.errors import HostNotAllowed, InvalidApiKey, OriginNotAllowed

# On everything a browser would show.
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# Names that always mean this machine or its virtual machines' host, whoever asks.
LOCAL_NAMES = ("localhost", "host.docker.internal", "host.containers.internal")
LOCAL_SUFFIXES = (".local", ".localhost")


@dataclass(frozen=True)
class Access:
    """The rules of one proxy.

    Attributes:
        keys: accepted API keys; none: everybody may call.
        origins: browser origins that may call, ``*`` for any; this machine's pages always may.
        hosts: further names for the Host header, ``*`` for any.
        names: this machine's own names.
    """

    keys: tuple[str, ...] = ()
    origins: frozenset[str] = frozenset()
    hosts: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()

    def check_host(self, host: str) -> None:
        """Raises HostNotAllowed unless the Host header's name is one of ours."""
        name = _name_of(host)
        if not ("*" in self.hosts or _is_local(name) or name in self.hosts | self.names):
            raise HostNotAllowed(
                f"This proxy does not answer to the name {name[:100]!r}. Use its address, or add "
                "the name to TRUSTED_HOSTS."
            )

    def check_origin(self, origin: str | None, host: str) -> None:
        """Raises OriginNotAllowed if a browser page from elsewhere asks."""
        if origin is not None and not self.allows(origin, host):
            raise OriginNotAllowed(
                f"Pages from {origin[:100]!r} may not call this proxy. Add the origin to "
                "ALLOWED_ORIGINS if they should."
            )

    def allows(self, origin: str, host: str) -> bool:
        """Whether pages of this origin may call: this machine's, this proxy's own, those set."""
        if "*" in self.origins or origin.lower().rstrip("/") in self.origins:
            return True
        try:
            parts = urlsplit(origin)
            name = parts.hostname or ""
        except ValueError:
            return False
        if parts.scheme not in ("http", "https") or not name:
            return False
        return _is_loopback(name) or name in self.names or parts.netloc.lower() == host.lower()

    def check_key(self, authorization: str | None, x_api_key: str | None) -> str | None:
        """The key that was given, None where none is set. Raises InvalidApiKey if it is wrong."""
        if not self.keys:
            return None
        scheme, _, value = (authorization or "").partition(" ")
        given = value.strip() if scheme.lower() == "bearer" else x_api_key or ""
        # Every key is compared, so that the time tells nothing.
        # WSGI gives a header's bytes as Latin-1 text.
        sent = given.encode("latin-1", "replace")
        right = [hmac.compare_digest(sent, key.encode()) for key in self.keys]
        if not any(right):
            raise InvalidApiKey(
                "This API key is not accepted."
                if given
                else "An API key is needed: send `Authorization: Bearer <key>`."
            )
        return self.keys[right.index(True)]


_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def request_id(given: str) -> str:
    """The id of a request: the client's own if it is a sane one, else a new one."""
    return given if _REQUEST_ID.fullmatch(given) else os.urandom(16).hex()


def own_names() -> frozenset[str]:
    """This machine's names, in lower case, with and without their domain."""
    full = socket.gethostname().lower()
    short = full.split(".")[0]
    return frozenset({full, short, f"{short}.local"} - {"", ".local"})


_HOST = re.compile(r"(?:\[([0-9a-f:.]+(?:%[\w.-]+)?)\]|([\w.-]+?)\.?)(?::\d*)?", re.ASCII)


def _name_of(host: str) -> str:
    """The name or address in a Host header, in lower case; empty if it is no such header."""
    match = _HOST.fullmatch(host.strip().lower())
    return (match[1] or match[2]) if match else ""


def _is_local(name: str) -> bool:
    return _is_address(name) or name in LOCAL_NAMES or name.endswith(LOCAL_SUFFIXES)


@functools.lru_cache(64)  # each request asks for the same few
def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    if _is_address(name):
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    return name == "localhost" or name.endswith(".localhost")
