"""Every path but /health needs one of the keys."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import openai
import pytest

from tests.support.network import ALICE, BOB, CALLS, CARLA, WRONG, ask, describe, is_refusal
from tests.support.proxy import Proxy

PAGE_FILES = "/page/"
NEARLY_OPEN = [
    "/page",
    "/PAGE/x/y",
    "/v1/models?/page/",
    "/v1/models;/page/",
    "/health/",
    "/HEALTH",
    "/health;x",
    "/health%2f",
    "/health/../v1/models",
    "/v1/models?/health",
    "/v1/models;/health",
    "/v1/../health/v1/models",
]


@pytest.mark.parametrize("key", [None, WRONG], ids=["no key", "a wrong key"])
def test_every_path_but_the_open_ones_needs_a_key(proxy: Proxy, key: str | None) -> None:
    for method, path in [*CALLS, *(("GET", path) for path in NEARLY_OPEN)]:
        if path.startswith(PAGE_FILES):
            continue
        answer = ask(proxy, method, path, key, data="{}")
        assert answer.status_code == 401, (method, path)
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        if method != "HEAD":
            assert is_refusal(path, answer.json(), "invalid_api_key")
    assert describe(proxy)["id"] == "tiny/alpha", "the unload was refused"


def test_a_browser_without_the_key_gets_the_page_and_nothing_else(proxy: Proxy) -> None:
    browser = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
    page = ask(proxy, "GET", "/", None, headers=browser)
    assert page.ok
    assert page.content == ask(proxy, "GET", "/", headers=browser).content
    files = re.findall(r'(?:href|src)="(/page/\S+)"', page.text)
    assert len(files) > 10
    assert all(ask(proxy, "GET", file, None).ok for file in files)
    for method, path in CALLS:
        if path != "/" and not path.startswith(PAGE_FILES):
            answer = ask(proxy, method, path, None, headers=browser, data="{}")
            assert answer.status_code == 401, (method, path)


@pytest.mark.parametrize("key", [ALICE, BOB, CARLA])
def test_every_key_is_accepted_in_either_header(proxy: Proxy, key: str) -> None:
    assert ask(proxy, "GET", "/v1/models", key).ok
    assert ask(proxy, "GET", "/v1/models", None, headers={"x-api-key": key}).ok


def test_the_openai_package_reports_a_wrong_key_as_an_authentication_error(proxy: Proxy) -> None:
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
    root = Path(__file__).parents[3]
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
