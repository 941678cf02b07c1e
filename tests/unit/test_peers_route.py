"""Which machine answers a request: here, a peer, or nobody."""

from __future__ import annotations

from typing import Any

import pytest

from mlxproxy.backend.protocol import Address
from mlxproxy.errors import ModelNotFound, PeerLoop, PeerUnavailable
from mlxproxy.peers.directory import STALE_SECONDS, Listing, Offer
from mlxproxy.peers.route import Here, There, route
from mlxproxy.settings import Peer

NOW = 1000.0


def offer(id_: str, loaded: bool = False, fits: bool = True) -> Offer:
    return Offer(id_, loaded, fits, {"id": id_}, "{}")


def listing(name: str, *offers: Offer, **fields: Any) -> Listing:
    values = {"address": Address("127.0.0.1", 1), "heard_at": NOW, "problem": None, **fields}
    return Listing(Peer(name, f"{name}.local", 8080), offers={o.id: o for o in offers}, **values)


ABSENT = Here(None)
FITS = Here("p/a", fits=True)
TOO_BIG = Here("p/a")
LOADED = Here("p/a", settled=True, fits=True)


def chosen(name: str, here: Here, *listings: Listing, **options: Any) -> str | None:
    found = route(name, listings, lambda: here, NOW, **options)
    return None if found is None else f"{found.model}@{found.listing.peer.name}"


@pytest.mark.parametrize("name", ["p/a@studio", "a@studio", "A@studio"])
def test_a_name_with_a_machine_means_that_machine(name: str) -> None:
    assert chosen(name, LOADED, listing("studio", offer("p/a"))) == "p/a@studio"


def test_what_only_a_peer_has_is_answered_there() -> None:
    assert chosen("p/b", ABSENT, listing("studio", offer("p/b", fits=False))) == "p/b@studio"


def test_what_nobody_has_is_answered_here_as_ever() -> None:
    assert chosen("gpt-4", ABSENT, listing("studio", offer("p/b"))) is None


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        (LOADED, offer("p/a", loaded=True), None),
        (FITS, offer("p/a", loaded=True), "p/a@studio"),
        (FITS, offer("p/a"), None),
        (TOO_BIG, offer("p/a"), "p/a@studio"),
        (TOO_BIG, offer("p/a", fits=False), None),
        (TOO_BIG, offer("p/a", loaded=True), "p/a@studio"),
    ],
)
def test_a_model_on_both_is_answered_where_it_is_loaded_else_where_it_fits(
    here: Here, there: Offer, expected: str | None
) -> None:
    assert chosen("p/a", here, listing("studio", there)) == expected


def test_of_several_peers_the_one_that_has_it_loaded_answers_else_the_first() -> None:
    idle, busy = listing("mini", offer("p/a")), listing("studio", offer("p/a", loaded=True))
    assert chosen("p/a", ABSENT, idle, busy) == "p/a@studio"
    assert chosen("p/a", ABSENT, idle, listing("air", offer("p/a"))) == "p/a@mini"


def test_a_load_of_a_model_of_this_machine_stays_here() -> None:
    peer = listing("studio", offer("p/a", loaded=True))
    assert chosen("p/a", TOO_BIG, peer, only_absent=True) is None
    assert chosen("p/a", ABSENT, peer, only_absent=True) == "p/a@studio"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"problem": "does not accept connections"}, "does not accept connections"),
        ({"heard_at": NOW - STALE_SECONDS - 1}, "has not answered for 9 s"),
    ],
)
def test_a_peer_that_is_away_is_named_in_the_error_and_otherwise_forgotten(
    fields: dict[str, Any], words: str
) -> None:
    away = listing("studio", offer("p/a", loaded=True), **fields)
    with pytest.raises(PeerUnavailable, match=words) as caught:
        chosen("p/a@studio", ABSENT, away)
    assert "studio (http://studio.local:8080)" in caught.value.message
    assert chosen("p/a", FITS, away) is None
    assert chosen("p/a", ABSENT, away) is None


def test_what_the_peer_does_not_have_is_not_found() -> None:
    peer = listing("studio", offer("p/a"), offer("q/a"))
    with pytest.raises(ModelNotFound, match="has no model named 'b'"):
        chosen("b@studio", ABSENT, peer)
    with pytest.raises(ModelNotFound, match="has several models named 'a'"):
        chosen("a@studio", ABSENT, peer)


def test_what_comes_from_a_peer_goes_to_no_peer() -> None:
    peer = listing("studio", offer("p/a", loaded=True))
    assert chosen("p/a", ABSENT, peer, from_peer=True) is None
    with pytest.raises(PeerLoop, match="third machine"):
        chosen("p/a@studio", ABSENT, peer, from_peer=True)


def test_another_at_sign_is_part_of_a_name() -> None:
    peer = listing("studio", offer("p/a@v2"))
    assert chosen("p/a@v2@studio", ABSENT, peer) == "p/a@v2@studio"
    assert chosen("p/a@v2", ABSENT, peer) == "p/a@v2@studio"
    assert isinstance(route("p/a@v2", [peer], lambda: ABSENT, NOW), There)
