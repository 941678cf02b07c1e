"""Embeddings and rankings: how texts are grouped for the backend, and the shapes of the answers."""

from __future__ import annotations

import base64
import math
import struct
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Final

from mlxproxy.errors import BackendFailed, InvalidRequest

# The backend reads the texts of one request in one step, each padded to the longest of them, and
# nothing can stop that step. So a request becomes several, of texts of similar length.
GROUP_BYTES: Final = 16_384  # padded: about 4,000 tokens
GROUP_TEXTS: Final = 32
MARKERS: Final = 8  # tokens that a tokenizer adds to a text, at most
Vector = Sequence[float]


def longest(text: str) -> int:
    """Return a number of tokens that a text certainly does not exceed: one for each byte.

    Tokenizers normalize a text first, which may make it longer.
    """
    size = len(text) if text.isascii() else len(unicodedata.normalize("NFKC", text).encode())
    return size + MARKERS


def groups(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Return the indexes of texts, grouped by size.

    A text that may be too long for the model is alone in its group: only then does the backend's
    count of tokens tell whether it was cut.

    Args:
        sizes: as :func:`longest` returns them.
        limit: tokens that the model reads of a text.
    """
    found: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda index: sizes[index]):
        last = found[-1] if found else []
        fits = len(last) < GROUP_TEXTS and sizes[index] * (len(last) + 1) <= GROUP_BYTES
        if last and fits and sizes[index] <= limit:
            last.append(index)
        else:
            found.append([index])
    return found


def vectors(answer: Mapping[str, Any], count: int) -> list[list[float]]:
    """Return the vectors in an answer of the backend, in order.

    Raises:
        BackendFailed: there are not as many, or there is something else among them.
    """
    try:
        found = [item["embedding"] for item in sorted(answer["data"], key=lambda it: it["index"])]
        whole = len(found) == count and all(math.isfinite(sum(vector)) for vector in found)
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise BackendFailed("The backend sent no embeddings for these texts. Try again.")
    return found


def scores(answer: Mapping[str, Any], count: int) -> list[float]:
    """Return the scores in an answer of the backend, in the order of the documents.

    Raises:
        BackendFailed: there are not as many, or there is something else among them.
    """
    try:
        found = {item["index"]: item["relevance_score"] for item in answer["results"]}
        whole = found.keys() == set(range(count)) and math.isfinite(sum(found.values()))
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise BackendFailed("The backend sent no scores for these documents. Try again.")
    return [found[index] for index in range(count)]


def shortened(vector: Vector, dimensions: int | None) -> Vector:
    """Return a vector cut to its first dimensions, and of length 1 again.

    Raises:
        InvalidRequest: it has fewer.
    """
    if dimensions is None or dimensions == len(vector):
        return vector
    if dimensions > len(vector):
        raise InvalidRequest(
            f"dimensions must be at most {len(vector)}, the size of this model's embeddings.",
            param="dimensions",
        )
    cut = vector[:dimensions]
    length = math.sqrt(sum(value * value for value in cut)) or 1.0
    return [value / length for value in cut]


def encoded(vector: Vector, form: str) -> Any:
    """Return a vector as JSON has it: numbers, or as base64 its 32-bit floats (little-endian)."""
    if form != "base64":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def embeddings(model: str, found: Sequence[Vector], form: str, tokens: int) -> dict[str, Any]:
    """Return OpenAI's answer."""
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encoded(vector, form)}
            for index, vector in enumerate(found)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def ranking(
    model: str,
    found: Sequence[float],
    documents: Sequence[str],
    top: int | None,
    shown: bool,
    tokens: int,
) -> dict[str, Any]:
    """Return the answer that clients of Jina's and of Cohere's rerankers read, best first.

    Args:
        found: the score of each document.
        top: how many results to return; None: all.
        shown: whether the results repeat their documents.
    """
    order = sorted(range(len(found)), key=lambda index: -found[index])
    results: list[dict[str, Any]] = []
    for index in order[:top]:
        results.append({"index": index, "relevance_score": found[index]})
        if shown:
            results[-1]["document"] = {"text": documents[index]}
    return {
        "model": model,
        "object": "list",
        "results": results,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "meta": {"tokens": {"input_tokens": tokens}},
    }
