"""The file of one entry: the tokens of a prompt, and what a model has computed for them.

======================  ============================================================================
magic, 8 bytes          the format and its version
length, 8 bytes         of the header
header                  a JSON object: see :class:`Head`
tokens                  4 bytes each
arrays                  one after the other, each in row-major order
checksum, 4 bytes       CRC-32 of everything before
======================  ============================================================================

Numbers are little-endian, as on every machine that MLX runs on.
"""

from __future__ import annotations

import json
import os
import zlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, BinaryIO

VERSION = 1
MAGIC = b"mlxkv%03d" % VERSION
MAX_HEADER_BYTES = 1 << 24
TOKEN_BYTES = 4
CHECKSUM_BYTES = 4

ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("bool", "uint8", "int8"), 1),
    **dict.fromkeys(("uint16", "int16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("uint32", "int32", "float32"), 4),
    **dict.fromkeys(("uint64", "int64", "float64", "complex64"), 8),
}

Array = tuple[str, tuple[int, ...]]
"""The type of an array's items, and its shape."""


class Damaged(Exception):
    """The file is not a whole entry of this format; the message says why."""


class Interrupted(Exception):
    """There was no time to write the whole entry."""


@dataclass(frozen=True)
class Head:
    """Everything but the arrays' content.

    Attributes:
        tokens: as 4-byte integers.
        kind: mlx-lm's name for what ends here: `system`, `user` or `assistant`.
        whole: whether it can only be used by a prompt that begins with all of its tokens.
        caches: JSON values from which the caller makes the caches of all layers.
        arrays: the arrays, in the order in which they follow.
    """

    tokens: bytes
    kind: str
    whole: bool
    caches: Sequence[Any] = field(repr=False)
    arrays: Sequence[Array] = field(repr=False)

    @property
    def length(self) -> int:
        """The number of tokens."""
        return len(self.tokens) // TOKEN_BYTES

    def encoded(self) -> bytes:
        """Return what stands before the arrays in a file."""
        header = json.dumps(
            {
                "tokens": self.length,
                "kind": self.kind,
                "whole": self.whole,
                "caches": self.caches,
                "arrays": self.arrays,
            },
            separators=(",", ":"),
        ).encode()
        return MAGIC + len(header).to_bytes(8, "little") + header + self.tokens

    def array_bytes(self) -> int:
        """Return how many bytes the arrays take."""
        return sum(ITEM_BYTES[kind] * prod(shape) for kind, shape in self.arrays)

    def file_bytes(self) -> int:
        """Return how many bytes the file takes."""
        return len(self.encoded()) + self.array_bytes() + CHECKSUM_BYTES


def packed(tokens: Iterable[int]) -> bytes:
    """Return tokens as 4-byte integers.

    Raises:
        OverflowError: one of them is no token.
    """
    return array("i", tokens).tobytes()


def unpacked(tokens: bytes) -> list[int]:
    """Return what :func:`packed` was given."""
    return array("i", tokens).tolist()


def write(
    file: BinaryIO, head: Head, contents: Iterable[Any], go_on: Callable[[], bool] = lambda: True
) -> None:
    """Write an entry.

    Args:
        contents: the arrays' content, as contiguous buffers.
        go_on: returns whether there is time for another array.

    Raises:
        OSError: such as a full disk.
        Interrupted: there is no time.
        ValueError: the contents are not those that the head announces.
    """
    start = head.encoded()
    checksum = zlib.crc32(start)
    file.write(start)
    written = 0
    for content in contents:
        view = memoryview(content)
        if not view.nbytes:
            continue
        if not go_on():
            raise Interrupted
        checksum = zlib.crc32(view, checksum)
        file.write(view)
        written += view.nbytes
    if written != head.array_bytes():
        raise ValueError(f"{written} bytes of arrays in place of {head.array_bytes()}")
    file.write(checksum.to_bytes(CHECKSUM_BYTES, "little"))


def read_head(file: BinaryIO) -> Head:
    """Read a file up to its arrays, which are not read.

    Raises:
        Damaged: it is no entry, or an incomplete one.
        OSError: it cannot be read.
    """
    return _head(file)[0]


def read(file: BinaryIO, take: Callable[[Array, bytearray], None]) -> Head:
    """Read a file and verify its checksum.

    Args:
        take: called with each array and its content, which it must copy. What it was given is
            valid only if this function returns.

    Raises:
        Damaged: it is no entry, an incomplete one, or its content has changed.
        OSError: it cannot be read.
    """
    head, start = _head(file)
    checksum = zlib.crc32(start)
    for kind, shape in head.arrays:
        content = bytearray(ITEM_BYTES[kind] * prod(shape))
        if file.readinto(content) != len(content):  # type: ignore[attr-defined]
            raise Damaged("it has become shorter")
        checksum = zlib.crc32(content, checksum)
        take((kind, shape), content)
    if file.read(CHECKSUM_BYTES) != checksum.to_bytes(CHECKSUM_BYTES, "little"):
        raise Damaged("its checksum is wrong")
    return head


def _head(file: BinaryIO) -> tuple[Head, bytes]:
    """Return the head of a file whose size is as the head says, and its bytes."""
    size = os.fstat(file.fileno()).st_size
    fixed = file.read(16)
    if len(fixed) < 16 or fixed[:8] != MAGIC:
        raise Damaged("it is no entry of this format")
    length = int.from_bytes(fixed[8:], "little")
    if length > min(size, MAX_HEADER_BYTES):
        raise Damaged("its header is longer than the file")
    header = file.read(length)
    try:
        values = json.loads(header)
        arrays = [(str(kind), tuple(map(_count, shape))) for kind, shape in values["arrays"]]
        count = _count(values["tokens"])
        if not 0 < count * TOKEN_BYTES < size or any(kind not in ITEM_BYTES for kind, _ in arrays):
            raise ValueError
        tokens = file.read(count * TOKEN_BYTES)
        caches = list(values["caches"])
        head = Head(tokens, str(values["kind"]), values["whole"] is True, caches, arrays)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Damaged("its header makes no sense") from None
    read = fixed + header + tokens
    if size != len(read) + head.array_bytes() + CHECKSUM_BYTES:
        raise Damaged("its size is not as its header says")
    return head, read


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 40:
        raise ValueError
    return value
