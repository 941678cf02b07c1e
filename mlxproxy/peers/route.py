"""Which machine answers: a pure decision over what is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlxproxy.errors import ModelNotFound, PeerLoop, PeerUnavailable
from mlxproxy.peers.directory import Listing, Offer

RETRY_SECONDS = 2  # a peer that answers again is noticed by then


@dataclass(frozen=True)
class Here:
    """What this machine knows about a name.

    Attributes:
        id: the id of the model that it means; None: no model here has that name.
        settled: whether the name's meaning belongs to this machine (a profile), or its model is
            loaded: then no other machine is considered.
        fits: whether the model fits into memory.
    """

    id: str | None
    settled: bool = False
    fits: bool = False


@dataclass(frozen=True)
class There:
    """A model of a peer, by its id there."""

    listing: Listing
    model: str


def named(name: str, listings: Sequence[Listing]) -> tuple[str, Listing] | None:
    """Return the model and the peer that a name with an @ means; None: it names no peer."""
    model, _, machine = name.rpartition("@")
    for listing in listings:
        if model and listing.peer.name == machine:
            return model, listing
    return None


def route(
    name: str,
    listings: Sequence[Listing],
    here: Callable[[], Here],
    now: float,
    from_peer: bool = False,
    only_absent: bool = False,
) -> There | None:
    """Return the peer that answers a request for this model; None: this machine does.

    A model on several machines is answered where it is loaded, else here if it fits here, else
    where it fits.

    Args:
        here: returns what this machine knows; called only for a name without a peer.
        now: monotonic seconds.
        from_peer: whether the request comes from a peer: then it goes to no other.
        only_absent: whether a model of this machine is meant wherever there is one (for a load).

    Raises:
        PeerLoop: it would go from a peer to a peer.
        PeerUnavailable: the peer that it names does not answer.
        ModelNotFound: that peer has no such model.
    """
    if (found := named(name, listings)) is not None:
        model, listing = found
        if from_peer:
            raise PeerLoop(
                f"This request comes from another mlxproxy and names '{name}', a model of a third "
                "machine. A peer passes nothing on: ask that machine, or add it to PEERS where "
                "the request begins."
            )
        return There(listing, _offered(model, listing, now).id)
    if from_peer:
        return None
    known = here()
    if known.settled or (only_absent and known.id is not None):
        return None
    wanted = known.id or name
    having = [
        (listing, listing.offers[wanted])
        for listing in listings
        if wanted in listing.offers and listing.trouble(now) is None
    ]
    if not having:
        return None
    best = max(having, key=lambda pair: (pair[1].loaded, pair[1].fits))  # the first of equals
    listing, offer = best
    if known.id is not None and not offer.loaded and (known.fits or not offer.fits):
        return None
    return There(listing, offer.id)


def _offered(model: str, listing: Listing, now: float) -> Offer:
    """Return the model that a name means at a peer: an id, or its unambiguous last part."""
    peer = listing.peer
    if (trouble := listing.trouble(now)) is not None:
        raise PeerUnavailable(
            f"The peer {peer.name} ({peer.url}) {trouble}. Is it awake, and does mlxproxy run "
            "there?",
            retry_after=RETRY_SECONDS,
            peer=peer.name,
        )
    if model in listing.offers:
        return listing.offers[model]
    ending = f"/{model}".casefold()
    found = [offer for id_, offer in listing.offers.items() if id_.casefold().endswith(ending)]
    if len(found) == 1:
        return found[0]
    told = "has several models" if found else "has no model"
    raise ModelNotFound(
        f"The peer {peer.name} ({peer.url}) {told} named '{model}'. GET /v1/models lists them all.",
        param="model",
    )
