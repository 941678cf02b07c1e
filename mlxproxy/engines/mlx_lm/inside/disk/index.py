"""The index of a model's entries, which finds one by the beginning of a prompt.

The tokens of each entry are cut into blocks, and each block is hashed together with all blocks
before it, so that equal hashes mean equal beginnings. What a prompt's hashes lead to is then
compared token by token, so a collision can do no harm.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

from .entry import TOKEN_BYTES

BLOCK = 256  # tokens; an entry with fewer cannot be found
# What an entry must add to what is in memory to be worth reading, in tokens, and of its length.
LEAST_GAIN = 64
LEAST_SHARE = 1 / 16

_BLOCK_BYTES = BLOCK * TOKEN_BYTES


@dataclass(frozen=True)
class Match:
    """An entry that has a beginning in common with a prompt.

    Attributes:
        name: the entry's.
        common: the number of tokens in common.
    """

    name: str
    common: int


@dataclass(frozen=True)
class _Entry:
    tokens: bytes
    whole: bool


class Index:
    """The entries of one model. Not safe to be used by several threads at once."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._through: defaultdict[bytes, set[str]] = defaultdict(set)  # by each of their blocks
        self._ends: defaultdict[bytes, set[str]] = defaultdict(set)  # by their last whole block

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def tokens_of(self, name: str) -> bytes | None:
        """Return the tokens of an entry; None if there is none of that name."""
        found = self._entries.get(name)
        return None if found is None else found.tokens

    def add(self, name: str, tokens: bytes, whole: bool) -> None:
        """Add an entry.

        Args:
            whole: only a prompt that begins with all of its tokens can use it.
        """
        self.discard(name)
        chain = list(_chain(tokens))
        if not chain:
            return
        self._entries[name] = _Entry(tokens, whole)
        self._ends[chain[-1]].add(name)
        for block in () if whole else chain:
            self._through[block].add(name)

    def discard(self, name: str) -> None:
        """Remove an entry if there is one of that name."""
        entry = self._entries.pop(name, None)
        if entry is None:
            return
        for block in _chain(entry.tokens):
            for table in (self._through, self._ends):
                if block in table:
                    table[block].discard(name)
                    if not table[block]:
                        del table[block]

    def longest(self, tokens: bytes, cached: int) -> Match | None:
        """Return the entry from which a prompt can take the most tokens, if it is worth reading.

        At least one token is left to compute. Of equally good entries, the shortest is taken.

        Args:
            tokens: the prompt's.
            cached: how many of them are in memory.
        """
        most = len(tokens) // TOKEN_BYTES - 1
        best: tuple[int, int, str] | None = None
        for name in self._candidates(tokens):
            entry = self._entries[name]
            length = len(entry.tokens) // TOKEN_BYTES
            common = _common(tokens, entry.tokens)
            if entry.whole and not common == length <= most:
                continue
            common = min(common, most)
            if common - cached < max(LEAST_GAIN, length * LEAST_SHARE):
                continue
            if best is None or (common, -length) > best[:2]:
                best = common, -length, name
        return None if best is None else Match(best[2], best[0])

    def covers(self, tokens: bytes) -> bool:
        """Return whether an entry that can be shortened begins with all these tokens."""
        chain = list(_chain(tokens))
        names = self._through.get(chain[-1], ()) if chain else ()
        return any(self._entries[name].tokens.startswith(tokens) for name in names)

    def beginnings(self, tokens: bytes) -> list[str]:
        """Return the entries of which one with these tokens has all, and more, unless only whole
        ones can be used."""
        return [
            name
            for block in _chain(tokens)
            for name in self._ends.get(block, ())
            if not (entry := self._entries[name]).whole
            and len(entry.tokens) < len(tokens)
            and tokens.startswith(entry.tokens)
        ]

    def _candidates(self, tokens: bytes) -> Iterator[str]:
        """Yield the entries that may match: of those that can be shortened, only those that share
        the most blocks."""
        deepest: set[str] = set()
        for block in _chain(tokens) if self._entries else ():
            deepest = self._through.get(block, deepest)
            yield from (name for name in self._ends.get(block, ()) if self._entries[name].whole)
        yield from deepest


def _chain(tokens: bytes) -> Iterator[bytes]:
    """Yield the hash of each whole block, which depends on all blocks before it."""
    before = b""
    for start in range(0, len(tokens) - _BLOCK_BYTES + 1, _BLOCK_BYTES):
        before = blake2b(before + tokens[start : start + _BLOCK_BYTES], digest_size=16).digest()
        yield before


def _common(one: bytes, other: bytes) -> int:
    """Return how many tokens two beginnings have in common."""
    low, high = 0, min(len(one), len(other)) // TOKEN_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if one[: middle * TOKEN_BYTES] == other[: middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low
