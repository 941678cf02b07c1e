"""Loads as several clients ask for them: what a body may say, who waits, whose load is given up.

One proxy over the scripted stand-in serves the whole file.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from mlxproxy.catalog import LONGEST_NAME
from tests.support import scripted_server, tiny_models
from tests.support.proxy import Proxy
from tests.support.raw_http import shape
from tests.support.waiting import until

ALICE, BOB, CARLA = "key-of-alice", "key-of-bob", "key-of-carla"
LOAD, CHAT = "/v1/models/load", "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("management")


@pytest.fixture(scope="module")
def program(folder: Path) -> Path:
    return scripted_server.install(folder / "standin", events=3)


@pytest.fixture(scope="module")
def proxy(folder: Path, program: Path) -> Iterator[Proxy]:
    """A proxy of three clients with two models, whose library the tests may change."""
    for name in ("alpha", "beta"):
        tiny_models.build(folder / "models" / "tiny" / name, says=name)
    proxy = Proxy(
        folder / "instance",
        folder / "models",
        MLX_SERVER_BIN=program,
        API_KEY=",".join((ALICE, BOB, CARLA)),
    )
    yield proxy.start()
    proxy.clean_up()


def ask(proxy: Proxy, method: str, path: str, key: str = ALICE, **kwargs: Any) -> requests.Response:
    kwargs.setdefault("timeout", 30)
    headers = {"Authorization": f"Bearer {key}"}
    return requests.request(method, proxy.url + path, headers=headers, **kwargs)


def load(proxy: Proxy, name: str, key: str = ALICE, **fields: Any) -> requests.Response:
    return ask(proxy, "POST", LOAD, key, json={"model_id": f"tiny/{name}", **fields})


# -- what a body may say


@pytest.mark.parametrize("name", ["a\u0315\u0300" * 60_000, "x" * (LONGEST_NAME + 1)])
def test_a_name_that_cannot_be_a_path_is_an_unknown_model(proxy: Proxy, name: str) -> None:
    assert load(proxy, "alpha").ok
    refused = ask(proxy, "POST", LOAD, json={"model_id": name})
    assert refused.status_code == 404
    assert shape(refused.json())["code"] == "model_not_found"
    answered = ask(proxy, "POST", CHAT, json={**HELLO, "model": name})
    assert answered.json()["choices"][0]["message"]["content"].startswith("alpha0")
    listed = ask(proxy, "GET", f"/v1/models/{name[:5000]}")
    assert listed.status_code == 404
    assert shape(listed.json())["code"] == "model_not_found"


@pytest.mark.parametrize("field", ["adapters", "draft_models"])
@pytest.mark.parametrize("value", [[f"/a/{n}" for n in range(17)], ["/" + "a" * LONGEST_NAME]])
def test_a_load_may_name_only_a_few_adapters_of_limited_length(
    proxy: Proxy, field: str, value: list[str]
) -> None:
    refused = load(proxy, "alpha", **{field: value})
    assert refused.status_code == 400
    assert shape(refused.json())["param"] == field
    assert "at most" in shape(refused.json())["message"]
    longest = ["/" + "a" * (LONGEST_NAME - 1)] + [f"/a/{n}" for n in range(15)]
    assert load(proxy, "alpha", **{field: longest}).json()[field] == sorted(longest)


@pytest.mark.parametrize(
    "text", [r"\ud800", r"a\u0000b", r"x\udfff"], ids=["surrogate", "NUL", "low surrogate"]
)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_id", '"{}"'),
        ("adapters", '["/a", "{}"]'),
        ("draft_models", '["{}"]'),
        ("ttl", '"{}"'),
        ("whatever", '{{"a": [1, {{"b": "{}"}}]}}'),
    ],
)
@pytest.mark.parametrize("path", [LOAD, "/v1/models/unload"])
def test_a_text_that_is_not_valid_unicode_is_rejected_with_its_field(
    proxy: Proxy, path: str, field: str, value: str, text: str
) -> None:
    fields = {"model_id": '"tiny/alpha"', field: value.format(text)}
    raw = "{" + ", ".join(f'"{name}": {it}' for name, it in fields.items()) + "}"
    assert json.loads(raw)
    refused = ask(proxy, "POST", path, data=raw)
    assert refused.status_code == 400
    assert shape(refused.json())["code"] == "invalid_request"
    assert shape(refused.json())["param"] == field


# -- who waits, and whose load is given up


@pytest.fixture
def slow(proxy: Proxy, program: Path) -> Iterator[Path]:
    """Loads that take a second from now on, with alpha loaded."""
    assert load(proxy, "alpha").ok
    scripted_server.change(program, load_seconds=1.0)
    yield program
    scripted_server.change(program, load_seconds=0.0)
    ask(proxy, "POST", "/v1/models/unload")


def starts(program: Path) -> int:
    return len(scripted_server.record(program, "started"))


def options(proxy: Proxy) -> dict[str, Any]:
    """What the loaded model was loaded with."""
    found: dict[str, Any] = ask(proxy, "GET", "/v1/models/loaded").json().get("options") or {}
    return found


def test_a_client_with_load_after_load_does_not_keep_chats_waiting(
    proxy: Proxy, slow: Path
) -> None:
    before = starts(slow)
    for number in range(300):
        name = ("alpha", "beta")[number % 2]
        told = load(proxy, name, wait=False, enable_thinking=True, adapters=[f"/a/{number}"])
        assert told.status_code == 202
    answered = ask(proxy, "POST", CHAT, BOB, json=HELLO)
    assert answered.ok
    assert starts(slow) - before <= 2, "the load under way, and perhaps the last"
    until(lambda: options(proxy).get("adapters") == ["/a/299"], what="the last load")
    assert starts(slow) - before <= 3


@pytest.mark.parametrize("stream", [False, True])
def test_loads_of_disconnected_clients_are_withdrawn(
    proxy: Proxy, slow: Path, stream: bool
) -> None:
    before = starts(slow)
    address = ("127.0.0.1", proxy.port)
    for number in range(30):
        body = {"model_id": "tiny/beta", "stream": stream, "adapters": [f"/left/{number}"]}
        raw = json.dumps(body).encode()
        key = (ALICE, BOB)[number % 2]
        head = f"POST {LOAD} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        with socket.create_connection(address) as connection:
            connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
            if not number:
                until(lambda: starts(slow) > before, what="the first load's start")
    assert ask(proxy, "POST", CHAT, CARLA, json=HELLO).ok
    assert load(proxy, "alpha", CARLA).ok
    assert starts(slow) - before <= 3, "the one that had begun, perhaps one that ended, and ours"


def test_one_clients_loads_leave_places_for_another_client(proxy: Proxy, slow: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        many = [
            pool.submit(load, proxy, "beta", adapters=[f"/many/{number}"]) for number in range(12)
        ]
        until(lambda: sum(one.done() for one in many) >= 8, what="the refusals")
        assert load(proxy, "alpha", BOB, wait=False).status_code == 202
        assert ask(proxy, "POST", CHAT, BOB, json=HELLO).ok
        codes = sorted(one.result().status_code for one in many)
    assert codes == [200] * 4 + [429] * 8
    refused = next(one.result() for one in many if one.result().status_code == 429)
    assert shape(refused.json())["code"] == "too_many_requests"
    assert int(refused.headers["Retry-After"]) > 0


# -- what is on disk


def pid(proxy: Proxy) -> int:
    return int(ask(proxy, "GET", "/v1/models/loaded").json()["pid"])


def test_a_model_whose_files_were_rewritten_is_loaded_again(proxy: Proxy, folder: Path) -> None:
    assert load(proxy, "alpha").ok
    before = pid(proxy)
    assert load(proxy, "alpha").json()["changed"] is False
    assert pid(proxy) == before
    config = folder / "models" / "tiny" / "alpha" / "generation_config.json"
    config.write_text("{}")
    assert load(proxy, "alpha").json()["changed"] is True
    assert pid(proxy) != before
    assert load(proxy, "alpha").json()["changed"] is False


def test_a_symbolic_link_to_another_model_is_loaded_again(proxy: Proxy, folder: Path) -> None:
    link = folder / "models" / "current"
    for name in ("alpha", "beta"):
        target = folder / "elsewhere" / name
        shutil.copytree(folder / "models" / "tiny" / name, target, copy_function=os.link)
    link.symlink_to(folder / "elsewhere" / "alpha")
    assert ask(proxy, "POST", LOAD, json={"model_id": "current"}).json()["changed"] is True
    assert ask(proxy, "POST", LOAD, json={"model_id": "current"}).json()["changed"] is False
    link.unlink()
    link.symlink_to(folder / "elsewhere" / "beta")
    assert ask(proxy, "POST", LOAD, json={"model_id": "current"}).json()["changed"] is True


def test_a_load_of_the_model_that_a_chat_has_loaded_changes_nothing(proxy: Proxy) -> None:
    ask(proxy, "POST", "/v1/models/unload")
    assert ask(proxy, "POST", CHAT, json={**HELLO, "model": "tiny/beta"}).ok
    assert load(proxy, "beta").json()["changed"] is False
