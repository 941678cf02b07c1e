"""A client that leaves is honoured in every phase, by the real backend: its processor rests within
two seconds, and the next request is answered."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import requests

from tests.support import tiny_models
from tests.support.proxy import Proxy
from tests.support.waiting import until

REST_SECONDS = 2.0
WEATHER = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]


ONE_AT_A_TIME = """\
import sys
from mlx_lm.server import ResponseGenerator, main
ResponseGenerator._is_batchable = lambda self, args: False
sys.exit(main())
"""


@pytest.fixture(scope="module", params=["together", "one at a time"])
def busy(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """A proxy with a slow model, whose tool call takes minutes; its backend answers in a batch, or
    one request after the other, as it does with images and adapters."""
    root = tmp_path_factory.mktemp("departures")
    call = [f"part{number}," for number in range(3000)]
    tiny_models.build_slow(root / "models" / "tiny" / "slow", says="slow", call=call, words=3000)
    settings: dict[str, Any] = {}
    if request.param == "one at a time":
        program = root / "mlx_lm.server"
        program.write_text(f"#!{sys.executable}\n{ONE_AT_A_TIME}")
        program.chmod(0o755)
        settings["MLX_SERVER_BIN"] = program
    proxy = Proxy(root / "instance", root / "models", **settings)
    try:
        loaded = proxy.start().load("tiny/slow")
        assert loaded.ok, loaded.text
        yield proxy
    finally:
        proxy.clean_up()


def backend(proxy: Proxy) -> psutil.Process:
    return psutil.Process(proxy.loaded()["pid"])


def used(process: psutil.Process) -> float:
    """Processor seconds that a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def leave(proxy: Proxy, after: Callable[[], Any], **fields: Any) -> None:
    """Sends a chat and closes the connection after that, in the middle of the answer."""
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3000, **fields}
    text = requests.Request("POST", proxy.url + "/v1/chat/completions", json=body).prepare().body
    assert isinstance(text, bytes)
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x.local\r\nContent-Length: {len(text)}"
        client.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + text)
        after()


def computing(process: psutil.Process) -> Callable[[], None]:
    """What waits until the backend has computed for a second on what will be sent."""
    before = used(process)
    return lambda: until(lambda: used(process) > before + 1, 20, "the backend's work")


PHASES: dict[str, dict[str, Any]] = {
    "streamed": {"stream": True},
    "whole": {},
    "whole with logprobs": {"logprobs": True, "top_logprobs": 2},
    "seeded": {"seed": 5, "temperature": 1.0},
    "seeded, with logprobs": {
        "seed": 5, "temperature": 1.0, "xtc_probability": 0.1, "logprobs": True,
    },
    "with stop words": {"stop": ["never said"], "stream": True},
    "in a tool call": {"tools": WEATHER, "stream": True},
    "in a seeded tool call": {"tools": WEATHER, "seed": 5, "temperature": 1.0},
    "in the prompt": {"messages": [{"role": "user", "content": tiny_models.long_prompt(12_000)}]},
}  # fmt: skip


@pytest.mark.parametrize("phase", PHASES)
def test_the_backend_stops_computing_when_its_client_disconnects(busy: Proxy, phase: str) -> None:
    process = backend(busy)
    leave(busy, computing(process), **PHASES[phase])
    left = time.monotonic()

    def rests() -> bool:
        before = used(process)
        time.sleep(0.3)  # the measured interval
        return used(process) - before < 0.1

    until(rests, 15, "the backend's rest")
    assert time.monotonic() - left < REST_SECONDS + 1.0  # of which the measurement takes 0.3
    assert busy.chat(max_tokens=2).ok
    assert backend(busy) == process
    assert busy.health()["in_flight"] == 0


def test_prompts_of_disconnected_clients_do_not_delay_others(busy: Proxy) -> None:
    """A place counts as taken until the backend has let go of its request."""
    process = backend(busy)
    bodies = [
        {"messages": [{"role": "user", "content": f"{number} {tiny_models.long_prompt(4000)}"}]}
        for number in range(60)
    ]
    for body in bodies:
        with contextlib.suppress(requests.ReadTimeout):
            requests.post(busy.url + "/v1/chat/completions", json=body, timeout=0.1)
    asked = time.monotonic()
    assert busy.chat(max_tokens=2, timeout=60).ok
    assert time.monotonic() - asked < 20, "the sixty prompts together take minutes"
    until(lambda: busy.health()["in_flight"] == 0, 20, "the end of the abandoned ones")
    assert process.num_threads() < 40


@pytest.mark.parametrize("busy", ["together"], indirect=True)  # else everybody waits
def test_a_request_with_a_seed_is_answered_beside_a_stream(busy: Proxy) -> None:
    with busy.chat(stream=True, max_tokens=3000) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert busy.chat(seed=5, temperature=1.0, max_tokens=3).ok
        assert busy.health()["in_flight"] == 1, "the stream goes on"
