"""Access control: API keys, and checks that protect a household's machine from web pages.

A page in any browser on the network can send requests to this proxy. It cannot hide where it comes
from (`Origin`, or `Sec-Fetch-Site` if the browser sends no Origin, as for an image). Nor can it
hide its own name (`Host`) when it makes that name point at this machine (DNS rebinding). Clients
other than browsers send neither of the first two headers, and as Host an address or a known name.
"""

from __future__ import annotations

import functools
import hmac
import ipaddress
import re
import socket
from dataclasses import dataclass

from mlxproxy.errors import HostNotAllowed, InvalidApiKey, OriginNotAllowed

# Names that always mean this machine or the host of its virtual machines, whichever client asks.
LOCAL_NAMES = ("localhost", "host.docker.internal", "host.containers.internal")
LOCAL_SUFFIXES = (".local", ".localhost")
# Values of Sec-Fetch-Site (Fetch Metadata, W3C) if no other site takes part in a request: it comes
# from the proxy's own pages, or from somebody who has typed the address.
OWN_SITES = ("same-origin", "none")
# Paths that a link on any page may lead to: these answer immediately and change nothing.
LINKED_PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/models/loaded")


@dataclass(frozen=True)
class Access:
    """The access rules of one proxy.

    Attributes:
        keys: accepted API keys; if empty, everybody may call.
        origins: browser origins that may call, ``*`` for any; this machine's pages always may.
        hosts: additional names for the Host header, ``*`` for any.
        names: this machine's own names.
    """

    keys: tuple[str, ...] = ()
    origins: frozenset[str] = frozenset()
    hosts: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()

    def check_host(self, host: str) -> None:
        """Raise HostNotAllowed unless the Host header's name is one of this proxy's names."""
        name = _name_of(host)
        if not ("*" in self.hosts or _is_local(name) or name in self.hosts | self.names):
            raise HostNotAllowed(
                f"This proxy does not answer to the name {name[:100]!r}. Use its address, or add "
                "the name to TRUSTED_HOSTS."
            )

    def check_origin(self, origin: str | None, host: str) -> None:
        """Raise OriginNotAllowed if a browser page of an origin that may not call asks."""
        if origin is not None and not self.allows(origin, host):
            raise OriginNotAllowed(
                f"Pages from {origin[:100]!r} may not call this proxy. Add the origin to "
                "ALLOWED_ORIGINS if they should."
            )

    def check_site(self, site: str | None, host: str, followed: bool) -> None:
        """Raise OriginNotAllowed if a page of another site asks in a way that sends no Origin.

        Args:
            site: the `Sec-Fetch-Site` header; None if the client is not a browser, or the browser
                does not trust the address (it trusts https, and http to this machine).
            host: the Host header, already checked.
            followed: whether somebody has followed a link to a path that links may lead to.
        """
        if site is None or site in OWN_SITES or followed or "*" in self.origins:
            return
        # Another port is still the same site, so these are pages of this machine.
        if site == "same-site" and self._is_this_machine(_name_of(host)):
            return
        raise OriginNotAllowed(
            "This request comes from a page of another site and carries no Origin header. Open "
            "the address directly; pages of ALLOWED_ORIGINS must use fetch() in its default "
            "mode, cors."
        )

    def allows(self, origin: str, host: str) -> bool:
        """Return whether pages of this origin may call.

        Pages of this machine, of this proxy, of an app and of the origins in the settings may.
        """
        origin = origin.lower()
        if "*" in self.origins or origin in self.origins:
            return True
        if len(origin) > _LONGEST_ORIGIN:
            return False
        if _APP_ORIGIN.fullmatch(origin):
            return True
        match = _ORIGIN.fullmatch(origin)
        if match is None:
            return False
        return self._is_this_machine(match[2] or match[3]) or match[1] == host.lower()

    def _is_this_machine(self, name: str) -> bool:
        return is_loopback(name) or name in self.names

    def check_key(self, authorization: str | None, x_api_key: str | None) -> str | None:
        """Return the key that was sent; None if no keys are set.

        Raises:
            InvalidApiKey: the key is wrong or missing.
        """
        if not self.keys:
            return None
        scheme, _, value = (authorization or "").partition(" ")
        given = value.strip() if scheme.lower() == "bearer" else x_api_key or ""
        # Every key is compared, so that the time taken reveals nothing.
        # WSGI passes a header's bytes as Latin-1 text.
        sent = given.encode("latin-1", "replace")
        right = [hmac.compare_digest(sent, key.encode()) for key in self.keys]
        if not any(right):
            raise InvalidApiKey(
                "This API key is not valid."
                if given
                else "An API key is required: send `Authorization: Bearer <key>`."
            )
        return self.keys[right.index(True)]


def own_names() -> frozenset[str]:
    """Return this machine's names, in lower case, with and without their domain."""
    full = socket.gethostname().lower()
    short = full.split(".")[0]
    return frozenset({full, short, f"{short}.local"} - {"", ".local"})


_NAME = r"[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*"
_HOST = re.compile(rf"(?:\[([0-9a-f:.]+(?:%[\w.-]+)?)\]|({_NAME})\.?)(?::[0-9]{{0,5}})?", re.ASCII)
# Exactly the form in which a browser writes an origin (HTML, "ASCII serialisation").
_ORIGIN = re.compile(rf"https?://((?:\[([0-9a-f:.]+)\]|({_NAME}))(?::[0-9]{{1,5}})?)")
# These schemes are used only by apps that are built from web pages: a browser opens nothing under
# them, so no page of the web has such an origin. A local file and a sandboxed page of any site have
# the origin ``null`` or ``file://``; browser extensions are third-party code as well.
_APP_SCHEMES = ("app", "capacitor", "ionic", "tauri", "vscode-file", "vscode-webview")
_APP_ORIGIN = re.compile(rf"(?:{'|'.join(_APP_SCHEMES)})://{_NAME}")
_LONGEST_HOST = 255 + len(":65535")  # RFC 1035, 2.3.4
_LONGEST_ORIGIN = len("https://") + _LONGEST_HOST


def _name_of(host: str) -> str:
    """Return the name or address in a Host header, in lower case; empty if it is invalid."""
    match = _HOST.fullmatch(host.lower()) if len(host) <= _LONGEST_HOST else None
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


def is_loopback(name: str) -> bool:
    """Return whether a name or an address, in lower case, always means the machine that uses it."""
    if _is_address(name):
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    return name == "localhost" or name.endswith(".localhost")
