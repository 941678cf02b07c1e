"""An answer of a peer: silences, ends, and how many there are at a time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlxproxy.backend.protocol import Address
from mlxproxy.disconnect import Disconnect
from mlxproxy.errors import PeerUnavailable, ProxyError, ShuttingDown, TooManyRequests
from mlxproxy.peers import relay
from mlxproxy.peers.directory import Listing
from mlxproxy.peers.relay import PeerAnswer, Peers, Question, named_error
from mlxproxy.peers.route import There
from mlxproxy.relay.statistics import AnswerStats
from mlxproxy.settings import Peer, Settings
from mlxproxy.wiring import peers_of
from tests.support.waiting import until

QUESTION = Question("/v1/chat/completions", b"{}", "abc", lambda error: error.code.encode())
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
Starter = Callable[..., tuple[PeerAnswer, Disconnect]]


@pytest.fixture
def answer() -> Iterator[Starter]:
    """Start answers of a peer that sends these bytes, and then nothing."""
    opened: list[socket.socket] = []

    def starter(
        reply: bytes, heard: Callable[[], float] = time.monotonic, stall: float = 300.0
    ) -> tuple[PeerAnswer, Disconnect]:
        listener = socket.create_server(("127.0.0.1", 0))
        opened.append(listener)
        host, port = listener.getsockname()

        def run() -> None:
            connection, _ = listener.accept()
            opened.append(connection)
            connection.sendall(reply)

        threading.Thread(target=run, daemon=True).start()
        peer, client = Peer("studio", host, port), Disconnect()

        def listing() -> Listing:
            return Listing(peer, Address(host, port), heard(), None)

        return PeerAnswer(QUESTION, listing, client, stall, AnswerStats(), lambda _: None), client

    yield starter
    for one in opened:
        one.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "INTERVAL_SECONDS", 0.05)


def failure(act: Callable[[], object]) -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        act()
    return caught.value


def test_a_peer_that_falls_asleep_ends_the_answer_in_words(
    answer: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "LOST_SECONDS", 0.2)
    asleep, _ = answer(b"", heard=lambda: 0.0)
    error = failure(asleep.open)
    assert isinstance(error, PeerUnavailable)
    assert "The peer studio (http://127.0.0.1" in error.message
    assert "has not answered for" in error.message


def test_a_silent_stream_of_a_peer_that_lives_is_given_up_after_the_stall_timeout(
    answer: Starter,
) -> None:
    silent, _ = answer(STREAM + b"data: 1\n\n", stall=0.2)
    silent.open()
    assert silent.streamed
    assert list(silent) == [b"data: 1\n\n", b"peer_unavailable"]


def test_a_whole_answer_may_be_silent_for_long_while_the_peer_lives(answer: Starter) -> None:
    silent, client = answer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", stall=0.1)
    silent.open()
    begun = time.monotonic()
    error = failure(silent.whole)
    assert "though it answers others" in error.message
    assert time.monotonic() - begun > 0.5  # several times the stall timeout
    assert not client.gone


def test_a_client_that_has_left_ends_the_wait_at_once(answer: Starter) -> None:
    waiting, client = answer(b"")
    threading.Timer(0.2, client.leave).start()
    failure(waiting.open)
    assert waiting._stats.outcome == "client_gone"


def test_an_answer_that_is_aborted_ends_with_the_reason(answer: Starter) -> None:
    stream, _ = answer(STREAM + b"data: 1\n\n")
    stream.open()
    pieces = iter(stream)
    assert next(pieces) == b"data: 1\n\n"
    stream.abort(ShuttingDown("Bye."))
    assert list(pieces) == [b"shutting_down"]


def test_an_answer_or_an_event_without_an_end_is_not_kept_in_memory(
    answer: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "ANSWER_BYTES", 100)
    whole, _ = answer(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + b"x" * 900)
    whole.open()
    assert "more than 100 bytes" in failure(whole.whole).message
    stream, _ = answer(STREAM + b"data: " + b"x" * 900)
    stream.open()
    assert list(stream) == [b"peer_unavailable"]


def test_one_peer_has_so_many_answers_at_a_time_and_none_once_the_proxy_stops() -> None:
    peers = Peers((Peer("a", "127.0.0.1", 1), Peer("b", "127.0.0.1", 2)), 2, 300.0)
    a, b = (There(listing, "p/a") for listing in peers.listings())

    def begin(there: There) -> PeerAnswer:
        return peers.answer(there, QUESTION, Disconnect(), AnswerStats())

    first, _ = begin(a), begin(a)
    assert isinstance(failure(lambda: begin(a)), TooManyRequests)
    begin(b)
    assert peers.in_flight() == {"a": 2, "b": 1}
    first.close()
    begin(a)
    peers.refuse()
    assert isinstance(failure(lambda: begin(b)), ShuttingDown)


def test_a_stop_waits_for_answers_unless_it_is_forced() -> None:
    peers = Peers((Peer("a", "127.0.0.1", 1),), 2, 300.0)
    there = There(peers.listings()[0], "p/a")
    answer = peers.answer(there, QUESTION, Disconnect(), AnswerStats())
    closing = threading.Thread(target=peers.close, args=(60.0,))
    closing.start()
    peers.force_stop()
    closing.join(10)
    assert not closing.is_alive()
    assert isinstance(answer.error, ShuttingDown)


def test_an_answer_that_ends_lets_a_stop_go_on() -> None:
    peers = Peers((Peer("a", "127.0.0.1", 1),), 2, 300.0)
    there = There(peers.listings()[0], "p/a")
    answer = peers.answer(there, QUESTION, Disconnect(), AnswerStats())
    closing = threading.Thread(target=peers.close, args=(60.0,))
    closing.start()
    answer.close()
    closing.join(10)
    assert not closing.is_alive()
    assert answer.error is None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            b'{"error": {"message": "no", "code": "x"}}',
            b'{"error": {"message": "a: no", "code": "x"}}',
        ),
        (b'{"error": "no"}', b'{"error": "a: no"}'),
    ],
)
def test_an_error_begins_with_the_name_of_the_peer(body: bytes, said: bytes) -> None:
    assert named_error(body, "a") == said


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"error": 5}', b"[" * 100_000])
def test_an_error_that_is_none_is_told_in_words(body: bytes) -> None:
    assert b"not mlxproxy's" in named_error(body, "a")


def test_without_peers_there_is_no_thread_and_nothing_to_ask(tmp_path: Path) -> None:
    assert peers_of(Settings(instance_path=tmp_path)) is None


def test_each_peer_is_asked_by_a_thread_of_its_own_until_the_end() -> None:
    peers = Peers((Peer("down-one", "127.0.0.1", 1),), 2, 300.0)

    def asking() -> bool:
        return any(thread.name == "peer-down-one" for thread in threading.enumerate())

    assert not asking()
    peers.start()
    until(lambda: peers.listings()[0].problem != "has not been reached yet", what="a first look")
    assert asking()
    peers.close(0.0)
    until(lambda: not asking(), what="the thread's end")
