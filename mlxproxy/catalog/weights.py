"""The headers of a model's safetensors files: parameters, bytes, and damage.

Only headers are read, never a tensor. safetensors' own reader maps the whole file into memory;
if a mapped file is truncated or its disk goes away, the process crashes with a bus error.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxproxy.catalog.layout import INDEX
from mlxproxy.files import MB, Unreadable, open_regular, read_object

MAX_HEADER = 16 * MB  # fifty times the size that the largest models have
MAX_INDEX = 32 * MB

# A set of shards is complete if all its numbers are there, whatever its index says.
_NUMBERED = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})\.safetensors")

_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_BITS |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8)
_BITS |= dict.fromkeys(("U16", "I16", "F16", "BF16"), 16)
_BITS |= dict.fromkeys(("U32", "I32", "F32"), 32)
_BITS |= dict.fromkeys(("U64", "I64", "F64", "C64"), 64)

# Tensors that describe how others are packed, in the formats that MLX reads.
_ABOUT_PACKING = frozenset(
    [
        "biases",
        "g_idx",
        "global_scale",
        "input_global_scale",
        "input_scale",
        "qzeros",
        "weight_global_scale",
        "weight_scale",
        "weight_scale_2",
        "weight_scale_inv",
        "weight_shape",
        "weight_zero_point",
    ]
)
Header = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Quantization:
    """The packing of the weights, as a config declares it.

    Attributes:
        method: ``mlx``, or the name of another program's method; None for plain weights.
        bits, group_size: bits per weight, and the number of weights that share a scale.
        groups: the group size of the layers that differ, by their path.
    """

    method: str | None = None
    bits: int = 0
    group_size: int = 0
    groups: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Weights:
    """The sum of the headers of all files of a model.

    Attributes:
        parameters: counted as if nothing were packed; None if the packing is not understood.
        memory: bytes that the loaded tensors take.
        tensors: their names.
        faults: a phrase for each damaged file.
    """

    parameters: int | None = 0
    memory: int = 0
    tensors: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    def count(self, items: int, each: float | None) -> None:
        """Add `items` items, each of which stands for `each` parameters; None: unknown."""
        if self.parameters is not None:
            self.parameters = None if each is None else self.parameters + round(items * each)


def read_headers(
    folder: str,
    files: Sequence[str],
    packing: Quantization,
    *,
    left_out: tuple[str, ...],
    indexed: bool,
) -> Weights:
    """Read the headers of a model's weight files.

    Args:
        folder: the model's folder.
        files: the names of the files that are loaded.
        packing: their packing, according to the model's config.
        left_out: prefixes of the names of tensors that are dropped before they are loaded.
        indexed: the folder has an index of its shards.
    """
    weights = Weights()
    for file in files:
        try:
            _add(weights, f"{folder}/{file}", packing, left_out)
        except Unreadable as error:
            weights.faults.append(str(error))
    missing = missing_shards(files)
    if not missing and indexed and not all(map(_NUMBERED.fullmatch, files)):
        missing = _missing_by_index(folder, files, weights)
    if missing:
        weights.faults.insert(0, f"{missing} missing")
    return weights


def _add(weights: Weights, path: str, packing: Quantization, left_out: tuple[str, ...]) -> None:
    """Add one file's tensors; raise Unreadable if the file is damaged or truncated."""
    name = path.rpartition("/")[2]
    content, room = _header(path)
    try:
        header = json.loads(content)
        header.pop("__metadata__", None)
        end = _count(weights, header, packing, left_out)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Unreadable(f"{name} has a damaged header") from None
    if end > room:
        there, whole = room / 1e9, end / 1e9
        raise Unreadable(f"{name} is truncated ({there:.2f} of {whole:.2f} GB)")


def _header(path: str) -> tuple[bytes, int]:
    """Return the header of a safetensors file, unparsed, and how many bytes follow it."""
    name = path.rpartition("/")[2]
    with open_regular(path) as (file, size):
        start = os.read(file, 8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise Unreadable(f"{name} is a Git LFS pointer, not the weights themselves")
        if len(start) < 8:
            raise Unreadable(f"{name} is {'truncated' if start else 'empty'}")
        if length > MAX_HEADER:
            raise Unreadable(f"{name} is damaged, or not a safetensors file")
        if 8 + length > size:
            raise Unreadable(f"{name} is truncated")
        return os.read(file, length), size - 8 - length


def _count(
    weights: Weights, header: Header, packing: Quantization, left_out: tuple[str, ...]
) -> int:
    """Add the tensors of a header; return the offset at which the last of them ends.

    Raises:
        ValueError, TypeError, KeyError: an entry is malformed, or contradicts itself.
    """
    last = 0
    sizes: dict[tuple[str, str], int] = defaultdict(int)  # bytes by last part of the name and type
    # A library of two thousand models has a million tensors: this loop takes most of its first
    # scan.
    for name, tensor in header.items():
        dtype = tensor["dtype"]
        begin, end = tensor["data_offsets"]
        if begin < 0 or math.prod(tensor["shape"]) * _BITS[dtype] != 8 * (end - begin):
            raise ValueError
        if end > last:
            last = end
        sizes[name[name.rfind(".") + 1 :], dtype] += end - begin
    weights.tensors.update(header)
    weights.memory += sum(sizes.values())
    if left_out:
        weights.memory -= sum(map(_size, _left_out(header, left_out)))
    if packing.method == "fp8":  # unpacked to 16 bits when it is loaded
        weights.memory += sum(size for (_, dtype), size in sizes.items() if dtype == "F8_E4M3")
    for (kind, dtype), size in sizes.items():
        weights.count(size * 8 // _BITS[dtype], _parameters(kind, dtype, packing))
    for path, group in packing.groups.items():
        if scales := header.get(f"{path}.scales"):
            items = _size(scales) * 8 // _BITS[scales["dtype"]]
            weights.count(items, group - packing.group_size)
    return int(last)


def missing_shards(files: Iterable[str]) -> str:
    """Return a phrase that names the shards missing from incomplete sets; ``""`` if none are."""
    sets: dict[tuple[str, str], set[int]] = {}
    for match in filter(None, map(_NUMBERED.fullmatch, files)):
        stem, number, total = match.groups()
        sets.setdefault((stem, total), set()).add(int(number))
    names: list[str] = []
    count = 0
    for (stem, total), there in sets.items():
        count += max(0, int(total) - len(there))
        # Three names are enough for a message, and a name can claim to be one of a million.
        for number in range(1, min(int(total), len(there) + 3) + 1):
            if number not in there and len(names) < min(count, 3):
                names.append(f"{stem}-{number:0{len(total)}}-of-{total}.safetensors")
    return _listed(names, count)


def _missing_by_index(folder: str, files: Sequence[str], weights: Weights) -> str:
    """Return a phrase that names the missing files whose tensors are in no other file.

    An outdated index, left over from before a conversion, does no harm: its tensors are found in
    other files.
    """
    try:
        places = read_object(f"{folder}/{INDEX}", MAX_INDEX).get("weight_map")
    except Unreadable:
        return ""
    lost = {
        str(file)
        for tensor, file in (places.items() if isinstance(places, dict) else ())
        if file not in files and tensor not in weights.tensors
    }
    return _listed(sorted(lost)[:3], len(lost))


def _listed(names: Sequence[str], count: int) -> str:
    if not names:
        return ""
    more = f" and {count - len(names)} more" if count > len(names) else ""
    return ", ".join(names) + more + (" are" if count > 1 else " is")


def _left_out(header: Header, left_out: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for name, tensor in header.items():
        if name.removeprefix("model.").removeprefix("language_model.").startswith(left_out):
            yield tensor


def _size(tensor: Mapping[str, Any]) -> int:
    begin, end = tensor["data_offsets"]
    return int(end - begin)


def _parameters(kind: str, dtype: str, packing: Quantization) -> float | None:
    """Return how many parameters an item of such a tensor stands for; None if that is unknown.

    Args:
        kind: the last part of the tensor's name.
    """
    if kind in _ABOUT_PACKING or kind.endswith("_scales"):
        return 0
    if kind == "scales":  # each one stands for a group of packed weights
        return packing.group_size or None
    if kind == "qweight" or (kind == "weight" and dtype == "U32"):
        return 0  # counted by its scales
    if kind.endswith("_blocks"):  # MXFP4 in OpenAI's layout
        return 2
    if kind == "weight_packed" or (kind == "weight" and dtype == "U8"):
        return _BITS[dtype] / packing.bits if packing.bits else None
    return 1
