"""The backend is started with one defect mended, wherever its own script can be run that way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mlxproxy import mended
from mlxproxy.backend import MENDED, program_command
from tests.conftest import SERVER_BIN

PIP = "import sys\nfrom mlx_lm.server import main\nsys.exit(main())\n"
SHELL = "#!/bin/sh\n'''exec' %s \"$0\" \"$@\"\n' '''\n"


@pytest.mark.parametrize(
    ("head", "python"),
    [
        ("#!/venv/bin/python3\n", "/venv/bin/python3"),
        ("#!/my models/bin/python3.12\n", "/my models/bin/python3.12"),
        (SHELL % '"/my models/bin/python3.12"', "/my models/bin/python3.12"),
        (SHELL % "/very/long/bin/python", "/very/long/bin/python"),
        (SHELL % "'/my models/bin/python3.13t'", "/my models/bin/python3.13t"),
        ("#! /venv/bin/pypy3\n", "/venv/bin/pypy3"),
    ],
)
def test_the_script_of_pip_is_run_by_its_own_python(tmp_path: Path, head: str, python: str) -> None:
    program = tmp_path / "mlx_lm.server"
    program.write_text(head + PIP)
    assert program_command(program) == [python, str(MENDED), str(program)]


@pytest.mark.parametrize(
    "script",
    [
        "#!/bin/sh\nexec mlx_lm.server --log-level DEBUG $@\n",
        "#!/usr/bin/env python3\n" + PIP,
        "#!/venv/bin/python3 -E\n" + PIP,
        "#!/venv/bin/python3\nprint('something else')\n",
        "\x7fELF",
    ],
)
def test_any_other_program_is_run_as_it_is(tmp_path: Path, script: str) -> None:
    program = tmp_path / "mlx_lm.server"
    program.write_text(script)
    assert program_command(program) == [str(program)]


def test_a_program_that_cannot_be_read_is_run_as_it_is(tmp_path: Path) -> None:
    assert program_command(tmp_path / "missing") == [str(tmp_path / "missing")]


def test_another_mlx_lm_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    older = ModuleType("mlx_lm.models.cache")
    models = ModuleType("mlx_lm.models")
    models.cache = older  # type: ignore[attr-defined]
    for module in (ModuleType("mlx_lm"), models, older):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    before = dict(vars(older))
    mended.mend()
    assert vars(older) == before
    monkeypatch.setitem(sys.modules, "mlx_lm.models", None)  # importing it fails
    mended.mend()


@pytest.fixture
def mend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from mlx_lm.models import cache

    kept = cache.LRUPromptCache.fetch_nearest_cache
    mended.mend()
    yield
    cache.LRUPromptCache.fetch_nearest_cache = kept


@pytest.mark.backend
def test_a_prompt_that_is_all_in_the_cache_keeps_its_last_token(mend: None) -> None:
    import mlx.core as mx
    from mlx_lm.models.cache import ArraysCache, KVCache, LRUPromptCache

    keys = mx.zeros((1, 1, 3, 4))
    grown = KVCache()
    grown.update_and_fetch(keys, keys)
    kept = LRUPromptCache()
    kept.insert_cache("model", [1, 2, 3], [grown])
    (found,), rest = kept.fetch_nearest_cache("model", [1, 2, 3])
    assert (found.offset, rest) == (2, [3])
    assert kept.fetch_nearest_cache("model", [1, 2, 3, 4])[1] == [4]
    kept.insert_cache("model", [7, 8], [ArraysCache(1)])  # what recurrent layers keep
    assert kept.fetch_nearest_cache("model", [7, 8]) == (None, [7, 8])


def test_the_backends_script_of_this_machine_is_of_that_kind() -> None:
    assert program_command(SERVER_BIN)[1:] == [str(MENDED), str(SERVER_BIN)]
