"""What may come over the network, and what may go out: keys, pages, sizes, slowness, errors, logs.

One proxy over the scripted stand-in serves the whole file; SECURITY.md says what each test is for.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import logging
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import psutil
import pytest
import requests

from mlxproxy import main
from mlxproxy.blueprints.app import create_app
from mlxproxy.blueprints.auth import Access
from mlxproxy.catalog import Catalog
from mlxproxy.errors import NoModelLoaded
from mlxproxy.observability import logs
from mlxproxy.observability.events import EventBus
from mlxproxy.observability.metrics import Metrics
from mlxproxy.server import channel
from mlxproxy.settings import Settings
from tests.conftest import Proxy, until
from tests.support import scripted_server
from tests.support.wire import Alone, Answer, answers, received, shape

pytestmark = [pytest.mark.standin, pytest.mark.xdist_group("network")]

ALICE, BOB, CARLA = "key-of-alice", "key-of-bob", "key-of-carla"  # the last from the key file
WRONG = "key-of-nobody"
PLACES = QUEUE = 4
MAX_BODY = 4 << 20
PAGE, STRANGER = "https://chat.example", "https://evil.example"
PROMPT = "PROMPT-THAT-NOBODY-ELSE-MAY-READ"
HELLO = {"messages": [{"role": "user", "content": "Hello!"}]}
# Every route of the application, and paths that are none.
CALLS = [
    ("GET", "/v1/models"),
    ("HEAD", "/v1/models"),
    ("GET", "/v1/models/tiny/alpha"),
    ("GET", "/v1/models/loaded"),
    ("POST", "/v1/models/load"),
    ("POST", "/v1/models/unload"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/logs"),
    ("GET", "/v1/events"),
    ("GET", "/metrics"),
    ("GET", "/"),
    ("GET", "/nothing"),
    ("OPTIONS", "/v1/models"),
    ("DELETE", "/v1/models"),
]
NEARLY_HEALTH = [
    "/health/",
    "/HEALTH",
    "/health;x",
    "/health%2f",
    "/health/../v1/models",
    "/v1/models?/health",
    "/v1/models;/health",
    "/v1/../health/v1/models",
]


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), 10)


def exchange(proxy: Proxy, sent: bytes) -> list[Answer]:
    """The answers to these bytes, until the proxy closes the connection."""
    with connect(proxy) as connection:
        with contextlib.suppress(ConnectionError):  # an early answer may end the sending
            connection.sendall(sent)
        return answers(received(connection))


def head(method: str, path: str, version: str = "1.1", **headers: str) -> bytes:
    """A request's head, with a key and a Host unless told otherwise."""
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
    """All that the proxy has said and logged, the backend's log included."""
    log(proxy)
    files = [proxy.output, *(proxy.instance / "logs").iterdir()]
    return "\n".join(file.read_text(errors="replace") for file in files)


def log(proxy: Proxy) -> str:
    """The proxy's log, with all that has happened so far."""
    file = proxy.instance / "logs" / "proxy.log"
    marker = f"marker-{time.monotonic_ns()}"
    ask(proxy, "GET", "/nothing", headers={"X-Request-Id": marker})
    until(lambda: marker in file.read_text(), what="the log's last line")
    return file.read_text()


def lines_of(proxy: Proxy, request_id: str) -> list[str]:
    """The lines about that request in the log."""
    return [line for line in log(proxy).splitlines() if f"id={request_id} " in line]


def figures(line: str) -> dict[str, str]:
    """The name=value pairs of a log line."""
    return dict(pair.split("=", 1) for pair in line.partition("mlxproxy.request: ")[2].split(" "))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted_server.install(tmp_path_factory.mktemp("standin"))


@pytest.fixture(scope="module")
def shared(
    models: Path, program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    root = tmp_path_factory.mktemp("network")
    keys = root / "keys"
    keys.touch(0o600)
    keys.write_text(CARLA + "\n")
    proxy = Proxy(
        root / "instance",
        models,
        MLX_SERVER_BIN=program,
        API_KEY=f"{ALICE},{BOB}",
        API_KEY_FILE=keys,
        ALLOWED_ORIGINS=PAGE,
        TRUSTED_HOSTS="llm.example",
        MAX_BODY=MAX_BODY,
        MAX_CONCURRENT=PLACES,
        MAX_QUEUE=QUEUE,
    )
    yield proxy.start()
    proxy.clean_up()


@pytest.fixture
def script(program: Path) -> Iterator[Callable[..., None]]:
    """Changes what the stand-in does, for one test."""
    scripted_server.change(program, **scripted_server.SCRIPT)
    yield lambda **changes: scripted_server.change(program, **changes)
    scripted_server.change(program, **scripted_server.SCRIPT)


@pytest.fixture
def proxy(shared: Proxy, script: Callable[..., None]) -> Proxy:
    """The proxy, with a model loaded and nobody on it."""
    loaded = ask(shared, "POST", "/v1/models/load", json={"model_id": "tiny/alpha"})
    assert loaded.status_code == 200, loaded.text
    until(lambda: not describe(shared)["in_flight"], what="the end of earlier answers")
    return shared


@pytest.fixture
def pool() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(32) as executor:
        yield executor


@contextlib.contextmanager
def others_are_served(proxy: Proxy, within: float = 1.0) -> Iterator[None]:
    """Asks for health and for answers all the while; each must come in time."""
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


def memory(proxy: Proxy) -> int:
    """The proxy's resident memory in MiB."""
    assert proxy.process is not None
    return int(psutil.Process(proxy.process.pid).memory_info().rss >> 20)


# -- keys


def test_all_routes_are_asked_here() -> None:
    """The tests below know every route there is."""
    parts: Any = SimpleNamespace(settings=Settings(instance_path=Path("/nowhere")))
    routes = {
        re.sub("<.*>", "tiny/alpha", rule.rule) for rule in create_app(parts).url_map.iter_rules()
    }
    assert routes == {path for _, path in CALLS if path not in ("/", "/nothing")} | {"/health"}


@pytest.mark.parametrize("key", [None, WRONG], ids=["no key", "a wrong key"])
def test_every_path_but_health_needs_a_key(proxy: Proxy, key: str | None) -> None:
    for method, path in [*CALLS, *(("GET", path) for path in NEARLY_HEALTH)]:
        answer = ask(proxy, method, path, key, data="{}")
        assert answer.status_code == 401, (method, path)
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        if method != "HEAD":
            assert shape(answer.json())["code"] == "invalid_api_key"
            assert answer.json()["error"]["type"] == "invalid_request_error"
    assert describe(proxy)["id"] == "tiny/alpha", "the unload was refused"


@pytest.mark.parametrize("key", [ALICE, BOB, CARLA])
def test_every_key_opens_by_either_header(proxy: Proxy, key: str) -> None:
    assert ask(proxy, "GET", "/v1/models", key).ok
    assert ask(proxy, "GET", "/v1/models", None, headers={"x-api-key": key}).ok


def test_the_openai_package_tells_a_wrong_key_as_such(proxy: Proxy) -> None:
    client = openai.OpenAI(base_url=proxy.url + "/v1", api_key=WRONG, max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"
    client = openai.OpenAI(base_url=proxy.url + "/v1", api_key=ALICE, max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny/alpha", "tiny/beta"]


@pytest.mark.parametrize("key", [None, WRONG], ids=["no key", "a wrong key"])
def test_health_without_the_key_shows_no_paths(proxy: Proxy, models: Path, key: str | None) -> None:
    answer = ask(proxy, "GET", "/health", key)
    assert answer.json() == {
        "proxy": "ok",
        "backend": "ok",
        "model_id": "tiny/alpha",
        "enable_thinking": False,
    }
    assert ask(proxy, "GET", "/health").json()["model_id"] == str(models / "tiny" / "alpha")


def test_a_key_given_to_make_is_in_no_environment_but_the_proxys(tmp_path: Path) -> None:
    """make exports what stands on its command line, also under names that are not ours."""
    root = Path(__file__).parents[2]
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nenv\n")
    program.chmod(0o755)
    for stamp in (".installed", ".dev"):
        (tmp_path / stamp).touch()
    done = subprocess.run(
        ["make", "run", f"VENV={tmp_path}", f"API_KEY={ALICE}"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    holding = [line.partition("=")[0] for line in done.stdout.splitlines() if ALICE in line]
    assert holding == ["MLXPROXY_API_KEY"]


@pytest.mark.parametrize(
    ("host", "keys", "told"),
    [
        ("0.0.0.0", (), True),
        ("192.168.1.5", (), True),
        ("::", (), True),
        ("127.0.0.1", (), False),
        ("::1", (), False),
        ("0.0.0.0", ("k",), False),
    ],
)
def test_the_start_says_who_can_reach_what(
    host: str, keys: tuple[str, ...], told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    parts: Any = SimpleNamespace(catalog=Catalog(()), roots=(), access=Access(keys=keys))
    main._announce(parts, (host, 8080))
    said = capsys.readouterr().out
    assert ("anyone on your network" in said) is told
    assert ("API_KEY" in said) is told
    assert "k" not in keys or "Bearer $KEY" in said


# -- browsers


@pytest.mark.parametrize("origin", [STRANGER, "null", "http://localhost.evil.example"])
def test_a_page_from_elsewhere_is_refused_on_every_path(proxy: Proxy, origin: str) -> None:
    preflight = {"Access-Control-Request-Method": "POST"}
    for method, path in [*CALLS, ("GET", "/health"), ("OPTIONS", "/health")]:
        for more in ({}, preflight) if method == "OPTIONS" else ({},):
            answer = ask(proxy, method, path, data="{}", headers={"Origin": origin, **more})
            assert answer.status_code == 403, (method, path)
            assert not any(name.startswith("Access-Control") for name in answer.headers)
            if method != "HEAD":
                assert shape(answer.json())["code"] == "origin_not_allowed"
    assert describe(proxy)["id"] == "tiny/alpha"


EMBEDDED = [("no-cors", "image"), ("no-cors", "script"), ("navigate", "iframe"), ("cors", "empty")]


@pytest.mark.parametrize("site", ["cross-site", "same-site", "none, cross-site", "?"])
@pytest.mark.parametrize(("mode", "kind"), EMBEDDED)
def test_what_a_strange_page_embeds_is_refused_on_every_path(
    proxy: Proxy, site: str, mode: str, kind: str
) -> None:
    """Such a request tells no Origin: an image, a script, a frame."""
    fetch = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": kind}
    headers = {"Host": "llm.example", **fetch}  # where same-site may be another machine
    for method, path in [*CALLS, ("GET", "/health")]:
        answer = ask(proxy, method, path, headers=headers, data="{}")
        assert answer.status_code == 403, (method, path)
        if method != "HEAD":
            assert shape(answer.json())["code"] == "origin_not_allowed"
    assert describe(proxy)["id"] == "tiny/alpha"


def test_pages_of_this_machine_and_of_allowed_origins_say_where_they_are_and_are_served(
    proxy: Proxy,
) -> None:
    for headers in (
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"},  # an address that was typed
        {"Sec-Fetch-Site": "same-site"},  # of http://localhost:5173 to http://localhost:8080
        {"Sec-Fetch-Site": "cross-site", "Origin": PAGE},
        {"Sec-Fetch-Site": "cross-site", "Origin": "http://127.0.0.1:5173"},
    ):
        host = {"Host": "localhost:8080"}
        assert ask(proxy, "GET", "/v1/models", headers={**headers, **host}).ok, headers
        assert chat(proxy, headers={**headers, **host}).ok, headers


def test_a_link_on_a_strange_page_leads_to_what_changes_nothing_and_ends(proxy: Proxy) -> None:
    link = {
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "navigate",
        "Sec-Fetch-Dest": "document",
    }
    for path in ("/health", "/v1/models", "/v1/models/loaded", "/metrics"):
        assert ask(proxy, "GET", path, headers=link).ok, path
    for path in ("/v1/events", "/v1/logs", "/v1/logs?follow=true", "/v1/events?follow=false"):
        assert ask(proxy, "GET", path, headers=link).status_code == 403, path
    for path in ("/v1/models/unload", "/v1/models/load", "/v1/models"):
        assert ask(proxy, "POST", path, headers=link, data="").status_code == 403, path


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_simple_post_from_a_strange_page_does_nothing(
    proxy: Proxy, program: Path, kind: str | None
) -> None:
    """What a page may send without asking first."""
    headers = {"Origin": STRANGER, **({"Content-Type": kind} if kind else {})}
    before = describe(proxy)
    seen = len(scripted_server.record(program, "request"))
    for path, body in [
        ("/v1/models/unload", ""),
        ("/v1/models/load", '{"model_id": "tiny/beta"}'),
        ("/v1/chat/completions", json.dumps(HELLO)),
    ]:
        assert ask(proxy, "POST", path, data=body, headers=headers).status_code == 403
    after = describe(proxy)
    assert (after["pid"], after["loaded_at"]) == (before["pid"], before["loaded_at"])
    assert len(scripted_server.record(program, "request")) == seen


def test_a_preflight_of_an_allowed_page_is_answered_without_a_key(proxy: Proxy) -> None:
    for method, path in CALLS:
        headers = {
            "Origin": PAGE,
            "Access-Control-Request-Method": method,
            "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
        }
        answer = ask(proxy, "OPTIONS", path, None, headers=headers)
        assert answer.status_code == 204, path
        assert answer.headers["Access-Control-Allow-Origin"] == PAGE
        assert "POST" in answer.headers["Access-Control-Allow-Methods"]
        assert "x-stainless-os" in answer.headers["Access-Control-Allow-Headers"]
        assert int(answer.headers["Access-Control-Max-Age"]) > 0
        assert "Origin" in answer.headers["Vary"]
        assert "Access-Control-Allow-Credentials" not in answer.headers
        assert answer.content == b""


@pytest.mark.parametrize("origin", [PAGE, "http://localhost:5173", "http://127.0.0.1:3000"])
def test_an_allowed_page_may_read_every_answer(proxy: Proxy, origin: str) -> None:
    page = {"Origin": origin}
    for answer in (
        ask(proxy, "GET", "/v1/models", headers=page),
        ask(proxy, "GET", "/v1/models", None, headers=page),
        ask(proxy, "GET", "/nothing", headers=page),
        ask(proxy, "POST", "/v1/models/load", data="no JSON", headers=page),
        chat(proxy, headers=page),
        chat(proxy, headers=page, stream=True),
    ):
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert "Origin" in answer.headers["Vary"]
        assert answer.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
        assert "X-Request-Id" in answer.headers["Access-Control-Expose-Headers"]
        assert answer.content


def test_a_name_that_was_pointed_at_this_machine_is_refused_on_every_path(proxy: Proxy) -> None:
    """DNS rebinding: the page's own name leads here, so its requests have no strange origin."""
    for method, path in [*CALLS, ("GET", "/health")]:
        headers = {"Host": f"evil.example:{proxy.port}", "Origin": "http://evil.example"}
        for sent in (headers, {"Host": "evil.example"}):
            answer = ask(proxy, method, path, headers=sent, data="{}")
            assert answer.status_code == 403, (method, path)
            if method != "HEAD":
                assert shape(answer.json())["code"] == "host_not_allowed"


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8080",
        "localhost.:8080",
        "127.0.0.1",
        "192.168.1.5:8080",
        "[::1]:8080",
        "[fe80::1%25en0]:8080",
        "Mac.local:8080",
        "host.docker.internal:8080",
        "llm.example",
        socket.gethostname(),
        socket.gethostname().upper() + ":8080",
    ],
)
def test_the_machines_own_names_are_answered(proxy: Proxy, host: str) -> None:
    assert ask(proxy, "GET", "/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [".local", "..local", "a..local", "-" * 64 + ".local", "a" * 300 + ".local", "\xe9.local"]
    + ["localhost:999999", "localhost:x", "[::1", "::1", "a b.local", "a\\b.local", "a,b.local"],
)
def test_what_is_no_name_is_refused_as_a_foreign_name_is(proxy: Proxy, host: str) -> None:
    (answer,) = exchange(proxy, head("GET", "/health", host=host, connection="close"))
    assert (answer.status, answer.error()["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    "path",
    ["/v1//models", "/v1/models//", "/v1///models/loaded", "//", "/v1/models/", "/health/", "*"]
    + ["/v1/models/%2F", "/%00", "/v1/models/%ff", "/../v1/models", "x", "http://a/v1//models"]
    + ["/v1/models/a//b", "/V1/MODELS", "/v1/models;x", "/?/v1/models", "/" * 60_000],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE", "BREW"])
def test_an_odd_path_or_method_is_answered_in_the_contracts_shape(
    proxy: Proxy, method: str, path: str
) -> None:
    (answer,) = exchange(proxy, head(method, path, connection="close"))
    assert answer.status in (400, 404, 405), answer
    assert answer.error()["code"] in ("not_found", "model_not_found", "method_not_allowed")
    assert len(answer.body) < 2000


def test_head_gets_no_body_and_takes_no_place(proxy: Proxy) -> None:
    for path in ("/v1/events", "/v1/logs?follow=true", "/v1/models", "/nothing", "/health"):
        with connect(proxy) as connection:
            connection.sendall(head("HEAD", path, connection="close"))
            data = received(connection)
        assert data.endswith(b"\r\n\r\n"), path
        assert data.count(b"\r\n\r\n") == 1, path
    with contextlib.ExitStack() as held:
        for _ in range(8):  # all places of one client
            held.enter_context(ask(proxy, "GET", "/v1/events", stream=True))
        assert ask(proxy, "GET", "/v1/events", stream=True).status_code == 429
        assert ask(proxy, "HEAD", "/v1/events").status_code == 200
    sent = head("HEAD", "/x", content_length=str(MAX_BODY + 1))
    with connect(proxy) as connection:
        connection.sendall(sent)
        assert received(connection).endswith(b"\r\n\r\n")


def test_clients_that_are_no_browsers_notice_nothing(proxy: Proxy) -> None:
    (answer,) = exchange(proxy, head("GET", "/v1/models", "1.0", host=""))
    assert answer.status == 200
    url, headers = proxy.url + "/v1/models", {"Authorization": f"Bearer {ALICE}"}
    for found in (
        ask(proxy, "GET", "/v1/models"),
        httpx.get(url, headers=headers),
        requests.post(proxy.url + "/v1/chat/completions", data=json.dumps(HELLO), headers=headers),
    ):
        assert found.status_code == 200
        assert not any(name.lower().startswith("access-control") for name in found.headers)
        assert "Vary" not in found.headers


def test_what_a_browser_would_show_has_security_headers(proxy: Proxy) -> None:
    preflight = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    found = [
        ask(proxy, "GET", "/health"),
        ask(proxy, "GET", "/v1/models", None),
        ask(proxy, "GET", "/v1/models", headers={"Origin": STRANGER}),
        ask(proxy, "GET", "/nothing"),
        ask(proxy, "PUT", "/health"),
        ask(proxy, "GET", "/v1/logs"),
        ask(proxy, "OPTIONS", "/v1/models", headers=preflight),
        chat(proxy),
        chat(proxy, stream=True),
        *exchange(proxy, b"garbage\r\n\r\n"),
        *exchange(proxy, head("POST", "/v1/models/load", content_length=str(MAX_BODY + 1))),
        *exchange(proxy, head("GET", "/", x="y" * 70_000)),
    ]
    for answer in found:
        assert answer.headers["X-Content-Type-Options"] == "nosniff", answer
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert "Cross-Origin-Resource-Policy" in answer.headers
        assert "Server" not in answer.headers


# -- sizes


def test_a_body_that_is_announced_too_large_is_refused_before_it_comes(proxy: Proxy) -> None:
    for length in (MAX_BODY + 1, 10**15):
        (answer,) = exchange(proxy, head("POST", "/v1/models/load", content_length=str(length)))
        assert answer.status == 413
        assert answer.error()["code"] == "request_too_large"


def test_nobody_is_told_to_go_on_with_a_body_that_is_too_large(proxy: Proxy) -> None:
    sent = head("POST", "/v1/models/load", content_length=str(10**9), expect="100-continue")
    with connect(proxy) as connection:
        connection.sendall(sent)
        found = received(connection)
    assert found.startswith(b"HTTP/1.1 413 ")


def test_a_body_of_just_the_allowed_size_is_read(proxy: Proxy) -> None:
    body = b"{}".ljust(MAX_BODY)
    answer = ask(proxy, "POST", "/v1/models/load", data=body)
    assert answer.json()["error"]["param"] == "model_id"
    assert ask(proxy, "POST", "/v1/models/load", data=body + b" ").status_code == 413


def test_a_chunked_body_that_grows_too_large_is_refused(proxy: Proxy) -> None:
    before = memory(proxy)
    block = b"10000\r\n" + b" " * 65536 + b"\r\n"
    sent = head("POST", "/v1/models/load", transfer_encoding="chunked") + block * 1000  # 64 MB
    (answer,) = exchange(proxy, sent)
    assert answer.status == 413
    assert answer.error()["code"] == "request_too_large"
    assert memory(proxy) - before < 32


@pytest.mark.parametrize("size", [MAX_BODY + 1, 10 * MAX_BODY])
def test_the_usual_clients_read_why_their_body_was_refused(proxy: Proxy, size: int) -> None:
    answer = ask(proxy, "POST", "/v1/models/load", data=b"x" * size)
    assert (answer.status_code, shape(answer.json())["code"]) == (413, "request_too_large")
    client = openai.OpenAI(base_url=proxy.url + "/v1", api_key=ALICE, max_retries=0)
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="any", prompt="x" * size)
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")


def test_a_head_that_never_ends_is_refused(proxy: Proxy) -> None:
    sent = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X-Long: " + b"x" * (1 << 20)
    (answer,) = exchange(proxy, sent)
    assert answer.status == 431
    assert answer.error()["code"] == "invalid_request"


@pytest.mark.parametrize(
    "body",
    [
        b"f" * (256 << 10),
        b"0\r\n" + b"f" * (256 << 10),
        b"2\r\n{}\r\n0\r\n" + b"f: f\r\n" * (64 << 10),
        b"1\r\n \r\n" * (64 << 10),
        b"1;f=f\r\n \r\n" * (64 << 10),
        b"6\r\n      \r\n" * (64 << 10),
        b"80000\r\n" + b" " * (512 << 10) + b"\r\n0\r\n" + b"f" * (512 << 10),
    ],
    ids=[
        "a head without end",
        "a trailer without end",
        "trailers",
        "bytes",
        "extensions",
        "six bytes each",
        "a trailer as long as the body",
    ],
)
def test_a_chunked_body_that_is_all_chunks_and_no_body_is_refused(
    proxy: Proxy, body: bytes
) -> None:
    """Taking it apart costs the one thread that reads for everybody far more than its length."""
    sent = head("POST", "/v1/models/load", transfer_encoding="chunked") + body
    (answer,) = exchange(proxy, sent)
    assert answer.status == 400
    assert answer.error()["code"] == "invalid_request"


def called(arguments: str) -> bytes:
    """A conversation with a call of a tool, whose arguments are a text of their own."""
    call = {"function": {"name": "f", "arguments": arguments}}
    return json.dumps({"messages": [{"role": "assistant", "tool_calls": [call]}]}).encode()


BOMBS = {
    "lists": b'{"messages": [' + b"[]," * ((MAX_BODY - 64) // 3) + b"0]}",
    "texts": b'{"messages": [' + b'"",' * ((MAX_BODY - 64) // 3) + b"0]}",
    "messages": b'{"messages": [' + b'{"role":"user"},' * ((MAX_BODY - 64) // 16) + b"0]}",
    "arguments": called(f'{{"a": [{"[]," * 1_300_000}0]}}'),
    "escaped arguments": called(f'{{"a": [{"[]," * 500_000}0]}}').replace(b"[],", rb"[]\u002c"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_body_of_a_million_values_holds_nobody_up(
    proxy: Proxy, pool: concurrent.futures.ThreadPoolExecutor, kind: str
) -> None:
    """Parsed, it is thirty times as large, and nothing else runs while it is parsed."""
    before = memory(proxy)
    sent = head("POST", "/v1/chat/completions", content_length=str(len(BOMBS[kind])))
    sent = sent.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + BOMBS[kind]
    with others_are_served(proxy):
        posts = [pool.submit(exchange, proxy, sent) for _ in range(6)]
        found = [post.result()[0] for post in posts]
    told = {(answer.status, answer.error()["code"]) for answer in found}
    # Six of the largest size are more than one client may have in memory.
    assert (400, "invalid_request") in told
    assert told <= {(400, "invalid_request"), (429, "too_many_requests")}
    assert memory(proxy) - before < 200


def test_a_long_text_is_no_such_body(proxy: Proxy) -> None:
    text = ('say "a, b, c" and [x, {y: z}], \\"\\\n' * 10**6)[: MAX_BODY // 3]
    body = {"model": "any", "prompt": text}
    answer = ask(proxy, "POST", "/v1/completions", json=body)
    # Whatever the model's context says of its length: it has been read.
    assert answer.ok or answer.json()["error"]["param"] == "prompt", answer.text


# -- slowness


def test_two_hundred_idle_and_many_slow_connections_hold_nobody_up(proxy: Proxy) -> None:
    before = memory(proxy)
    with contextlib.ExitStack() as held, others_are_served(proxy):
        connections = [held.enter_context(connect(proxy)) for _ in range(290)]
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
    assert memory(proxy) - before < 100, "60 bodies of 3 MB were held in memory"


def test_clients_that_read_a_byte_a_second_hold_nobody_up(
    proxy: Proxy, script: Callable[..., None]
) -> None:
    script(events=2000, event_bytes=20_000)
    before = memory(proxy)
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
        assert memory(proxy) - before < 32, "40 MB each were waiting for them"


def test_long_answers_that_nobody_reads_take_little_memory(proxy: Proxy) -> None:
    with (proxy.instance / "logs" / "proxy.log").open("a") as file:
        file.write(("x" * 199 + "\n") * 10_000)
    before = memory(proxy)
    sent = head("GET", "/v1/logs?lines=10000", connection="close")
    with contextlib.ExitStack() as held:
        for _ in range(160):
            connection = held.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", proxy.port))
            connection.sendall(sent)
            assert connection.recv(1)
        with others_are_served(proxy):
            grown = memory(proxy) - before
    assert grown < 130, f"{grown} MB of the 320 that wait for them"


@pytest.mark.parametrize("channel_class", [channel.DirectChannel, channel.Channel])
def test_a_client_that_takes_nothing_for_a_minute_gives_its_place_back(
    alone: Callable[..., Alone],
    monkeypatch: pytest.MonkeyPatch,
    channel_class: type[channel.Channel],
) -> None:
    assert channel.DEAF_AFTER <= 60
    monkeypatch.setattr(channel, "DEAF_AFTER", 0.3)
    ended = threading.Event()

    def application(_: Any, start_response: Callable[..., Any]) -> Iterator[bytes]:
        start_response("200 OK", [])
        try:
            yield from itertools.repeat(b"x" * 65536)
        finally:
            ended.set()

    one = alone(application, channel_class)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", one.port))
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while not ended.wait(0.05):
            assert connection.recv(1)
    assert ended.is_set()


@pytest.mark.parametrize("channel_class", [channel.DirectChannel, channel.Channel])
def test_a_deaf_client_is_left_although_there_is_always_a_little_more_for_it(
    alone: Callable[..., Alone],
    monkeypatch: pytest.MonkeyPatch,
    channel_class: type[channel.Channel],
) -> None:
    monkeypatch.setattr(channel, "DEAF_AFTER", 0.3)
    ended = threading.Event()

    def application(_: Any, start_response: Callable[..., Any]) -> Iterator[bytes]:
        start_response("200 OK", [])
        try:
            yield from itertools.repeat(b"x" * 150_000, 2)  # less than stops the application
            while not ended.wait(0.02):
                yield b": waiting\n\n"
        finally:
            ended.set()

    one = alone(application, channel_class)
    one.server._server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", one.port))
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ended.wait(5)


def test_clients_that_ask_again_and_again_and_read_nothing_hold_no_threads(
    alone: Callable[..., Alone],
) -> None:
    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        start_response("200 OK", [])
        return [b"x" * (1 << 20 if environ["PATH_INFO"] == "/large" else 1)]

    one = alone(application)
    one.server._server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    threads = one.server._server.adj.threads
    with contextlib.ExitStack() as held:
        for _ in range(threads + 5):
            connection = held.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", one.port))
            connection.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3)
        # One after the other: the first may be answered before the others' second requests.
        for _ in range(threads):
            assert requests.get(f"http://127.0.0.1:{one.port}/", timeout=5).content == b"x"


def test_a_connection_on_which_nothing_comes_for_two_minutes_is_closed(
    alone: Callable[..., Alone],
) -> None:
    one = alone(lambda *_: [])
    adjustments = one.server._server.adj
    assert adjustments.channel_timeout <= 120
    adjustments.channel_timeout = 0.2
    for sent in (b"", b"GET / HTTP/1.1\r\nX-"):
        with socket.create_connection(("127.0.0.1", one.port), 5) as connection:
            connection.sendall(sent)
            assert received(connection, 5) == b""


# -- HTTP, as clients and as others write it


def test_a_chunked_request_body_is_understood(proxy: Proxy, program: Path) -> None:
    parts = [json.dumps(HELLO)[:20].encode(), json.dumps(HELLO)[20:].encode()]
    answer = ask(proxy, "POST", "/v1/chat/completions", data=iter(parts))
    assert answer.status_code == 200
    seen = scripted_server.record(program, "request")[-1]
    assert seen["body"]["messages"] == HELLO["messages"]
    assert "Transfer-Encoding" not in seen["headers"], "the backend takes none"


def test_expect_100_continue_is_answered_before_the_body_comes(proxy: Proxy) -> None:
    body = json.dumps(HELLO).encode()
    for framing in ({"content_length": str(len(body))}, {"transfer_encoding": "chunked"}):
        sent = body
        if "transfer_encoding" in framing:
            sent = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        with connect(proxy) as connection:
            start = head(
                "POST", "/v1/chat/completions", expect="100-continue", connection="close", **framing
            )
            connection.sendall(start)
            assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(sent)
            (answer,) = answers(received(connection))
        assert answer.status == 200
        assert json.loads(answer.body)["choices"]


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not on this machine")
@pytest.mark.parametrize("header", ["Expect: 100-continue", "Transfer-Encoding: chunked"])
def test_curl_sends_a_body_either_way(proxy: Proxy, header: str) -> None:
    url = proxy.url + "/v1/chat/completions"
    key = f"Authorization: Bearer {ALICE}"
    done = subprocess.run(
        ["curl", "-sSf", "-H", key, "-H", header, "--data-binary", "@-", url],
        input=json.dumps({**HELLO, "user": "x" * 100_000}).encode(),
        capture_output=True,
        timeout=20,
        check=True,
    )
    assert json.loads(done.stdout)["choices"]


def test_expect_100_continue_without_a_body_is_simply_answered(proxy: Proxy) -> None:
    (answer,) = exchange(
        proxy, head("GET", "/v1/models", expect="100-continue", connection="close")
    )
    assert answer.status == 200


def test_pipelined_requests_are_answered_in_their_order(proxy: Proxy) -> None:
    body = json.dumps(HELLO).encode()
    post = head(
        "POST", "/v1/chat/completions", content_length=str(len(body)), x_request_id="second"
    )
    found = exchange(
        proxy,
        head("GET", "/v1/models", x_request_id="first")
        + (post + body)
        + head("GET", "/nothing", x_request_id="third")
        + head("GET", "/health", x_request_id="fourth", connection="close"),
    )
    told = [(answer.status, answer.headers["X-Request-Id"]) for answer in found]
    assert told == [(200, "first"), (200, "second"), (404, "third"), (200, "fourth")]


def test_http_1_0_may_keep_its_connection(proxy: Proxy) -> None:
    keep = head("GET", "/v1/models", "1.0", connection="keep-alive")
    found = exchange(proxy, keep + keep + head("GET", "/health", "1.0"))
    assert [answer.status for answer in found] == [200, 200, 200]
    body = json.dumps({**HELLO, "stream": True}).encode()
    stream = head(
        "POST",
        "/v1/chat/completions",
        "1.0",
        connection="keep-alive",
        content_length=str(len(body)),
    )
    (answer,) = exchange(proxy, stream + body)
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert "Transfer-Encoding" not in answer.headers


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + b"\r\n\r\n",  # TLS
        b"\x00" * 5000 + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9 extra\r\n\r\n",
        b"get /health HTTP/1.1\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX: a\x00b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX : a\r\n\r\n",
        b"GET /health HTTP/1.1\r\n folded: first\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX: a\nY: b\r\n\r\n",
        b"POST /v1/models/load HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/models/load HTTP/1.1\r\nContent-Length: +2\r\n\r\n{}",
        b"POST /v1/models/load HTTP/1.1\r\nContent-Length: 0x2\r\n\r\n{}",
        b"POST /v1/models/load HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST /v1/models/load HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"POST /v1/models/load HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}XX0\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_in_the_contracts_shape(proxy: Proxy, sent: bytes) -> None:
    said = len(log(proxy))
    (answer,) = exchange(proxy, sent)
    assert answer.status in (400, 413)
    assert answer.error()["code"] in ("invalid_request", "request_too_large")
    new = log(proxy)[said:]
    assert "Traceback" not in new
    assert "uncaptured" not in new


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        b"Content-Length: 0\r\nContent-Length: 5\r\n\r\n",
        b"Content-Length: 0, 5\r\n\r\n",
        b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    ],
)
@pytest.mark.parametrize("version", [b" HTTP/1.1", b" HTTP/1.0", b" HTTP/1.2", b""])
def test_a_request_that_can_be_read_in_two_ways_is_refused_with_all_that_follows(
    proxy: Proxy, version: bytes, framing: bytes
) -> None:
    """Request smuggling: a proxy in front of this one might see the next request elsewhere."""
    start = b"POST /v1/models/unload%s\r\nHost: localhost\r\nConnection: keep-alive\r\n"
    start += b"Authorization: Bearer %s\r\n" % ALICE.encode()
    found = exchange(proxy, start % version + framing + head("GET", "/v1/models"))
    assert [answer.status for answer in found] in ([400], [501])
    assert found[0].error()["code"] == "invalid_request"
    assert describe(proxy)["loaded"] is True


# -- errors tell the truth


PLACE = "/opt/private/models/x"  # a path that no client may read


@pytest.mark.parametrize(
    ("status", "text", "expected", "code"),
    [
        (404, "Conversation roles must alternate user/assistant", 400, "invalid_request"),
        (404, "No user query found in messages.", 400, "invalid_request"),
        (404, "'dict object' has no attribute 'x' in the chat template", 400, "invalid_request"),
        (404, "Only 'text' content type is supported.", 400, "invalid_request"),
        (404, "text input must be of type `str`", 500, "internal_error"),
        (404, f"[Errno 2] No such file or directory: '{PLACE}'", 500, "internal_error"),
        (404, "[metal] the toolkit sent the message: out of memory", 500, "internal_error"),
        (404, "", 500, "internal_error"),
        (400, "max_tokens must be a positive integer", 400, "invalid_request"),
        (411, "Content-Length header is required", 502, "backend_failed"),
        (500, f"broken at {PLACE}", 502, "backend_failed"),
        (500, "no message could be read", 502, "backend_failed"),
        (503, "the tool thread is gone", 502, "backend_failed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_backends_errors_get_the_status_that_is_true(
    proxy: Proxy,
    script: Callable[..., None],
    status: int,
    text: str,
    expected: int,
    code: str,
    stream: bool,
) -> None:
    script(error=text, error_status=status)
    answer = chat(proxy, stream=stream)
    assert (answer.status_code, shape(answer.json())["code"]) == (expected, code)
    assert PLACE not in answer.text


@pytest.mark.parametrize(
    "text",
    [
        f"cannot open {PLACE}",
        f"'{PLACE}'",
        f"(at {PLACE}:3)",
        f"file://{PLACE}",
        f"cannot open {PLACE} x/My Disk/opt/private/y",
        "cannot open /Volumes/My Private Disk/opt/private/y",
        f'Traceback (most recent call last):\n  File "{PLACE}.py", line 3, in f\nKeyError: 5',
        f"unusual token near {PROMPT!r}",
    ],
)
def test_no_path_traceback_or_prompt_is_in_an_error_of_the_backends(
    proxy: Proxy, script: Callable[..., None], text: str
) -> None:
    for status in (404, 400, 500):
        script(error=text, error_status=status)
        messages = [{"role": "user", "content": f"Say {PROMPT} twice"}]
        for stream in (False, True):
            answer = chat(proxy, messages=messages, stream=stream)
            assert not answer.ok
            for secret in ("opt", "private", "Private Disk", "Traceback", "line 3", PROMPT):
                assert secret not in answer.text, answer.text


def test_a_backend_that_breaks_the_protocol_is_the_one_to_blame(
    proxy: Proxy, script: Callable[..., None]
) -> None:
    for fault in ("garbled_after", "drop_after"):
        script(**{"events": 3, "garbled_after": None, fault: 1})
        answer = chat(proxy)
        assert (answer.status_code, shape(answer.json())["code"]) == (502, "backend_failed"), fault


@pytest.mark.parametrize("path", [f"'{PLACE}/a b.metallib'", "/Volumes/My Disk/opt/private/x"])
@pytest.mark.parametrize("fault", ["program", "load", "death"])
def test_no_path_is_in_an_error_about_the_backend_itself(
    proxy: Proxy, program: Path, script: Callable[..., None], models: Path, fault: str, path: str
) -> None:
    reason = f"[Errno 5] cannot read {path}"
    told = []
    try:
        if fault == "death":
            script(events=3, interval=0.2, generation_dies_after=1, generation_dies_of=reason)
            # The events before it carry the model's path, as the backend itself sends it.
            told.append(chat(proxy, stream=True).text.rpartition("data: ")[2])
            script(generation_dies_after=None)
        else:
            if fault == "program":
                program.chmod(0o644)
            else:
                script(load_failure=reason)
            told.append(ask(proxy, "POST", "/v1/models/load", json={"model_id": "tiny/beta"}).text)
            told.append(chat(proxy).text)
    finally:
        program.chmod(0o755)
    assert all("error" in text for text in told)
    for secret in (PLACE, "/opt", " Disk", str(models), str(program.parent)):
        assert secret not in "".join(told)


def test_an_error_names_no_log_that_says_nothing(proxy: Proxy, script: Callable[..., None]) -> None:
    """`mlx_lm.server` logs nothing of what it answers with 404."""
    script(error="[broadcast_shapes] Shapes (1,2) and (3,4) cannot be broadcast.")
    message = shape(chat(proxy).json())["message"]
    assert "log" not in message.lower() or "LOG_LEVEL=DEBUG" in message


def test_an_unforeseen_fault_tells_its_number_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fault() -> None:
        raise RuntimeError(f"{PLACE} {PROMPT}")

    parts: Any = SimpleNamespace(
        settings=Settings(instance_path=Path("/nowhere")),
        access=Access(),
        controller=SimpleNamespace(describe=fault),
        bus=EventBus(),
        metrics=Metrics(),
    )
    answer = create_app(parts).test_client().get("/v1/models/loaded")
    assert answer.status_code == 500
    error = shape(answer.get_json())
    assert error["code"] == "internal_error"
    assert answer.headers["X-Request-Id"] in error["message"]
    assert PLACE not in answer.text
    assert any(
        answer.headers["X-Request-Id"] in it.message and it.exc_info for it in caplog.records
    )


def test_an_error_that_was_answered_holds_nothing_of_its_request() -> None:
    """It may be kept by what has raised it; its frames would keep the request's body in memory."""
    error = NoModelLoaded("No model is loaded.")

    def fault() -> None:
        raise error

    parts: Any = SimpleNamespace(
        settings=Settings(instance_path=Path("/nowhere")),
        access=Access(),
        controller=SimpleNamespace(describe=fault),
        bus=EventBus(),
        metrics=Metrics(),
    )
    assert create_app(parts).test_client().get("/v1/models/loaded").status_code == 503
    assert error.__traceback__ is None


# -- the request's id and its log line


def test_every_answer_has_a_request_id_and_the_clients_own_if_it_is_sane(proxy: Proxy) -> None:
    own = {"X-Request-Id": "mine-1"}
    for method, path in [*CALLS, ("GET", "/health")]:
        for key in (ALICE, None):
            answer = ask(proxy, method, path, key, headers=own, data="{}", stream=True)
            assert answer.headers["X-Request-Id"] == "mine-1"
            answer.close()
    assert chat(proxy, headers=own).headers["X-Request-Id"] == "mine-1"
    (answer,) = exchange(
        proxy,
        head("POST", "/v1/models/load", content_length=str(MAX_BODY + 1), x_request_id="mine-2"),
    )
    assert answer.headers["X-Request-Id"] == "mine-2"
    for odd in ("a b", "<script>", "x" * 129, "a\tb", "\xe9"):
        answer = ask(proxy, "GET", "/health", headers={"X-Request-Id": odd.encode("latin-1")})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-Id"])


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"garbage\r\n\r\n", 400),
        (head("POST", "/v1/models/load", content_length=str(MAX_BODY + 1)), 413),
        (head("GET", "/", x="y" * 70_000), 431),
        (head("POST", "/", transfer_encoding="gzip"), 501),
    ],
)
def test_what_the_server_itself_refuses_has_an_id_and_a_log_line_too(
    proxy: Proxy, sent: bytes, status: int
) -> None:
    (answer,) = exchange(proxy, sent)
    assert answer.status == status
    assert answer.error()["code"] != "internal_error"
    number = answer.headers["X-Request-Id"]
    assert re.fullmatch("[0-9a-f]{32}", number)
    (line,) = until(lambda: lines_of(proxy, number), what="its log line")
    assert figures(line)["client"] == "127.0.0.1"
    assert figures(line)["status"] == str(status)


def test_each_request_has_one_line_with_its_figures(
    proxy: Proxy, script: Callable[..., None]
) -> None:
    script(events=5, interval=0.01)
    calls: dict[str, tuple[int, Callable[[dict[str, str]], requests.Response]]] = {
        "whole": (200, lambda own: chat(proxy, headers=own)),
        "stream": (200, lambda own: chat(proxy, headers=own, stream=True)),
        "listing": (200, lambda own: ask(proxy, "GET", "/v1/models", headers=own)),
        "loading": (200, lambda own: load(proxy, own)),
        "loading-stream": (200, lambda own: load(proxy, own, stream=True)),
        "refused-key": (401, lambda own: ask(proxy, "GET", "/v1/models", None, headers=own)),
        "refused-page": (403, lambda own: chat(proxy, headers={**own, "Origin": STRANGER})),
        "refused-host": (403, lambda own: chat(proxy, headers={**own, "Host": "evil.example"})),
        "refused-body": (400, lambda own: chat(proxy, headers=own, messages=5)),
        "nothing": (404, lambda own: ask(proxy, "GET", "/nothing", headers=own)),
        "method": (405, lambda own: ask(proxy, "PUT", "/v1/models", headers=own)),
    }
    for name, (status, call) in calls.items():
        answer = call({"X-Request-Id": name})
        assert answer.status_code == status, name
        assert answer.content
        until(lambda name=name: lines_of(proxy, name), what=f"the line of {name}")  # type: ignore[misc]
    for name, (status, _) in calls.items():
        (line,) = lines_of(proxy, name)
        found = figures(line)
        assert found["client"] == "127.0.0.1"
        assert found["status"] == str(status)
        assert found["path"].startswith("/")
        assert float(found["seconds"]) >= 0
        if name in ("whole", "stream"):
            assert (found["model"], found["outcome"]) == ("tiny/alpha", "done")
            assert int(found["tokens_out"]) == 5
            assert int(found["tokens_in"]) > 0
            assert 0 < float(found["first_token"]) <= float(found["seconds"])
            assert float(found["tokens_per_second"]) > 0


def load(proxy: Proxy, headers: dict[str, str], **fields: Any) -> requests.Response:
    body = {"model_id": "tiny/alpha", **fields}
    return ask(proxy, "POST", "/v1/models/load", json=body, headers=headers)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_has_its_line_too(
    proxy: Proxy, script: Callable[..., None], stream: bool
) -> None:
    script(events=1000, interval=0.02)
    name = f"leaves-{stream}"
    body = json.dumps({**HELLO, "stream": stream, "max_tokens": 1000}).encode()
    with connect(proxy) as connection:
        connection.sendall(
            head(
                "POST",
                "/v1/chat/completions",
                content_length=str(len(body)),
                x_request_id=name,
            )
            + body
        )
        until(lambda: describe(proxy)["in_flight"] == 1, what="the answer in flight")
        if stream:
            assert connection.recv(1)
    (line,) = until(lambda: lines_of(proxy, name), what="its log line")
    assert figures(line)["outcome"] == "client_gone"
    assert describe(proxy)["in_flight"] == 0


FORGED = "12:00:00 INFO    mlxproxy.request: id=forged client=1.2.3.4 status=200"


def test_nothing_a_client_sends_can_forge_a_line_or_reach_the_terminal(proxy: Proxy) -> None:
    for path in (
        f"/x%0a{FORGED.replace(' ', '%20')}",
        f"/x%0d%0a{FORGED.replace(' ', '%20')}",
        "/x%1b[2J%1b]0;title%07",
        "/x%c2%85y%e2%80%a8z%c2%9b2J",
        "/x%20status=200%20client=9.9.9.9",
    ):
        name = f"forger-{abs(hash(path))}"
        ask(proxy, "GET", path, headers={"X-Request-Id": name})
        (line,) = until(lambda name=name: lines_of(proxy, name), what="its line")  # type: ignore[misc]
        assert figures(line)["status"] == "404"
        assert figures(line)["client"] == "127.0.0.1"
        assert line.isprintable()
        assert line.isascii()
    exchange(
        proxy,
        head("GET", "/nothing", x_request_id="a status=200", user_agent=FORGED, connection="close"),
    )
    assert not any(line.startswith(FORGED[:8]) for line in log(proxy).splitlines())


def test_nothing_long_that_is_sent_fills_the_log(proxy: Proxy) -> None:
    before = len(log(proxy))
    long = "x" * 30_000
    for sent in (
        head("GET", "/" + long),
        head("PUT", "/v1/models/" + long),
        head(long.upper(), "/v1/models"),
        head("GET", "/nothing", host=long),
        head("GET", "/nothing", origin=long),
        head("GET", "/nothing", x_request_id=long),
        head("GET", f"/v1/logs?source={long}"),
        head("POST", "/v1/models/load", transfer_encoding=long),
        long.encode() + b"\r\n\r\n",
    ):
        (answer,) = exchange(proxy, sent.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert answer.status >= 400
        assert len(answer.body) < 2000
    lines = log(proxy)[before:].splitlines()
    assert len(lines) >= 9
    assert max(map(len, lines)) < 1000


def test_a_long_line_of_a_librarys_is_cut_too() -> None:
    lines: list[str] = []
    file: Any = SimpleNamespace(put=lines.append)
    before = list(logging.getLogger().handlers)
    logs.to_followers(file, EventBus())
    (added,) = [it for it in logging.getLogger().handlers if it not in before]
    try:
        logging.getLogger("waitress").error("Exception while serving %s", "/x" * 30_000)
    finally:
        logging.getLogger().removeHandler(added)
    assert len(lines[0]) < 5000


def test_a_line_of_a_librarys_is_one_line_too() -> None:
    """waitress tells at INFO which path a client left, as the client wrote it."""
    lines: list[str] = []
    file: Any = SimpleNamespace(put=lines.append)
    before = list(logging.getLogger().handlers)
    logs.to_followers(file, EventBus())
    (added,) = [it for it in logging.getLogger().handlers if it not in before]
    try:
        waitress = logging.getLogger("waitress")
        waitress.warning("Client disconnected while serving %s", f"/x\n{FORGED}\x1b[2J\u2028")
        try:
            raise ValueError(f"no /x\n{FORGED}")
        except ValueError:
            waitress.exception("Exception while serving")
    finally:
        logging.getLogger().removeHandler(added)
    first, second = lines
    assert first.endswith("\n")
    assert first[:-1].isprintable()
    assert FORGED in first, "it is told, on its line"
    assert "Traceback" in second
    assert not any(line.startswith(FORGED[:8]) for line in second.splitlines()), second


# -- fairness


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


def test_an_unload_gets_through_whoever_waits_for_a_load(
    proxy: Proxy, script: Callable[..., None], pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    script(load_seconds=8)
    body = {"model_id": "tiny/beta"}
    many = [pool.submit(ask, proxy, "POST", "/v1/models/load", json=body) for _ in range(12)]
    until(lambda: any(one.done() for one in many), what="the first that is turned away")
    assert ask(proxy, "POST", "/v1/models/unload", BOB).status_code == 200
    codes = {shape(one.result().json())["code"] for one in many}
    assert codes == {"too_many_requests", "load_cancelled"}


def test_a_seed_stops_nobody_elses_stream(
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


# -- what stays secret, after all of the above and a little more


def test_no_prompt_or_answer_is_in_any_log(proxy: Proxy, script: Callable[..., None]) -> None:
    said = {"role": "user", "content": PROMPT}
    for fields in (
        {},
        {"stream": True},
        {"temperature": PROMPT},
        {"stop": [PROMPT]},
        {"messages": [said, {"role": PROMPT, "content": PROMPT}]},
        {"tools": [{"type": "function", "function": {"name": PROMPT, "description": PROMPT}}]},
        {"chat_template_kwargs": {PROMPT: PROMPT}},
        {"model": PROMPT},
    ):
        assert chat(proxy, **{"messages": [said], **fields}).content
    script(error=f"the template does not take {PROMPT}")
    assert not chat(proxy, messages=[said]).ok
    script(error=None, drop_after=2)
    assert not chat(proxy, messages=[said]).ok
    script(drop_after=None)
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/models/load"):
        answer = ask(proxy, "POST", path, data=f'{{"prompt": "{PROMPT}"')
        assert answer.status_code == 400
        assert PROMPT not in answer.text
    assert ask(proxy, "POST", "/v1/completions", json={"prompt": PROMPT}).ok
    everything = written(proxy)
    assert PROMPT not in everything
    assert "alpha0" not in everything, "the answers' first word"


@pytest.mark.backend
def test_no_prompt_is_in_the_logs_of_the_real_backend(
    start: Callable[..., Proxy], models: Path
) -> None:
    proxy = start(models)
    assert proxy.load("tiny/alpha").ok
    tools = [{"type": "function", "function": {"name": PROMPT, "parameters": {}}}]
    for fields in ({}, {"stream": True}, {"tools": tools}, {"logprobs": True}):
        assert proxy.chat(PROMPT, **fields).ok
    assert proxy.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 2}).ok
    assert proxy.unload().ok
    assert proxy.stop() == 0
    files = list((proxy.instance / "logs").iterdir())
    assert "POST /v1/chat/completions" in "".join(file.read_text() for file in files)
    assert not any(PROMPT in file.read_text() for file in [*files, proxy.output])


def test_a_key_is_never_logged_nor_given_to_the_backend(proxy: Proxy, program: Path) -> None:
    ask(proxy, "GET", f"/v1/models?api_key={ALICE}")
    ask(proxy, "GET", "/v1/models", None, headers={"x-api-key": WRONG})
    assert chat(proxy, CARLA).ok
    assert chat(proxy, "", headers={"x-api-key": BOB, "Authorization": ""}).ok
    events = proxy.get("/v1/events?follow=false", headers={"Authorization": f"Bearer {ALICE}"})
    everything = {
        "the logs": written(proxy),
        "the snapshot": events.text,
        "the backend's command line, environment and requests": json.dumps(
            scripted_server.record(program)
        ),
        "the files of the instance folder": "".join(
            file.read_text(errors="replace") for file in proxy.instance.rglob("*") if file.is_file()
        ),
    }
    assert '"environment"' in everything["the backend's command line, environment and requests"]
    for place, text in everything.items():
        for key in (ALICE, BOB, CARLA, WRONG):
            assert key not in text, place
