"""Clients on the network, with keys: what they send, and what they and the proxy's owner see."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import requests

from tests.support.proxy import Proxy
from tests.support.raw_http import Answer, answers, connect, received, shape
from tests.support.waiting import until

ALICE, BOB, CARLA = "key-of-alice", "key-of-bob", "key-of-carla"  # the last from the key file
WRONG = "key-of-nobody"
PLACES = QUEUE = 4
MAX_BODY = 4 << 20
PAGE, STRANGER = "https://chat.example", "https://evil.example"
PROMPT = "PROMPT-THAT-NOBODY-ELSE-MAY-READ"
PLACE = "/opt/private/models/x"  # a path that no client may read
FORGED = "12:00:00 INFO    mlxproxy.request: id=forged client=1.2.3.4 status=200"
HELLO = {"messages": [{"role": "user", "content": "Hello!"}]}
# Every route of the application, and paths that are not routes.
CALLS = [
    ("GET", "/v1/models"),
    ("HEAD", "/v1/models"),
    ("GET", "/v1/models/tiny/alpha"),
    ("GET", "/v1/models/loaded"),
    ("POST", "/v1/models/load"),
    ("POST", "/v1/models/unload"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/responses/tiny/alpha"),
    ("DELETE", "/v1/responses/tiny/alpha"),
    ("GET", "/v1/responses/tiny/alpha/input_items"),
    ("POST", "/api/chat"),
    ("POST", "/api/generate"),
    ("POST", "/api/show"),
    ("POST", "/api/pull"),
    ("POST", "/api/embed"),
    ("POST", "/v1/embeddings"),
    ("POST", "/embeddings"),
    ("POST", "/v1/score"),
    ("POST", "/score"),
    ("POST", "/v1/rerank"),
    ("POST", "/v2/rerank"),
    ("POST", "/rerank"),
    ("POST", "/api/embeddings"),
    ("GET", "/api/tags"),
    ("HEAD", "/api/tags"),
    ("GET", "/api/ps"),
    ("GET", "/api/version"),
    ("GET", "/api/v0/models"),
    ("GET", "/api/v0/models/tiny/alpha"),
    ("POST", "/api/v0/chat/completions"),
    ("POST", "/api/v0/completions"),
    ("GET", "/api/v1/models"),
    ("POST", "/api/v1/chat"),
    ("POST", "/api/v1/models/load"),
    ("POST", "/api/v1/models/unload"),
    ("GET", "/models"),
    ("GET", "/models/tiny/alpha"),
    ("GET", "/models/loaded"),
    ("POST", "/models/load"),
    ("POST", "/models/unload"),
    ("POST", "/chat/completions"),
    ("POST", "/completions"),
    ("GET", "/v1/logs"),
    ("GET", "/v1/events"),
    ("GET", "/v1/addresses"),
    ("DELETE", "/v1/answers/tiny/alpha"),
    ("GET", "/metrics"),
    ("GET", "/"),
    ("GET", "/page/tiny/alpha"),
    ("GET", "/nothing"),
    ("OPTIONS", "/v1/models"),
    ("DELETE", "/v1/models"),
]


def is_refusal(path: str, body: dict[str, Any], code: str) -> bool:
    """Return whether a body reports the code in the shape of the path's dialect, if that can."""
    if path.startswith("/v1/messages"):
        is_key = code == "invalid_api_key"
        kind = "authentication_error" if is_key else "permission_error"
        return (body["type"], body["error"]["type"]) == ("error", kind)
    if path.startswith(("/api/v0/", "/api/v1/")):
        return bool(body["error"]["code"] == code and body["error"]["message"])
    if path.startswith("/api/"):
        return isinstance(body["error"], str) and list(body) == ["error"]
    error = shape(body)
    return (error["code"], error["type"]) == (code, "invalid_request_error")


def exchange(proxy: Proxy, sent: bytes) -> list[Answer]:
    """Return the answers to these bytes, read until the proxy closes the connection."""
    with connect(proxy.port) as connection:
        with contextlib.suppress(ConnectionError):  # an early answer may end the sending
            connection.sendall(sent)
        return answers(received(connection))


def head(method: str, path: str, version: str = "1.1", **headers: str) -> bytes:
    """Return a request's head, with a key and a Host unless other values are given."""
    given = {"host": "localhost", "authorization": f"Bearer {ALICE}", **headers}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in given.items() if value]
    return "\r\n".join([f"{method} {path} HTTP/{version}", *lines, "", ""]).encode("latin-1")


def ask(
    proxy: Proxy, method: str, path: str, key: str | None = ALICE, **kwargs: Any
) -> requests.Response:
    headers = {**({"Authorization": f"Bearer {key}"} if key else {}), **kwargs.pop("headers", {})}
    kwargs.setdefault("timeout", 20)
    return requests.request(method, proxy.url + path, headers=headers, **kwargs)


def chat(proxy: Proxy, key: str = ALICE, **fields: Any) -> requests.Response:
    headers = fields.pop("headers", {})
    body = {**HELLO, **fields}
    stream = body.get("stream", False)
    return ask(
        proxy, "POST", "/v1/chat/completions", key, json=body, headers=headers, stream=stream
    )


def describe(proxy: Proxy) -> dict[str, Any]:
    answer: dict[str, Any] = ask(proxy, "GET", "/v1/models/loaded").json()
    return answer


def written(proxy: Proxy) -> str:
    """Return everything that the proxy has printed and logged, including the backend's log."""
    log(proxy)
    files = [proxy.output, *(proxy.instance / "logs").iterdir()]
    return "\n".join(file.read_text(errors="replace") for file in files)


def log(proxy: Proxy) -> str:
    """Return the proxy's log, with everything that has happened so far."""
    file = proxy.instance / "logs" / "proxy.log"
    marker = f"marker-{time.monotonic_ns()}"
    ask(proxy, "GET", "/nothing", headers={"X-Request-Id": marker})
    until(lambda: marker in file.read_text(), what="the log's last line")
    return file.read_text()


def lines_of(proxy: Proxy, request_id: str) -> list[str]:
    """Return the lines about that request in the log."""
    return [line for line in log(proxy).splitlines() if f"id={request_id} " in line]


def figures(line: str) -> dict[str, str]:
    """Return the name=value pairs of a log line."""
    return dict(pair.split("=", 1) for pair in line.partition("mlxproxy.request: ")[2].split(" "))


@contextlib.contextmanager
def others_are_served(proxy: Proxy, within: float = 1.0) -> Iterator[None]:
    """Request health and answers all the while; each must arrive in time."""
    over = threading.Event()
    taken: list[float] = []

    def customer() -> None:
        while True:
            for call in (lambda: ask(proxy, "GET", "/health"), lambda: chat(proxy, BOB)):
                begun = time.monotonic()
                assert call().status_code == 200
                taken.append(time.monotonic() - begun)
            if over.is_set():
                return

    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        main = executor.submit(customer)
        try:
            yield
        finally:
            over.set()
            main.result()
    assert max(taken) < within, f"one of {len(taken)} took {max(taken):.2f} s"
