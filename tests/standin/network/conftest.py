"""What may come over the network, and what may go out; SECURITY.md says what each test is for.

Each file has one proxy over the scripted stand-in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import scripted_server
from tests.support.network import ALICE, BOB, CARLA, MAX_BODY, PAGE, PLACES, QUEUE, ask, describe
from tests.support.proxy import Proxy
from tests.support.waiting import until


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
