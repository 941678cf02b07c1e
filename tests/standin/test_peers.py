"""The models of another machine, through this one: two real proxies on this machine."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import requests

from mlxproxy.blueprints.app import create_app
from mlxproxy.instance import Instance
from mlxproxy.settings import Settings
from tests.conftest import free_port
from tests.support import model_folders, scripted_server
from tests.support.proxy import Proxy
from tests.support.raw_http import shape
from tests.support.waiting import until

USER = [{"role": "user", "content": "Hello!"}]
OURS, THEIRS = "our-key", "their-key"
SOON = 1.5  # seconds: "within a second", and what the machine takes besides
DIALECTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER, "max_tokens": 4},
    "/v1/completions": {"prompt": "Hello!", "max_tokens": 4},
    "/v1/messages": {"messages": USER, "max_tokens": 4},
    "/v1/responses": {"input": "Hello!", "max_output_tokens": 16},
    "/api/chat": {"messages": USER, "options": {"num_predict": 4}},
    "/api/generate": {"prompt": "Hello!", "options": {"num_predict": 4}},
    "/api/v0/chat/completions": {"messages": USER, "max_tokens": 4},
    "/api/v1/chat": {"input": "Hello!", "max_output_tokens": 4},
}


def auth(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class Two(NamedTuple):
    """The machine that is asked, and the peer that has the models."""

    here: Proxy
    there: Proxy
    program: Path  # that of the peer

    def ask(self, path: str, body: dict[str, Any], **options: Any) -> requests.Response:
        return self.here.post(path, body, headers=auth(OURS), **options)

    def chat(self, model: str, **fields: Any) -> requests.Response:
        body = {"model": model, "messages": USER, "max_tokens": 8, **fields}
        return self.ask("/v1/chat/completions", body, stream=fields.get("stream", False))

    def listed(self) -> dict[str, dict[str, Any]]:
        found = self.here.get("/v1/models", headers=auth(OURS)).json()["data"]
        return {model["id"]: model for model in found}

    def peers(self) -> list[dict[str, Any]]:
        told: dict[str, Any] = self.here.get("/v1/models/loaded", headers=auth(OURS)).json()
        found: list[dict[str, Any]] = told["peers"]
        return found


def configure(instance: Path, **peers: dict[str, str]) -> Path:
    instance.mkdir(parents=True)
    (instance / "config.py").write_text(f"PEERS = {peers!r}\n")
    return instance


def reachable(proxy: Proxy, key: str = OURS) -> bool:
    told = proxy.get("/v1/models/loaded", headers=auth(key)).json()
    return all(peer["reachable"] for peer in told["peers"])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    folder = tmp_path_factory.mktemp("peers")
    for name in ("here/tiny/alpha", "there/tiny/beta", "there/tiny/gamma", "both/tiny/alpha"):
        model_folders.model(folder / name)
    mine = scripted_server.install(folder / "mine")
    theirs = scripted_server.install(folder / "theirs")
    there = Proxy(folder / "b", folder / "there", MLX_SERVER_BIN=theirs, API_KEY=THEIRS)
    instance = configure(folder / "a", studio={"url": there.url, "key": THEIRS})
    here = Proxy(instance, folder / "here", MLX_SERVER_BIN=mine, API_KEY=OURS)
    try:
        there.start()
        here.start()
        until(lambda: reachable(here), what="the peer's first list")
        yield Two(here, there, theirs)
    finally:
        here.clean_up()
        there.clean_up()


@pytest.fixture(autouse=True)
def quick(two: Two) -> None:
    """Each answer is short, unless a test says otherwise."""
    scripted_server.change(two.program, events=8, interval=0.0, drop_after=None, error=None)


def same(data: bytes) -> str:
    """Return an answer without what differs between any two answers."""

    def masked(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: masked(each, key) for key, each in value.items()}
        if isinstance(value, list):
            return [masked(each, name) for each in value]
        is_text = isinstance(value, str) and name not in ("id", "created_at", "item_id")
        is_text = is_text and not name.endswith("_id")
        return value if is_text or isinstance(value, bool) else None

    lines = []
    for line in data.decode().splitlines():
        if line.startswith(":"):
            continue
        start = line.find("{")
        if start < 0:
            lines.append(line)
        else:
            lines.append(line[:start] + json.dumps(masked(json.loads(line[start:]))))
    return "\n".join(lines)


def test_the_models_of_a_peer_are_listed_with_their_state_and_fit(two: Two) -> None:
    models = two.listed()
    assert {"tiny/alpha", "tiny/beta@studio", "tiny/gamma@studio"} == set(models)
    beta = models["tiny/beta@studio"]
    assert beta["peer"] == "studio"
    assert beta["state"] in ("loaded", "not-loaded")
    assert beta["fits"] is True
    one = two.here.get("/v1/models/tiny/beta@studio", headers=auth(OURS)).json()
    assert one["id"] == "tiny/beta@studio"


def test_the_lists_of_other_apis_have_the_models_of_a_peer_too(two: Two) -> None:
    two.ask("/v1/models/load", {"model_id": "tiny/beta@studio"})
    until(lambda: two.listed()["tiny/beta@studio"]["loaded"], what="the new list")
    name, key = "tiny/beta@studio", auth(OURS)
    tags = two.here.get("/api/tags", headers=key).json()["models"]
    assert name in [model["name"] for model in tags]
    v0 = two.here.get("/api/v0/models", headers=key).json()["data"]
    assert {model["id"]: model["state"] for model in v0}[name] == "loaded"
    v1 = two.here.get("/api/v1/models", headers=key).json()["models"]
    assert name in [model["key"] for model in v1]
    assert two.here.get(f"/api/v0/models/{name}", headers=key).json()["id"] == name
    assert "completion" in two.ask("/api/show", {"model": name}).json()["capabilities"]
    assert two.ask("/api/pull", {"model": f"{name}:latest"}).json() == {"status": "success"}
    assert two.ask("/api/show", {"model": "tiny/delta@studio"}).status_code == 404


def test_the_commands_know_the_models_of_a_peer(two: Two) -> None:
    def said(*arguments: str) -> str:
        environment = {**two.here.environment, "MLXPROXY_URL": two.here.url}
        program = [sys.executable, "-m", "mlxproxy", *arguments]
        run = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, run.stderr
        return run.stdout

    assert "Loaded tiny/gamma" in said("load", "gamma@studio")
    until(lambda: two.peers()[0]["loaded"] == ["tiny/gamma@studio"], what="the new list")
    assert "At studio: tiny/gamma@studio" in said("ps")
    row = next(line for line in said("ls").splitlines() if "tiny/gamma@studio" in line)
    assert "loaded" in row
    assert "Unloaded gamma@studio." in said("unload", "gamma@studio")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("path", DIALECTS)
def test_an_answer_is_the_one_that_the_peer_itself_gives(
    two: Two, path: str, streamed: bool
) -> None:
    body = {**DIALECTS[path], "stream": streamed}
    ours = two.ask(path, {**body, "model": "tiny/beta@studio"})
    direct = two.there.post(path, {**body, "model": "tiny/beta"}, headers=auth(THEIRS))
    assert ours.status_code == direct.status_code == 200
    assert ours.headers["X-Mlxproxy-Peer"] == "studio"
    assert ours.headers["Content-Type"] == direct.headers["Content-Type"]
    assert b"beta0" in ours.content
    assert same(ours.content) == same(direct.content)


def test_a_model_that_only_the_peer_has_needs_no_name_of_the_peer(two: Two) -> None:
    answer = two.chat("tiny/beta")
    assert answer.json()["model"] == "tiny/beta"
    assert answer.headers["X-Mlxproxy-Peer"] == "studio"
    here = two.chat("tiny/alpha")
    assert here.json()["model"] == "tiny/alpha"
    assert "X-Mlxproxy-Peer" not in here.headers


def test_a_stream_arrives_piece_by_piece(two: Two) -> None:
    scripted_server.change(two.program, events=600, interval=0.1)
    stream = two.chat("tiny/beta@studio", stream=True, max_tokens=600)
    lines = stream.iter_lines()
    until(lambda: b"beta1" in next(lines), what="the second of 600 tokens")
    stream.close()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_ends_the_answer_at_the_peer(two: Two, streamed: bool) -> None:
    scripted_server.change(two.program, events=600, interval=0.1)
    gone = ended(two, "client_gone")
    connection = http.client.HTTPConnection("127.0.0.1", two.here.port, timeout=20)
    body = {"model": "tiny/beta@studio", "messages": USER, "max_tokens": 600, "stream": streamed}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), auth(OURS))
    until(lambda: two.peers()[0]["in_flight"] == 1, what="the answer")
    until(lambda: busy_there(two), what="the answer at the peer")
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    until(lambda: ended(two, "client_gone") > gone, what="the end of the generation at the peer")
    until(lambda: two.peers()[0]["in_flight"] == 0, what="the end of the answer here")


def busy_there(two: Two) -> bool:
    told = two.there.get("/v1/models/loaded", headers=auth(THEIRS)).json()
    return bool(told["in_flight"] == 1)


def ended(two: Two, how: str) -> int:
    entries = scripted_server.record(two.program, "finished")
    return sum(entry["how"] == how for entry in entries)


def test_an_answer_from_a_peer_is_listed_and_somebody_can_end_it(two: Two) -> None:
    scripted_server.change(two.program, events=600, interval=0.1)
    stream = two.chat("tiny/beta@studio", stream=True, max_tokens=600)
    lines = stream.iter_lines()
    until(lambda: b"beta1" in next(lines), what="the second token")
    (answer,) = two.here.get("/v1/events?follow=false", headers=auth(OURS)).json()["answers"]
    assert answer["model"] == "tiny/beta@studio"
    url = f"{two.here.url}/v1/answers/{answer['name']}"
    assert requests.delete(url, headers=auth(OURS), timeout=10).ok
    rest = [line for line in lines if line.startswith(b"data: ")]
    assert shape(json.loads(rest[-1][6:]))["code"] == "answer_ended"


def test_loads_and_unloads_reach_the_peer_and_ps_knows_what_is_loaded_there(two: Two) -> None:
    loaded = two.ask("/v1/models/load", {"model_id": "tiny/gamma@studio"})
    assert (loaded.status_code, loaded.json()["id"]) == (200, "tiny/gamma")
    until(lambda: two.peers()[0]["loaded"] == ["tiny/gamma@studio"], what="the new list")
    assert two.listed()["tiny/gamma@studio"]["state"] == "loaded"
    events = two.ask("/v1/models/load", {"model_id": "tiny/beta@studio", "stream": True}).text
    assert '"status":"loaded"' in events.replace(" ", "")
    until(lambda: two.peers()[0]["loaded"] == ["tiny/beta@studio"], what="the next list")
    gone = two.ask("/v1/models/unload", {"model_id": "tiny/beta@studio"})
    assert gone.json() == {"status": "unloaded"}
    until(lambda: two.peers()[0]["loaded"] == [], what="the last list")


def test_the_metrics_have_a_label_for_the_peer(two: Two) -> None:
    two.chat("tiny/beta@studio")
    text = two.here.get("/metrics", headers=auth(OURS)).text
    assert 'mlxproxy_peer_up{peer="studio"} 1.0' in text
    assert 'mlxproxy_peer_in_flight{peer="studio"} 0.0' in text
    assert 'mlxproxy_first_token_seconds_count{model="tiny/beta@studio"}' in text


@pytest.mark.parametrize("path", DIALECTS)
def test_an_error_says_which_machine_it_is_from(two: Two, path: str) -> None:
    scripted_server.change(two.program, error="the GPU has melted", error_status=500)
    refused = two.ask(path, {**DIALECTS[path], "model": "tiny/beta@studio", "stream": False})
    error = refused.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    assert refused.status_code >= 400
    assert message.startswith("studio: ")


def test_a_model_that_the_peer_does_not_have_is_not_found(two: Two) -> None:
    refused = two.chat("tiny/delta@studio")
    assert refused.status_code == 404
    assert shape(refused.json())["code"] == "model_not_found"


def test_a_peer_does_not_answer_with_another_model_than_the_one_asked_for(two: Two) -> None:
    body = {"model": "tiny/gone", "messages": USER}
    asked = {**auth(THEIRS), "X-Mlxproxy-Hops": "1"}
    refused = two.there.post("/v1/chat/completions", body, headers=asked)
    assert refused.status_code == 404
    assert shape(refused.json())["code"] == "model_not_found"


# -- keys


class Recorder:
    """A peer that keeps what it is sent: it lists one model and answers nothing of use."""

    def __init__(self, listing: bytes, reply: bytes, pause: float = 0.0) -> None:
        self.heads: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._listing, self._reply, self._pause = listing, reply, pause
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            head = connection.recv(1 << 16)
            self.heads.append(head)
            lists = head.startswith(b"GET /v1/models ")
            if not lists and self._pause:
                time.sleep(self._pause)
            connection.sendall(self._listing if lists else self._reply)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def fake(two: Two) -> Iterator[Callable[..., Recorder]]:
    """Start peers that list what the real one does, and then answer with these bytes."""
    opened: list[Recorder] = []
    body = two.there.get("/v1/models", headers=auth(THEIRS)).content
    listing = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)

    def starter(reply: bytes, listing: bytes = listing, pause: float = 0.0) -> Recorder:
        opened.append(Recorder(listing, reply, pause))
        return opened[-1]

    yield starter
    for one in opened:
        one.close()


def small(start: Callable[..., Proxy], tmp_path: Path, **peers: dict[str, str]) -> Proxy:
    """Start a proxy with one model and these peers."""
    model_folders.model(tmp_path / "small" / "tiny" / "alpha")
    program = scripted_server.install(tmp_path / "bin")
    instance = configure(tmp_path / "c", **peers)
    return start(tmp_path / "small", instance=instance, MLX_SERVER_BIN=program, API_KEY=OURS)


def asked_of(proxy: Proxy, model: str, **fields: Any) -> requests.Response:
    body = {"model": model, "messages": USER, "max_tokens": 4, **fields}
    return proxy.post("/v1/chat/completions", body, headers=auth(OURS), timeout=30)


def test_neither_our_key_nor_a_clients_header_reaches_a_peer(
    start: Callable[..., Proxy], tmp_path: Path, fake: Callable[..., Recorder]
) -> None:
    peer = fake(b"HTTP/1.1 500 X\r\nContent-Length: 2\r\n\r\n{}")
    url = {"url": peer.url, "key": THEIRS}
    proxy = small(start, tmp_path, studio=url)
    until(lambda: reachable(proxy), what="the list")
    headers = {"X-Api-Key": OURS, "Cookie": "secret=1", "X-Request-Id": "abc"}
    body = {"model": "tiny/beta@studio", "messages": USER}
    proxy.post("/v1/chat/completions", body, headers=headers)
    sent = b"".join(peer.heads)
    assert OURS.encode() not in sent
    assert b"secret" not in sent
    post = next(head for head in peer.heads if head.startswith(b"POST"))
    assert b"Authorization: Bearer their-key\r\n" in post
    assert b"X-Request-Id: abc\r\n" in post
    assert b"X-Mlxproxy-Hops: 1\r\n" in post


def test_a_key_that_the_peer_rejects_is_not_the_clients_fault(
    start: Callable[..., Proxy], tmp_path: Path, two: Two
) -> None:
    proxy = small(start, tmp_path, studio={"url": two.there.url, "key": "wrong"})
    until(lambda: "key" in peers_of(proxy)[0]["reason"], what="the refusal")
    refused = asked_of(proxy, "tiny/beta@studio")
    assert refused.status_code == 502
    assert 'check its "key" in PEERS' in shape(refused.json())["message"]


def peers_of(proxy: Proxy) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = proxy.get("/v1/models/loaded", headers=auth(OURS)).json()["peers"]
    return found


# -- peers that are down, slow, talk nonsense or go round in circles


def test_a_peer_that_is_down_is_an_error_at_once_and_the_others_go_on(
    start: Callable[..., Proxy], tmp_path: Path, two: Two
) -> None:
    down = {"url": f"http://127.0.0.1:{free_port()}"}
    proxy = small(start, tmp_path, mini=down, studio={"url": two.there.url, "key": THEIRS})
    until(lambda: peers_of(proxy)[1]["reachable"], what="the list of the other")
    begun = time.monotonic()
    refused = asked_of(proxy, "tiny/beta@mini")
    assert time.monotonic() - begun < SOON
    assert refused.status_code == 502
    error = shape(refused.json())
    assert error["code"] == "peer_unavailable"
    assert error["message"].startswith(f"The peer mini ({down['url']}) does not accept connections")
    assert asked_of(proxy, "tiny/beta@studio").ok
    assert asked_of(proxy, "tiny/alpha").ok


def test_every_call_that_names_a_model_reaches_the_peer_that_it_names(
    start: Callable[..., Proxy], tmp_path: Path
) -> None:
    proxy = small(start, tmp_path, mini={"url": f"http://127.0.0.1:{free_port()}"})
    parts: Any = SimpleNamespace(settings=Settings(instance_path=tmp_path))
    rules = create_app(parts).url_map.iter_rules()
    calls = [rule for rule in rules if "POST" in (rule.methods or ()) and not rule.arguments]
    paths = sorted(rule.rule for rule in calls)
    assert len(paths) > 15
    name = "tiny/beta@mini"
    body = {"model": name, "model_id": name, "instance_id": name, "messages": USER, "prompt": "Hi"}
    for path in paths:
        refused = proxy.post(path, {**body, "max_tokens": 4}, headers=auth(OURS))
        assert refused.status_code == 502, path
        assert "The peer mini" in refused.text, path


def test_a_peer_that_vanishes_is_an_error_at_once_and_leaves_the_list(
    start: Callable[..., Proxy], tmp_path: Path, fake: Callable[..., Recorder]
) -> None:
    peer = fake(b"")
    proxy = small(start, tmp_path, studio={"url": peer.url})
    until(lambda: reachable(proxy), what="the list")
    peer.close()
    begun = time.monotonic()
    refused = asked_of(proxy, "tiny/beta@studio")
    assert time.monotonic() - begun < SOON
    assert shape(refused.json())["code"] == "peer_unavailable"
    until(lambda: not reachable(proxy), what="the loss of the peer")
    listed = proxy.get("/v1/models", headers=auth(OURS)).json()["data"]
    assert [model["id"] for model in listed] == ["tiny/alpha"]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"", "closed the connection without an answer"),
        (b"220 smtp.local\r\n\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", "before the answer was complete"),
        (b"HTTP/1.1 401 X\r\nContent-Length: 0\r\n\r\n", 'check its "key" in PEERS'),
        (b"HTTP/1.1 500 X\r\nContent-Length: 6\r\n\r\n<html>", "an error that is not mlxproxy's"),
    ],
)
def test_nonsense_is_an_error_that_names_the_peer(
    start: Callable[..., Proxy],
    tmp_path: Path,
    fake: Callable[..., Recorder],
    reply: bytes,
    words: str,
) -> None:
    proxy = small(start, tmp_path, studio={"url": fake(reply).url})
    until(lambda: reachable(proxy), what="the list")
    refused = asked_of(proxy, "tiny/beta@studio")
    error = shape(refused.json())
    assert refused.status_code >= 500
    assert error["code"] == "peer_unavailable"
    assert "The peer studio" in error["message"]
    assert words in error["message"]


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n"
PIECE = b"data: {}\n\ndata: {"


@pytest.mark.parametrize(
    ("path", "kind", "last"),
    [
        ("/v1/chat/completions", b"text/event-stream", b'data: {"error"'),
        ("/v1/messages", b"text/event-stream", b'data: {"type"'),
        ("/v1/responses", b"text/event-stream", b'data: {"type"'),
        ("/api/chat", b"application/x-ndjson", b'{"error"'),
        ("/api/v1/chat", b"text/event-stream", b'data: {"type"'),
    ],
)
def test_a_stream_that_the_peer_cuts_ends_with_an_error_in_the_words_of_its_api(
    start: Callable[..., Proxy],
    tmp_path: Path,
    fake: Callable[..., Recorder],
    path: str,
    kind: bytes,
    last: bytes,
) -> None:
    piece = b"{}\n{" if b"json" in kind else PIECE
    peer = fake(HEAD % kind + b"%x\r\n%b\r\n" % (len(piece), piece))
    proxy = small(start, tmp_path, studio={"url": peer.url})
    until(lambda: reachable(proxy), what="the list")
    body = {**DIALECTS[path], "model": "tiny/beta@studio", "stream": True}
    data = proxy.post(path, body, headers=auth(OURS)).content
    passed = piece[: piece.index(b"{}") + (3 if b"json" in kind else 4)]
    assert data.startswith(passed)  # all whole parts, and nothing of the one that is cut off
    rest = data.removeprefix(passed)
    assert last in rest
    assert b"The peer studio" in rest
    for line in rest.splitlines():
        if line and not line.startswith(b"event:"):
            json.loads(line.removeprefix(b"data: "))


def test_a_slow_peer_slows_nobody_else(
    start: Callable[..., Proxy], tmp_path: Path, fake: Callable[..., Recorder], pool: Any
) -> None:
    peer = fake(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", pause=5.0)
    proxy = small(start, tmp_path, studio={"url": peer.url})
    until(lambda: reachable(proxy), what="the list")
    assert asked_of(proxy, "tiny/alpha").ok
    slow = [pool.submit(asked_of, proxy, "tiny/beta@studio") for _ in range(40)]
    until(lambda: peers_of(proxy)[0]["in_flight"] == 32, what="the most that one peer may have")
    begun = time.monotonic()
    assert asked_of(proxy, "tiny/alpha").ok
    assert time.monotonic() - begun < SOON
    statuses = [each.result().status_code for each in slow]
    assert sorted(set(statuses)) == [200, 429]
    assert statuses.count(429) == 8


def test_two_machines_that_name_each_other_go_round_in_no_circle(
    start: Callable[..., Proxy], tmp_path: Path
) -> None:
    program = scripted_server.install(tmp_path / "bin")
    for name in ("left", "right"):
        model_folders.model(tmp_path / name / "tiny" / name)
    ports = {"left": free_port(), "right": free_port()}
    other = {"left": "right", "right": "left"}
    proxies = {}
    for name, port in ports.items():
        peer = {other[name]: {"url": f"http://127.0.0.1:{ports[other[name]]}"}}
        instance = configure(tmp_path / f"i-{name}", **peer)
        proxies[name] = start(
            tmp_path / name, instance=instance, MLX_SERVER_BIN=program, PROXY_PORT=port
        )
    left, right = proxies["left"], proxies["right"]
    until(lambda: reachable(left) and reachable(right), what="both lists")

    def ids(proxy: Proxy) -> set[str]:
        return {model["id"] for model in proxy.get("/v1/models").json()["data"]}

    assert ids(left) == {"tiny/left", "tiny/right@right"}  # and nothing of its own by way of it
    assert ids(right) == {"tiny/right", "tiny/left@left"}
    assert asked_of(left, "tiny/right@right").json()["model"] == "tiny/right"
    begun = time.monotonic()
    round_trip = requests.post(
        f"{right.url}/v1/chat/completions",
        json={"model": "tiny/left@left", "messages": USER},
        headers={"X-Mlxproxy-Hops": "1"},
        timeout=10,
    )
    assert time.monotonic() - begun < SOON
    assert round_trip.status_code == 508
    assert shape(round_trip.json())["code"] == "peer_loop"


def test_without_peers_there_is_neither_a_field_nor_a_thread(
    start: Callable[..., Proxy], tmp_path: Path
) -> None:
    proxy = small(start, tmp_path)
    headers = auth(OURS)
    assert "peers" not in proxy.get("/v1/models/loaded", headers=headers).json()
    assert "mlxproxy_peer" not in proxy.get("/metrics", headers=headers).text


def test_a_stop_lets_an_answer_from_a_peer_finish(
    start: Callable[..., Proxy], tmp_path: Path, fake: Callable[..., Recorder], pool: Any
) -> None:
    peer = fake(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", pause=2.0)
    proxy = small(start, tmp_path, studio={"url": peer.url})
    until(lambda: reachable(proxy), what="the list")
    asked = pool.submit(asked_of, proxy, "tiny/beta@studio")
    until(lambda: peers_of(proxy)[0]["in_flight"] == 1, what="the answer")
    assert proxy.stop() == 0
    assert asked.result().content.strip() == b"{}"


def test_a_peer_does_not_log_each_time_it_is_asked_for_its_list(two: Two) -> None:
    log = Instance(two.there.instance).log("proxy")
    headers = {**auth(THEIRS), "X-Mlxproxy-Hops": "1", "X-Request-Id": "asked-by-a-peer"}
    assert two.there.get("/v1/models", headers=headers).ok
    headers = {**auth(THEIRS), "X-Request-Id": "asked-by-a-client"}
    assert two.there.get("/v1/models", headers=headers).ok
    until(
        lambda: log.exists() and "asked-by-a-client" in log.read_text(),
        what="the line of the client",
    )
    assert "asked-by-a-peer" not in log.read_text()
