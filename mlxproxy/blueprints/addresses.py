"""The addresses at which other machines reach this server, and their QR codes."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator

import psutil

from mlxproxy.blueprints.auth import is_loopback

EVERYWHERE = ("0.0.0.0", "::")
LONGEST_LIST = 8  # machines with virtual machines and containers have dozens


def of(host: str, port: int) -> list[str]:
    """Return the URLs under which other machines reach a server that listens on `host`.

    The list is empty if only this machine can reach the server.
    """
    if host not in EVERYWHERE:
        return [] if is_loopback(host.lower()) else [_url(host, port)]
    return [_url(name, port) for name in (*_own_addresses(), *_own_name())][:LONGEST_LIST]


def qr_code(text: str) -> list[str]:
    """Return a text as a QR code: rows of 0 (light) and 1 (dark), without the quiet zone."""
    import segno  # only the page asks for it

    return ["".join(map(str, row)) for row in segno.make(text, micro=False).matrix]


def _own_addresses() -> Iterator[str]:
    """Yield this machine's IPv4 addresses on its networks, private networks first."""
    found = {
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET
    }
    known = sorted(map(ipaddress.IPv4Address, found))
    usable = [it for it in known if not (it.is_loopback or it.is_link_local or it.is_unspecified)]
    yield from map(str, sorted(usable, key=lambda it: not it.is_private))


def _own_name() -> Iterator[str]:
    """Yield the name under which Bonjour announces this machine, if it has one."""
    name = socket.gethostname().lower()
    if name.endswith(".local"):
        yield name


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
