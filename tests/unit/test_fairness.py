"""Shares of the places: who is served next, and who has to go; no thread and no clock."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxproxy.controller import policy


@dataclass(eq=False)
class Request:
    client: str
    turn: int = 0


class Counters:
    """Places that requests are served at, in the order that the rules decide."""

    def __init__(self) -> None:
        self.turns = itertools.count(1)
        self.waiting: list[Request] = []
        self.held: Counter[str] = Counter()

    def come(self, clients: str) -> None:
        self.waiting += [Request(client, next(self.turns)) for client in clients]

    def serve(self) -> Request:
        request = policy.next_in_turn(self.waiting, self.held)
        self.waiting.remove(request)
        self.held[request.client] += 1
        policy.served(self.waiting, request.client, next(self.turns))
        return request

    def serve_all(self, alone: bool = True) -> str:
        """The clients in the order in which they are served; `alone`: each ends before the next."""
        order = ""
        while self.waiting:
            order += self.serve().client
            if alone:
                self.held.clear()
        return order


@pytest.mark.parametrize(
    ("come", "served"),
    [
        ("aaaab", "abaaa"),
        ("aaaabbbb", "abababab"),
        ("aaabbc", "abcaba"),
        ("baaab", "babaa"),
        ("aaaa", "aaaa"),
    ],
)
def test_with_one_place_the_clients_take_turns(come: str, served: str) -> None:
    counters = Counters()
    counters.come(come)
    assert counters.serve_all() == served


def test_the_client_with_the_fewest_places_goes_first() -> None:
    counters = Counters()
    counters.come("aaaabb")
    assert counters.serve_all(alone=False) == "ababaa"


def test_clients_that_ask_again_at_once_lock_nobody_out() -> None:
    counters = Counters()
    counters.come("gggggg" + "ab")
    order = ""
    for _ in range(12):
        client = counters.serve().client
        counters.held.clear()
        order += client
        if client in "ab":
            counters.come(client)
    assert order == "gab" * 4


def test_one_clients_requests_stay_in_their_order() -> None:
    counters = Counters()
    counters.come("abaaba")
    mine = [request for request in counters.waiting if request.client == "a"]
    served = [counters.serve() for _ in range(6)]
    assert [request for request in served if request.client == "a"] == mine


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), max_size=60))
def test_no_client_is_overtaken_twice_by_another(events: list[tuple[str, int]]) -> None:
    counters = Counters()
    overtaken = {client: Counter[str]() for client in "abc"}
    for client, services in events:
        counters.come(client)
        for _ in range(min(services, len(counters.waiting))):
            served = counters.serve().client
            counters.held.clear()
            overtaken[served].clear()
            for other in {request.client for request in counters.waiting} - {served}:
                overtaken[other][served] += 1
                assert overtaken[other][served] == 1


@pytest.mark.parametrize(
    ("waiting", "goes"),
    [("aab", 1), ("aabb", 3), ("ab", 1), ("abab", 3), ("aaba", 3), ("a", 0), ("bbaac", 3)],
)
def test_a_full_queue_rejects_the_newest_request_of_the_greediest_client(
    waiting: str, goes: int
) -> None:
    requests = [Request(client) for client in waiting]
    away = policy.turned_away(requests)
    if waiting == "bbaac":  # two are equally greedy: one of them
        assert away in requests[:4]
    else:
        assert away is requests[goes]
