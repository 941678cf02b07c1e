"""How much memory the bodies of one client, and of all, may take."""

from __future__ import annotations

import pytest

from mlxproxy.blueprints.budget import SMALL, Budget
from mlxproxy.errors import TooManyRequests

MEGABYTE = 1 << 20


def test_one_client_gets_half_of_the_memory_for_bodies_and_all_together_the_whole() -> None:
    budget = Budget(8 * MEGABYTE)
    held = [budget.take("alice", MEGABYTE) for _ in range(4)]
    with pytest.raises(TooManyRequests) as refused:
        budget.take("alice", MEGABYTE)
    assert refused.value.retry_after
    held += [budget.take("bob", MEGABYTE) for _ in range(4)]
    with pytest.raises(TooManyRequests):
        budget.take("carla", MEGABYTE)
    for give_back in held:
        give_back()
    for _ in range(4):
        budget.take("alice", MEGABYTE)


def test_a_single_body_may_exceed_its_clients_share() -> None:
    budget = Budget(8 * MEGABYTE)
    budget.take("alice", 6 * MEGABYTE)()
    budget.take("alice", 6 * MEGABYTE)


def test_small_bodies_do_not_count_against_the_memory_for_bodies() -> None:
    budget = Budget(SMALL)
    for _ in range(1000):
        budget.take("alice", SMALL - 1)
    budget.take("bob", SMALL)
