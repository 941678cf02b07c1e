"""What a peer offers, asked in the background, so that no request waits for a list.

One thread a peer asks for the peer's models and replaces one immutable :class:`Listing`. Its waits
are bounded, except for the resolution of the name, which the system decides; a listing that is not
replaced in time counts as that of a peer that does not answer.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from mlxproxy.backend.connection import BackendConnection, BrokenConnection, ReadTimeout, parsed
from mlxproxy.backend.protocol import Address
from mlxproxy.settings import Peer

log = logging.getLogger("mlxproxy.peers")

POLL_SECONDS: Final = 2.0
CONNECT_SECONDS: Final = 1.0
ANSWER_SECONDS: Final = 2.0  # for the whole list
STALE_SECONDS: Final = 8.0  # more than a pause and the longest wait for a list
LIST_BYTES: Final = 4 << 20
MOST_MODELS: Final = 2000
LONGEST_ID: Final = 300  # characters
HOPS_HEADER: Final = "X-Mlxproxy-Hops"
ABILITIES: Final = ("tools", "vision", "thinking", "thinking_switch", "thinking_default")
LIST_PATH: Final = "/v1/models"


class Unanswered(Exception):
    """The peer gave no list; the message follows its name in a sentence."""


@dataclass(frozen=True)
class Offer:
    """A model of a peer.

    Attributes:
        item: its item of `/v1/models`, with our name for it.
        encoded: the same as JSON.
    """

    id: str
    loaded: bool
    fits: bool
    item: Mapping[str, Any]
    encoded: str


@dataclass(frozen=True)
class Listing:
    """What is known about a peer.

    Attributes:
        address: where it answered; None: nowhere.
        heard_at: when it gave its last list, in monotonic seconds.
        problem: why it has given none since; None: it has.
        offers: its models, by their ids there.
    """

    peer: Peer
    address: Address | None = None
    heard_at: float = 0.0
    problem: str | None = "has not been reached yet"
    offers: Mapping[str, Offer] = field(default_factory=dict)

    def trouble(self, now: float) -> str | None:
        """Return why nothing can be sent there at `now`; None: it can."""
        if self.problem is None and now - self.heard_at > STALE_SECONDS:
            return f"has not answered for {now - self.heard_at:.0f} s"
        return self.problem

    def described(self, now: float) -> dict[str, Any]:
        """Return the peer's state as JSON."""
        trouble = self.trouble(now)
        there = list(self.offers.values()) if trouble is None else []
        return {
            "name": self.peer.name,
            "url": self.peer.url,
            "reachable": trouble is None,
            "reason": trouble,
            "models": len(there),
            "loaded": [offer.item["id"] for offer in there if offer.loaded],
        }


def headers_for(request_id: str | None = None) -> dict[str, str]:
    """Return the headers of a request to a peer, of which none is the client's own."""
    headers = {HOPS_HEADER: "1", "User-Agent": "mlxproxy"}
    if request_id is not None:
        headers["X-Request-Id"] = request_id
    return headers


def ask(peer: Peer) -> tuple[Address, bytes]:
    """Return where the peer answers, and its list as it sent it.

    Raises:
        Unanswered: it gives none.
    """
    try:
        found = socket.getaddrinfo(peer.host, peer.port, socket.AF_INET, socket.SOCK_STREAM)
        address = Address(*found[0][4][:2])
    except (OSError, UnicodeError):
        raise Unanswered(f"has no IPv4 address ({peer.host} is unknown here)") from None
    deadline = time.monotonic() + ANSWER_SECONDS
    try:
        connection = BackendConnection(address, CONNECT_SECONDS, connect_seconds=CONNECT_SECONDS)
    except BrokenConnection as error:
        raise Unanswered(error.what) from None
    try:
        connection.send(LIST_PATH, None, peer.authorization, headers_for())
        while not _has_head(connection):
            if time.monotonic() > deadline:
                raise Unanswered(
                    f"accepts connections, but has sent nothing for {ANSWER_SECONDS:g} s"
                )
        body = connection.read_rest(LIST_BYTES + 1, max(0.0, deadline - time.monotonic()))
    except BrokenConnection as error:
        raise Unanswered(error.what) from None
    finally:
        connection.close()
    if connection.status == 401:
        raise Unanswered('rejects the key: check its "key" in PEERS')
    if connection.status != 200:
        raise Unanswered(f"answered GET {LIST_PATH} with status {connection.status}")
    if len(body) > LIST_BYTES:
        raise Unanswered(f"sent a list of more than {LIST_BYTES:,} bytes")
    if not connection.whole:
        raise Unanswered(f"did not send all of its list within {ANSWER_SECONDS:g} s")
    return address, body


def _has_head(connection: BackendConnection) -> bool:
    try:
        connection.read_head()
    except ReadTimeout:
        return False
    return True


def offers_in(body: bytes, name: str) -> dict[str, Offer]:
    """Return the models that can be loaded in a peer's list, by their ids there.

    Args:
        name: the peer's name.

    Raises:
        Unanswered: it is not a list of mlxproxy's.
    """
    try:
        data = parsed(body)["data"]
        if not isinstance(data, list) or len(data) > MOST_MODELS:
            raise TypeError
        return dict(_offer(item, name) for item in data if item["loadable"] is not False)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Unanswered(f"answered GET {LIST_PATH} with something else than a list") from None


def _offer(item: Any, peer: str) -> tuple[str, Offer]:
    id_, capabilities = item["id"], item["capabilities"]
    is_id = isinstance(id_, str) and 0 < len(id_) <= LONGEST_ID and id_.isprintable()
    states = ("loaded", "loading", "not-loaded")
    if not is_id or item["state"] not in states or not isinstance(capabilities, dict):
        raise TypeError
    quantization = item["quantization"]
    kept = {
        "id": f"{id_}@{peer}",
        "object": "model",
        "created": _number(item["created"]) or 0,
        "created_at": _text(item["created_at"]),
        "display_name": f"{_text(item['display_name'])}@{peer}",
        "owned_by": _text(item["owned_by"]),
        "publisher": _text(item["publisher"]),
        "type": _text(item["type"]),
        "compatibility_type": _text(item["compatibility_type"]),
        "loadable": True,
        "reason": None,
        "engine": _text(item.get("engine")),
        "architecture": _text(item["architecture"]),
        "parameters": _number(item["parameters"]),
        "quantization": {"name": _text(quantization["name"])} if quantization else None,
        "size_bytes": _number(item["size_bytes"]) or 0,
        "max_context_length": _number(item["max_context_length"]),
        "capabilities": {ability: capabilities.get(ability) is True for ability in ABILITIES},
        "memory_bytes": _number(item["memory_bytes"]),
        "peer": peer,
        "loaded": item["state"] == "loaded",
        "state": item["state"],
        "fits": item["fits"] is True,
    }
    return id_, Offer(id_, kept["loaded"], kept["fits"], kept, json.dumps(kept))


def _text(value: Any) -> str | None:
    return value[:LONGEST_ID] if isinstance(value, str) else None


def _number(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 53 else None


class Poller:
    """The thread that keeps the listing of one peer.

    Attributes:
        listing: what is known; replaced as a whole, so it may be read from any thread.
    """

    def __init__(self, peer: Peer, ask: Callable[[Peer], tuple[Address, bytes]] = ask) -> None:
        self.listing = Listing(peer)
        self._ask = ask
        self._body = b""  # the list that the offers were read from
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"peer-{peer.name}", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def refresh(self) -> None:
        """Ask soon: something has changed there."""
        self._wake.set()

    def close(self) -> None:
        """Stop to ask, without waiting for an answer under way."""
        self._closed = True
        self._wake.set()

    def poll(self) -> None:
        """Ask once, and replace the listing."""
        before, peer = self.listing, self.listing.peer
        try:
            address, body = self._ask(peer)
            known = body == self._body and before.address is not None
            offers = before.offers if known else offers_in(body, peer.name)
        except Unanswered as error:
            self.listing = Listing(peer, before.address, before.heard_at, str(error), before.offers)
        else:
            self._body = body
            self.listing = Listing(peer, address, time.monotonic(), None, offers)
        if self.listing.problem != before.problem:
            told = self.listing.problem or f"answers and offers {len(self.listing.offers)} models"
            log.info("The peer %s (%s) %s.", peer.name, peer.url, told)

    def _run(self) -> None:
        while not self._closed:
            self._wake.clear()
            try:
                self.poll()
            except Exception:  # a fault of ours: the listing becomes stale, and the log says why
                log.exception("The list of the peer %s could not be read", self.listing.peer.name)
            self._wake.wait(POLL_SECONDS)
