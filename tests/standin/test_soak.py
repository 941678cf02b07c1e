"""What the soak takes for a backend."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.proxy import Proxy
from tests.support.waiting import until
from tools.soak.processes import Samples, alive, backends

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


@pytest.mark.parametrize(("budget", "exceeded"), [(1 << 20, True), (1 << 30, False)])
def test_the_soak_finds_backends_that_hold_more_than_their_budget(
    family: Proxy, budget: int, exceeded: bool
) -> None:
    until(lambda: len(alive(family)) == 2, what="a backend with a compiler")
    assert family.process is not None
    samples = Samples(family, psutil.Process(family.process.pid), max_loaded=1, budget=budget)
    until(lambda: samples.memory, what="a sample")
    samples.stop()
    assert samples.models == 1
    assert samples.memory > sum(each.memory_info().rss for each in backends(family))
    assert any("allowed" in sentence for sentence in samples.excess) is exceeded
