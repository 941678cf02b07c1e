"""One client cannot keep the others out."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import scripted_server
from tests.support.network import ALICE, BOB, CARLA, MAX_BODY, PLACES, QUEUE, ask, chat, describe
from tests.support.proxy import Proxy
from tests.support.raw_http import shape
from tests.support.waiting import until


def outcome(proxy: Proxy, key: str, name: str, **fields: Any) -> str:
    """Reads a stream to its end: ``done``, or the error's code."""
    with chat(proxy, key, stream=True, user=name, **fields) as answer:
        last = answer.text.strip().rpartition("\n")[2].removeprefix("data: ")
    return "done" if last == "[DONE]" else str(shape(json.loads(last))["code"])


@pytest.mark.parametrize("disguised", [False, True], ids=["", "with another header each time"])
def test_a_client_with_many_requests_cannot_keep_others_out(
    proxy: Proxy,
    program: Path,
    script: Callable[..., None],
    pool: concurrent.futures.ThreadPoolExecutor,
    disguised: bool,
) -> None:
    def greedy(number: int) -> str:
        tokens = 50 + 10 * number  # places become free one by one
        if not disguised:
            return outcome(proxy, ALICE, "alice", max_tokens=tokens)
        headers = {"Authorization": f"Basic {number}", "x-api-key": ALICE}
        return outcome(proxy, "", "alice", max_tokens=tokens, headers=headers)

    script(events=1000, interval=0.03)
    seen = len(scripted_server.record(program, "request"))
    many = [pool.submit(greedy, number) for number in range(PLACES + QUEUE)]
    full = {"in_flight": PLACES, "waiting": QUEUE}
    until(lambda: full.items() <= describe(proxy).items(), what="a full proxy")
    script(events=3)
    assert outcome(proxy, BOB, "bob") == "done"
    assert sorted(one.result() for one in many) == ["done"] * 7 + ["too_many_requests"]
    served = [it["body"]["user"] for it in scripted_server.record(program, "request")[seen:]]
    assert served == ["alice"] * PLACES + ["bob"] + ["alice"] * (QUEUE - 1)


def test_a_client_with_many_large_bodies_leaves_memory_for_others(
    proxy: Proxy, script: Callable[..., None], pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    script(silent_seconds=3)
    large = {"user": "x" * (MAX_BODY - 500)}
    many = [pool.submit(chat, proxy, ALICE, **large) for _ in range(PLACES)]
    until(lambda: describe(proxy)["in_flight"] == PLACES, what="a client that has its share")
    refused = chat(proxy, ALICE, **large)
    assert (refused.status_code, shape(refused.json())["code"]) == (429, "too_many_requests")
    assert refused.headers["Retry-After"]
    assert chat(proxy, BOB, **large).ok
    assert all(one.result().ok for one in many)
    assert chat(proxy, ALICE, **large).ok, "all was given back"


def test_an_unload_is_performed_although_many_wait_for_a_load(
    proxy: Proxy, script: Callable[..., None], pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    script(load_seconds=8)
    body = {"model_id": "tiny/beta"}
    many = [pool.submit(ask, proxy, "POST", "/v1/models/load", json=body) for _ in range(12)]
    until(lambda: any(one.done() for one in many), what="the first that is turned away")
    assert ask(proxy, "POST", "/v1/models/unload", BOB).status_code == 200
    codes = {shape(one.result().json())["code"] for one in many}
    assert codes == {"too_many_requests", "load_cancelled"}


def test_a_request_that_must_run_alone_waits_while_streams_continue(
    proxy: Proxy, script: Callable[..., None], pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    script(events=60, interval=0.05)
    with chat(proxy, stream=True, max_tokens=1000) as stream:
        lines = stream.iter_lines()
        next(line for line in lines if line.startswith(b"data: "))
        script(events=3, interval=0.0)
        alone = pool.submit(chat, proxy, BOB, seed=7)
        until(lambda: describe(proxy)["waiting"] == 1, what="the seed's wait")
        assert chat(proxy, CARLA).ok, "others overtake it"
        assert not alone.done()
        arrivals = [time.monotonic() for line in lines if line.startswith(b"data: ")]
    assert len(arrivals) >= 40, "it went on"
    assert max(after - before for before, after in itertools.pairwise(arrivals)) < 1
    assert alone.result().ok
