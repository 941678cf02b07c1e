"""What is known about a peer: its list, or in words why there is none."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlxproxy.backend.protocol import Address
from mlxproxy.peers import directory
from mlxproxy.peers.directory import Poller, Unanswered, offers_in
from mlxproxy.settings import Peer, SettingError, load
from tests.conftest import free_port

ITEM: dict[str, Any] = {
    "id": "p/a",
    "created": 1,
    "created_at": "1970",
    "display_name": "a",
    "owned_by": "p",
    "publisher": "p",
    "type": "llm",
    "compatibility_type": "mlx",
    "loadable": True,
    "architecture": "qwen3",
    "parameters": None,
    "quantization": {"name": "4-bit", "secret": 1},
    "size_bytes": 10,
    "max_context_length": None,
    "capabilities": {"tools": True, "vision": False, "thinking": True},
    "memory_bytes": 11,
    "state": "loaded",
    "fits": True,
    "path": "/Users/somebody/p/a",
}


def listed(*items: Any) -> bytes:
    return json.dumps({"object": "list", "data": list(items)}).encode()


def http(body: bytes, status: int = 200, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, size, body)


@pytest.fixture
def peer() -> Iterator[Callable[[bytes | None], Peer]]:
    """Start servers that send these bytes to whoever connects (None: nothing, ever)."""
    opened: list[socket.socket] = []

    def starter(reply: bytes | None) -> Peer:
        listener = socket.create_server(("127.0.0.1", 0))
        opened.append(listener)

        def run() -> None:
            connection, _ = listener.accept()
            opened.append(connection)
            connection.recv(1 << 16)
            if reply is not None:
                connection.sendall(reply)
                connection.shutdown(socket.SHUT_WR)

        threading.Thread(target=run, daemon=True).start()
        return Peer("studio", "127.0.0.1", listener.getsockname()[1])

    yield starter
    for one in opened:
        one.close()


def polled(peer: Peer) -> directory.Listing:
    poller = Poller(peer)
    poller.poll()
    return poller.listing


def test_a_model_is_listed_under_our_name_without_its_path(
    peer: Callable[[bytes | None], Peer],
) -> None:
    found = polled(peer(http(listed(ITEM, {**ITEM, "id": "p/b", "loadable": False}))))
    assert found.trouble(time.monotonic()) is None
    assert list(found.offers) == ["p/a"]
    item = json.loads(found.offers["p/a"].encoded)
    assert item["id"] == "p/a@studio"
    assert item["peer"] == "studio"
    assert item["state"] == "loaded"
    assert "path" not in item
    assert item["quantization"] == {"name": "4-bit"}


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"", "closed the connection without an answer"),
        (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", "does not speak HTTP"),
        (http(b"{}", 401), 'check its "key" in PEERS'),
        (http(b"{}", 503), "with status 503"),
        (http(b"<html>"), "something else than a list"),
        (http(b"[" * 100_000), "something else than a list"),
        (http(listed("p/a")), "something else than a list"),
        (http(listed({**ITEM, "id": "p/\n"})), "something else than a list"),
        (http(listed({**ITEM, "state": {}})), "something else than a list"),
        (http(listed(ITEM), length=1 << 20), "did not send all of its list"),
    ],
)
def test_nonsense_is_told_in_words(
    peer: Callable[[bytes | None], Peer], reply: bytes, words: str
) -> None:
    assert words in (polled(peer(reply)).trouble(time.monotonic()) or "")


def test_a_list_without_an_end_is_not_read_to_its_end(
    peer: Callable[[bytes | None], Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "LIST_BYTES", 100)
    assert "more than 100 bytes" in str(polled(peer(http(listed(ITEM)))).problem)


def test_a_silent_peer_is_given_up_in_time(
    peer: Callable[[bytes | None], Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(directory, "CONNECT_SECONDS", 0.1)
    assert "has sent nothing" in str(polled(peer(None)).problem)


def test_a_peer_that_is_down_or_unknown_is_told_in_words() -> None:
    down = polled(Peer("studio", "127.0.0.1", free_port()))
    assert "does not accept connections" in str(down.problem)
    assert "has no IPv4 address" in str(polled(Peer("studio", "no-such-host.invalid", 80)).problem)


def test_a_list_that_has_not_changed_is_not_read_again() -> None:
    reads: list[Peer] = []

    def ask(peer: Peer) -> tuple[Address, bytes]:
        reads.append(peer)
        return Address("127.0.0.1", 1), listed(ITEM)

    poller = Poller(Peer("studio", "studio.local", 80), ask)
    poller.poll()
    first = poller.listing.offers
    poller.poll()
    assert len(reads) == 2
    assert poller.listing.offers is first


def test_a_peer_that_comes_back_is_offered_again() -> None:
    answers: list[bytes | None] = [listed(ITEM), None, listed(ITEM)]

    def ask(peer: Peer) -> tuple[Address, bytes]:
        body = answers.pop(0)
        if body is None:
            raise Unanswered("sleeps")
        return Address("127.0.0.1", 1), body

    poller = Poller(Peer("studio", "studio.local", 80), ask)
    states = []
    for _ in range(3):
        poller.poll()
        states.append(poller.listing.trouble(time.monotonic()))
    assert states == [None, "sleeps", None]
    assert list(poller.listing.offers) == ["p/a"]


def test_more_models_than_a_disk_has_are_no_list() -> None:
    with pytest.raises(Unanswered):
        offers_in(listed(*[ITEM] * (directory.MOST_MODELS + 1)), "studio")


# -- the setting


def settings_with(tmp_path: Any, value: str) -> tuple[Peer, ...]:
    (tmp_path / "config.py").write_text(f"PEERS = {value}\n")
    return load(environ={"MLXPROXY_INSTANCE_PATH": str(tmp_path)}).peers


def test_peers_are_read_from_the_configuration(tmp_path: Any) -> None:
    found = settings_with(
        tmp_path,
        '{"studio": {"url": "http://studio.local:8080/", "key": "k"}, '
        '"mini": {"url": "http://10.0.0.2"}}',
    )
    assert found == (Peer("studio", "studio.local", 8080, "k"), Peer("mini", "10.0.0.2", 80))


@pytest.mark.parametrize(
    "value",
    [
        "[1]",
        '{"Studio": {"url": "http://a"}}',
        '{"a@b": {"url": "http://a"}}',
        '{"a": "http://a"}',
        '{"a": {}}',
        '{"a": {"url": "https://a"}}',
        '{"a": {"url": "http://a/v1"}}',
        '{"a": {"url": "http://me:secret@a"}}',
        '{"a": {"url": "http://a:0"}}',
        '{"a": {"url": "http://a:70000"}}',
        '{"a": {"url": "http://a", "keys": "secret"}}',
        '{"a": {"url": "http://a", "key": "secret\\nX: y"}}',
        '{"a": {"url": "http://a", "key": 5}}',
    ],
)
def test_a_wrong_peer_is_refused_without_telling_its_key(tmp_path: Any, value: str) -> None:
    with pytest.raises(SettingError, match="PEERS") as caught:
        settings_with(tmp_path, value)
    assert "secret" not in str(caught.value)


def test_a_key_is_not_shown_with_its_peer() -> None:
    assert "secret" not in repr(Peer("a", "b", 80, "secret"))
