"""What the tests over the scripted stand-in share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import scripted_server


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for `mlx_lm.server`, one for all tests of a module."""
    return scripted_server.install(tmp_path_factory.mktemp("standin"))
