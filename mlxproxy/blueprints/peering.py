"""The way of a request to a peer: whether it goes there, and its answer as a response."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from flask import Response, g, request

from mlxproxy import sse
from mlxproxy.blueprints.hooks import HOPS, disconnect, streamed
from mlxproxy.blueprints.services import Services, services
from mlxproxy.dialects import ollama_request
from mlxproxy.dialects.errors import in_stream
from mlxproxy.errors import AnswerEnded, ModelNotFound
from mlxproxy.observability.answers import UnderWay
from mlxproxy.peers.directory import Offer
from mlxproxy.peers.relay import PeerAnswer, Question
from mlxproxy.peers.route import Here, There, named, route
from mlxproxy.relay.statistics import AnswerStats

PEER_HEADER = "X-Mlxproxy-Peer"


def elsewhere(
    given: Mapping[str, Any], field: str = "model", manages: bool = False
) -> Response | None:
    """Return a peer's answer to this request; None if this machine is to answer it.

    Args:
        given: the body.
        field: the one that names the model.
        manages: whether the request is for a load or an unload, not for an answer.

    Raises:
        ProxyError: the peer that it names cannot answer, or it comes from a peer and names no model
            of this machine.
    """
    parts, from_peer = services(), HOPS in request.environ
    if parts.peers is None and not from_peer:
        return None
    name = given.get(field)
    if not isinstance(name, str) or not name:
        return None
    name = name.removesuffix(ollama_request.LATEST)
    listings = parts.peers.listings() if parts.peers else []
    if parts.settings.model_selection == "loaded" and not manages and not named(name, listings):
        return None  # the loaded model answers, whatever the name
    there = route(name, listings, lambda: _here(parts, name), time.monotonic(), from_peer, manages)
    if there is not None:
        return _relayed({**given, field: there.model}, there, parts, manages)
    if from_peer and not manages and _here(parts, name).id is None:
        raise ModelNotFound(f"There is no model named '{name}' on this machine.", param=field)
    return None


def offered() -> list[Offer]:
    """Return what the peers offer now; to a peer, nothing: it offers only what is on its disk."""
    peers = services().peers
    if peers is None or HOPS in request.environ:
        return []
    now = time.monotonic()
    reachable = [each for each in peers.listings() if each.trouble(now) is None]
    return [offer for listing in reachable for offer in listing.offers.values()]


def offer_of(name: str) -> Offer | None:
    """Return the model of a peer that a name means; None if it does not name a peer.

    Raises:
        ProxyError: the peer that it names does not answer, or has no such model.
    """
    peers = services().peers
    if peers is None:
        return None
    listings = peers.listings()
    if named(name, listings) is None:
        return None
    there = route(name, listings, lambda: Here(None), time.monotonic(), HOPS in request.environ)
    return there.listing.offers[there.model] if there else None


def described(parts: Services) -> dict[str, Any]:
    """Return the field `peers` of the state, if there are peers; streams call it as well."""
    peers = parts.peers
    if peers is None:
        return {}
    now, flying = time.monotonic(), peers.in_flight()
    listed = [listing.described(now) for listing in peers.listings()]
    return {"peers": [{**each, "in_flight": flying[each["name"]]} for each in listed]}


def _here(parts: Services, name: str) -> Here:
    selection = parts.selection
    if selection.profile(name) is not None:
        return Here(name, settled=True)
    if (resident := selection.resident(name)) is not None:
        return Here(resident.model_id, settled=True)
    spec = selection.named_spec(name)
    if spec is None:
        return Here(None)
    settled = any(spec.path == each.path for each in parts.controller.residents())
    fits = selection.needed_bytes(spec.model) <= parts.controller.budget()
    return Here(spec.model_id, settled, fits)


def _relayed(given: Mapping[str, Any], there: There, parts: Services, manages: bool) -> Response:
    peers, peer, path, request_id = parts.peers, there.listing.peer, request.path, g.request_id
    assert peers is not None
    stats = AnswerStats(model=None if manages else f"{there.model}@{peer.name}")
    if not manages:
        g.stats = stats
    question = Question(
        path,
        json.dumps(given).encode(),
        request_id,
        lambda error: in_stream(error, path, request_id),
        manages,
    )
    answer = peers.answer(there, question, disconnect(), stats)
    ended = AnswerEnded("Somebody has ended this answer, on the server's page or with its API.")
    if not manages:
        g.answer = parts.answers.begin(
            UnderWay(g.who, stats, stats.model, lambda: answer.abort(ended))
        )
    answer.open()
    headers = {PEER_HEADER: peer.name, **_passed_on(answer)}
    if answer.streamed:
        types = {} if answer.mimetype == "text/event-stream" else {"Content-Type": answer.mimetype}
        return streamed(answer, stats, {**sse.HEADERS, **types, **headers})
    return Response(answer.whole(), answer.status, headers, mimetype="application/json")


def _passed_on(answer: PeerAnswer) -> dict[str, str]:
    headers = {"Retry-After": answer.retry_after, "X-Mlxproxy-Warning": answer.warning}
    return {name: value for name, value in headers.items() if value is not None}
