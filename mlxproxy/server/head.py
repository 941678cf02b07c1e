"""Parsing of a request's head in time linear in its length (RFC 9112, 2 to 5).

waitress reads heads with regular expressions that backtrack: 16 kB of digits took half a minute, on
the one thread that reads for all clients. Here every byte is examined a fixed number of times, by
methods of `bytes` that make one pass from left to right.
"""

from __future__ import annotations

import string
from typing import NamedTuple

# RFC 9110, 5.6.2 and 5.5: the bytes that names and values consist of.
TOKEN = (string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~").encode()
TEXT = bytes([9, *range(32, 127), *range(128, 256)])

LONGEST_METHOD = 32  # bytes; the longest registered method has 17
MOST_FIELDS = 128


class Malformed(Exception):
    """A request is malformed and rejected unread.

    Args:
        reason: completes "This is not a valid HTTP request for this server: …".
        status: the HTTP status of the rejection.
    """

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.status = status


class Head(NamedTuple):
    """A request's first line and its header fields, named as WSGI names them (CONTENT_TYPE)."""

    method: str
    target: bytes
    version: str
    fields: dict[str, str]


def read(head: bytes) -> Head:
    """Return the parts of a head.

    Args:
        head: all its bytes, including its empty last line.

    Raises:
        Malformed: it is not a valid head of HTTP/1.0 or HTTP/1.1. Lines that continue the previous
            one are rejected too, as RFC 9112, 5.2 allows, and so are lines not ending in CR LF.
    """
    first, *lines = head.rstrip(b"\r\n").split(b"\r\n")
    if not consists_of(head.replace(b"\r\n", b""), TEXT):
        raise Malformed(
            "its head contains a control character, or a line that does not end in CR LF"
        )
    method, _, rest = first.partition(b" ")
    target, _, version = rest.rpartition(b" ")
    if not method or not target or b" " in target or not consists_of(method, TOKEN):
        raise Malformed("its first line is not a method, a target and a version")
    if version not in (b"HTTP/1.0", b"HTTP/1.1"):
        raise Malformed("it is neither HTTP/1.0 nor HTTP/1.1")
    if method != method.upper():
        raise Malformed("its method is not in upper case")
    if len(method) > LONGEST_METHOD:
        raise Malformed(f"its method is longer than {LONGEST_METHOD} characters", 501)
    return Head(method.decode(), target, version[5:].decode(), _fields(lines))


def _fields(lines: list[bytes]) -> dict[str, str]:
    """Return the header fields; fields of the same name are joined with commas."""
    if len(lines) > MOST_FIELDS:
        raise Malformed(f"it has more than {MOST_FIELDS} header fields", 431)
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, content = line.partition(b":")
        if not name or not colon or not consists_of(name, TOKEN):
            raise Malformed("one of its header lines is not a name, a colon and a value")
        if b"_" in name:
            continue  # WSGI would confuse it with the same name written with a hyphen
        key = name.upper().replace(b"-", b"_").decode()
        value = content.strip(b" \t").decode("latin-1")
        fields[key] = f"{fields[key]}, {value}" if key in fields else value
    return fields


def consists_of(text: bytes, allowed: bytes) -> bool:
    """Return whether each byte of the text is an allowed one."""
    return not text.translate(None, allowed)
