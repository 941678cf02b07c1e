"""Clients that send or read slowly hold nobody up."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import time
from collections.abc import Callable

from tests.support.network import (
    HELLO,
    MAX_BODY,
    PLACES,
    describe,
    head,
    others_are_served,
)
from tests.support.proxy import Proxy
from tests.support.raw_http import connect


def test_two_hundred_idle_and_many_slow_connections_delay_nobody(proxy: Proxy) -> None:
    before = proxy.resident_mib()
    with contextlib.ExitStack() as held, others_are_served(proxy):
        connections = [held.enter_context(connect(proxy.port)) for _ in range(290)]
        for connection in connections[200:230]:  # a head that never ends
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-")
        for connection in connections[230:260]:  # a body that never comes whole
            sent = head("POST", "/v1/chat/completions", content_length=str(MAX_BODY - 1))
            connection.sendall(sent + b" " * (3 << 20))
        for connection in connections[260:290]:
            sent = head("POST", "/v1/chat/completions", transfer_encoding="chunked")
            connection.sendall(sent + b"300000\r\n" + b" " * (3 << 20))
        for byte, connection in itertools.product(b"slowly", connections[200:]):
            connection.sendall(bytes([byte]))
    assert proxy.resident_mib() - before < 100, "60 bodies of 3 MB were held in memory"


def test_clients_that_read_a_byte_a_second_delay_nobody(
    proxy: Proxy, script: Callable[..., None]
) -> None:
    script(events=2000, event_bytes=20_000)
    before = proxy.resident_mib()
    body = json.dumps({**HELLO, "stream": True, "max_tokens": 100_000}).encode()
    sent = head("POST", "/v1/chat/completions", content_length=str(len(body))) + body
    with contextlib.ExitStack() as held:
        slow = []
        for _ in range(PLACES - 1):
            connection = held.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", proxy.port))
            connection.sendall(sent)
            slow.append(connection)
        for connection in slow:
            assert connection.recv(1)  # its answer has begun
        script(events=3, event_bytes=0)
        with others_are_served(proxy):
            for _ in range(2):
                for connection in slow:
                    assert connection.recv(1)
                time.sleep(1)  # what it is about
        assert describe(proxy)["in_flight"] == PLACES - 1
        assert proxy.resident_mib() - before < 32, "40 MB each were waiting for them"


def test_long_answers_that_nobody_reads_take_little_memory(proxy: Proxy) -> None:
    with (proxy.instance / "logs" / "proxy.log").open("a") as file:
        file.write(("x" * 199 + "\n") * 10_000)
    before = proxy.resident_mib()
    sent = head("GET", "/v1/logs?lines=10000", connection="close")
    with contextlib.ExitStack() as held:
        for _ in range(160):
            connection = held.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", proxy.port))
            connection.sendall(sent)
            assert connection.recv(1)
        with others_are_served(proxy):
            grown = proxy.resident_mib() - before
    assert grown < 130, f"{grown} MB of the 320 that wait for them"
