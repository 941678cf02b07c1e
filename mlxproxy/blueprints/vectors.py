"""Embeddings and rankings, in the shapes of OpenAI, Jina and Cohere."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Response, g

from mlxproxy.backend.protocol import Unmet
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.blueprints.answering import Asked, ask
from mlxproxy.blueprints.hooks import json_body, warn
from mlxproxy.blueprints.peering import elsewhere
from mlxproxy.blueprints.services import services
from mlxproxy.dialects import vectors
from mlxproxy.errors import BackendFailed, ContextLengthExceeded
from mlxproxy.guard.check import PATHS
from mlxproxy.relay.body import RequestBody
from mlxproxy.relay.open import Request

blueprint = Blueprint("vectors", __name__, url_prefix="/v1")


@blueprint.post("/embeddings")
def embeddings() -> Response:
    """Return OpenAI's answer: a vector for each text."""
    body = json_body()
    if (there := elsewhere(body)) is not None:
        return there
    asked = ask(body, "embed")
    given = asked.body.fields
    found = embedded(asked, truncate=given.get("truncate", False))
    form = given.get("encoding_format", "float")
    return as_json(vectors.embeddings(found.model, found.values, form, found.tokens))


@blueprint.post("/rerank")
def rerank() -> Response:
    """Return the documents' scores for a query, the best first."""
    body = json_body()
    if (there := elsewhere(body)) is not None:
        return there
    asked = ask(body, "rerank")
    given = asked.body.fields
    documents, query = given["documents"], given["query"]
    size = vectors.longest(query)
    sizes = [size + vectors.longest(document) for document in documents]
    found = _read(asked, "documents", documents, sizes, vectors.scores)
    _warn(found, "documents")
    return as_json(
        vectors.ranking(
            found.model,
            found.values,
            documents,
            given.get("top_n"),
            given.get("return_documents", False),
            found.tokens,
        )
    )


@dataclass
class Found:
    """What a model found for each of several texts.

    Attributes:
        tokens: of all texts together.
        cut: how many of the texts were longer than the model reads.
    """

    model: str
    values: list[Any]
    tokens: int = 0
    cut: int = 0


def embedded(asked: Asked, truncate: bool) -> Found:
    """Return the vectors of the texts in a request, of the size that it asks for.

    Args:
        truncate: whether texts may be cut; otherwise one that is too long is an error.

    Raises:
        ProxyError: the request is rejected, or a part of it fails.
    """
    texts, dimensions = asked.body.fields["input"], asked.body.fields.get("dimensions")
    sizes = [vectors.longest(text) for text in texts]
    found = _read(asked, "input", texts, sizes, vectors.vectors, whole=not truncate)
    found.values = [vectors.shortened(vector, dimensions) for vector in found.values]
    _warn(found, "input")
    return found


def _read(
    asked: Asked,
    field: str,
    texts: Sequence[str],
    sizes: Sequence[int],
    values_of: Callable[[Mapping[str, Any], int], Sequence[Any]],
    whole: bool = False,
) -> Found:
    """Have texts read, group by group.

    Args:
        field: the field that holds the texts.
        sizes: the most tokens that each may have.
        values_of: reads what was found from an answer.
        whole: whether a text that is longer than the model reads is an error.

    Raises:
        ProxyError: the request is rejected, or a group of it fails.
    """
    order: list[list[int]] = []
    limit = 0

    def requests(spec: ModelSpec) -> Iterator[Request]:
        nonlocal limit
        limit = spec.max_context or max(sizes)
        order.extend(vectors.groups(sizes, limit))
        for group in order:
            body = _Part(asked.body, field, [texts[index] for index in group])
            yield Request(PATHS[asked.kind], body)

    def may_be_cut(group: Sequence[int]) -> bool:
        return len(group) == 1 and sizes[group[0]] > limit

    def too_long(tokens: str, group: Sequence[int]) -> ContextLengthExceeded:
        return ContextLengthExceeded.of(tokens, limit, param=f"{field}[{group[0]}]")

    found, done = Found("", [None] * len(texts)), 0
    answers = services().relay.series(asked.lease, requests, asked.stats)
    with contextlib.closing(answers):
        try:
            for data in answers:
                group = order[done]
                answer = json.loads(data)
                tokens = answer["usage"]["prompt_tokens"]
                if may_be_cut(group) and tokens >= limit:
                    # If it has read more than it can, it has not cut the text: the vector is wrong.
                    if whole or tokens > limit:
                        raise too_long(f"{limit} tokens or more", group)
                    found.cut += 1
                for index, value in zip(group, values_of(answer, len(group)), strict=True):
                    found.values[index] = value
                found.tokens += tokens
                done += 1
        except BackendFailed:  # the same, if nonsense came of it that is not even a number
            failed = order[done] if done < len(order) else []
            if asked.lease.error is None and may_be_cut(failed):
                raise too_long(f"perhaps more than {limit} tokens", failed) from None
            raise
        found.model = asked.called(asked.lease.spec)
    g.stats.usage({"prompt_tokens": found.tokens})
    return found


def _warn(found: Found, field: str) -> None:
    if found.cut:
        count = "one text was" if found.cut == 1 else f"{found.cut} texts were"
        warn([Unmet(field, f"{count} longer than the model reads, and cut.")])


@dataclass(frozen=True)
class _Part:
    """A request for some of the texts of another."""

    body: RequestBody
    field: str
    texts: Sequence[str]

    def for_spec(self, spec: ModelSpec) -> dict[str, Any]:
        return {**self.body.for_spec(spec), self.field: self.texts}


def as_json(answer: Mapping[str, Any]) -> Response:
    """Return an answer as JSON."""
    return Response(json.dumps(answer), mimetype="application/json")
