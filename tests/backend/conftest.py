"""What the tests with the real mlx-lm share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import tiny_models
from tests.support.server_process import SERVER_BIN, Server, serve


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`mlx_lm.server` itself, with a tiny model."""
    folder = tmp_path_factory.mktemp("real")
    with serve(SERVER_BIN, tiny_models.build(folder / "ada", says="ada"), folder / "log") as server:
        yield server
