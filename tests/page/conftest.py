"""What the tests of the page share: a browser, and a proxy over the scripted stand-in.

The browser is the Chromium or Chrome of the system; without one, or without Playwright, they are
skipped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import model_folders, scripted_server
from tests.support.proxy import Proxy

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
MILLISECONDS = 10_000  # that a wait in the browser may take


def program_of_the_browser() -> str | None:
    """Return the path of the system's browser; the variable BROWSER_PROGRAM may name another."""
    named = os.environ.get("BROWSER_PROGRAM")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    return named or found or (MAC if Path(MAC).exists() else None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A browser without a window."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = program_of_the_browser()
    if program is None and "BROWSER_REQUIRED" in os.environ:
        pytest.fail("there is no Chromium or Chrome here")
    if program is None:
        pytest.skip("there is no Chromium or Chrome here (on Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@dataclass
class Site:
    """A proxy over the stand-in, with three models that a test may load."""

    proxy: Proxy
    program: Path

    def script(self, **changes: Any) -> None:
        """Change what the stand-in does, from its usual script."""
        scripted_server.change(self.program, **{**scripted_server.SCRIPT, **changes})


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One proxy for all tests of a file."""
    folder = tmp_path_factory.mktemp("page")
    for name in ("alpha", "beta"):
        model_folders.model(folder / "models" / "tiny" / name)
    model_folders.model(folder / "models" / "tiny" / "odd", config={"model_type": "unheard_of"})
    program = scripted_server.install(folder / "standin")
    proxy = Proxy(folder / "instance", folder / "models", MLX_SERVER_BIN=program)
    yield Site(proxy.start(), program)
    proxy.clean_up()


@pytest.fixture
def site(house: Site) -> Site:
    """The proxy as each test finds it: the usual script, and tiny/alpha loaded."""
    house.script()
    assert house.proxy.load("tiny/alpha").ok
    return house


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open the page in a browser of its own; whatever its console reports fails the test."""
    contexts: list[Any] = []
    problems: list[str] = []

    def opener(proxy: Proxy, part: str = "", allowed: tuple[str, ...] = (), **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(MILLISECONDS)
        page = context.new_page()

        def console(message: Any) -> None:
            known = any(text in message.text for text in allowed)
            if message.type in ("error", "warning") and not known:
                problems.append(message.text)

        page.on("console", console)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"{proxy.url}/#{part}")
        return page

    yield opener
    for context in contexts:
        context.close()
    assert problems == []
