"""What the soak takes for a backend."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.proxy import Proxy
from tests.support.waiting import until
from tools.soak.processes import alive, backends

START = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {!r}]); time.sleep(60)"
)


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Proxy]:
    """A process that has started one, which has started one: proxy, backend, compiler."""
    compiler = "import time; time.sleep(60)"
    proxy = Proxy(tmp_path / "instance", None)
    proxy.process = subprocess.Popen(
        [sys.executable, "-c", START.format(START.format(compiler))], text=True
    )
    yield proxy
    proxy.clean_up()


def test_the_soak_counts_a_child_of_a_backend_as_no_second_backend(family: Proxy) -> None:
    until(lambda: len(alive(family)) == 2, what="a backend with a compiler")
    (backend,) = backends(family)
    assert backend.parent() is not None
    assert [child.pid for child in backend.children()] != []
