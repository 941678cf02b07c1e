"""Loads as several clients ask for them: what a body may say, who waits, whose load is given up.

One proxy over the scripted stand-in serves the whole file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from mlxproxy.catalog import LONGEST_NAME
from tests import standin, tiny
from tests.conftest import Proxy

pytestmark = [pytest.mark.standin, pytest.mark.xdist_group("management")]

ALICE, BOB, CARLA = "key-of-alice", "key-of-bob", "key-of-carla"
LOAD, CHAT = "/v1/models/load", "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("management")


@pytest.fixture(scope="module")
def program(folder: Path) -> Path:
    return standin.install(folder / "standin", events=3)


@pytest.fixture(scope="module")
def proxy(folder: Path, program: Path) -> Iterator[Proxy]:
    """A proxy of three clients with two models, whose library the tests may change."""
    for name in ("alpha", "beta"):
        tiny.build(folder / "models" / "tiny" / name, says=name)
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


def error(answer: requests.Response) -> dict[str, Any]:
    """The error object, after a look at its shape."""
    found: dict[str, Any] = answer.json()["error"]
    assert found["message"].strip().endswith((".", "?"))
    return found


# -- what a body may say


@pytest.mark.parametrize("name", ["a\u0315\u0300" * 60_000, "x" * (LONGEST_NAME + 1)])
def test_a_name_that_is_no_path_any_more_is_an_unknown_model(proxy: Proxy, name: str) -> None:
    assert load(proxy, "alpha").ok
    refused = ask(proxy, "POST", LOAD, json={"model_id": name})
    assert refused.status_code == 404
    assert error(refused)["code"] == "model_not_found"
    answered = ask(proxy, "POST", CHAT, json={**HELLO, "model": name})
    assert answered.json()["choices"][0]["message"]["content"].startswith("alpha0")
    listed = ask(proxy, "GET", f"/v1/models/{name[:5000]}")
    assert listed.status_code == 404
    assert error(listed)["code"] == "model_not_found"


@pytest.mark.parametrize("field", ["adapters", "draft_models"])
@pytest.mark.parametrize("value", [[f"/a/{n}" for n in range(17)], ["/" + "a" * LONGEST_NAME]])
def test_a_load_names_few_adapters_of_a_paths_length(
    proxy: Proxy, field: str, value: list[str]
) -> None:
    refused = load(proxy, "alpha", **{field: value})
    assert refused.status_code == 400
    assert error(refused)["param"] == field
    assert "at most" in error(refused)["message"]
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
def test_a_text_that_cannot_be_given_back_is_refused_with_its_field(
    proxy: Proxy, path: str, field: str, value: str, text: str
) -> None:
    fields = {"model_id": '"tiny/alpha"', field: value.format(text)}
    raw = "{" + ", ".join(f'"{name}": {it}' for name, it in fields.items()) + "}"
    assert json.loads(raw)
    refused = ask(proxy, "POST", path, data=raw)
    assert refused.status_code == 400
    assert error(refused)["code"] == "invalid_request"
    assert error(refused)["param"] == field
