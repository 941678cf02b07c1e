"""Will it fit? The estimate is what mlx-lm takes, and the machine's share is what there is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from mlxproxy.backend import memory
from mlxproxy.backend.memory import SMALLEST_CACHE_BYTES, Fit, Memory, fit, scarcity, working_set
from mlxproxy.catalog.model import DEFAULT_CONTEXT, KVCache, Model

GB = 1 << 30

MODEL = Model(id="a/b", path=Path("/a/b"), weights_bytes=1000, kv_cache=KVCache(10))


def test_a_model_takes_its_weights_and_its_context() -> None:
    assert MODEL.memory_bytes(0) == 1000
    assert MODEL.memory_bytes(50) == 1500
    assert MODEL.memory_bytes() == 1000 + 10 * DEFAULT_CONTEXT


def test_a_context_beyond_the_models_own_is_not_counted() -> None:
    assert replace(MODEL, max_context_length=100).memory_bytes(10**9) == 2000


def test_layers_with_a_window_stop_growing() -> None:
    cache = KVCache(per_token=10, windowed_per_token=5, window=100)
    assert [cache.bytes(context) for context in (0, 50, 100, 1000)] == [0, 750, 1500, 10500]


def test_a_cache_of_unknown_size_is_left_out() -> None:
    assert replace(MODEL, kv_cache=None).memory_bytes(50) == 1000


def test_whether_a_model_fits_is_said_with_the_numbers() -> None:
    assert fit(MODEL, available=1500, context=50) == Fit(needed=1500, available=1500)
    assert fit(MODEL, available=1500, context=50).fits
    assert not fit(MODEL, available=1499, context=50).fits
    sentence = Fit(needed=18_240_000_000, available=16_000_000_000).sentence()
    assert "18.2 GB" in sentence
    assert "16.0 GB" in sentence
    assert "estimate" in sentence


@pytest.mark.parametrize(
    ("total", "limit_mb", "expected"),
    [
        (16 * GB, 0, 16 * GB * 2 // 3),
        (32 * GB, 0, 32 * GB * 2 // 3),
        (36 * GB, 0, 27 * GB),
        (128 * GB, 0, 96 * GB),
        (64 * GB, 57344, 56 * GB),
        (64 * GB, 10**9, 64 * GB),
    ],
)
def test_a_macs_memory_for_models_is_metals_limit_or_the_users_own(
    total: int, limit_mb: int, expected: int
) -> None:
    assert working_set(total, limit_mb) == expected


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this a machine with so much memory, of which so much is free."""

    def make(total: int, free: int, platform: str = "linux") -> None:
        figures = SimpleNamespace(total=total, available=free)
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: figures)
        monkeypatch.setattr(memory.sys, "platform", platform)
        monkeypatch.setattr(memory, "_sysctl", lambda name, kind: None)

    return make


Machine = Callable[..., None]


def test_one_model_may_have_all_that_is_free_and_what_the_present_one_gives_back(
    machine: Machine,
) -> None:
    machine(total=100 * GB, free=30 * GB)
    assert Memory().available() == 30 * GB
    assert Memory().available(held=60 * GB) == 90 * GB
    assert Memory().available(held=1000 * GB) == 100 * GB


def test_several_models_leave_a_part_of_the_memory(machine: Machine) -> None:
    machine(total=100 * GB, free=95 * GB)
    assert Memory(models=2).available() == 80 * GB
    machine(total=100 * GB, free=10 * GB)
    assert Memory(models=2).available(held=20 * GB) == 30 * GB


@pytest.mark.parametrize(("budget", "expected"), [(24 * GB, 24 * GB), (0.5, 50 * GB)])
@pytest.mark.parametrize("models", [1, 3])
def test_a_budget_is_kept_to_even_if_more_is_free(
    machine: Machine, budget: int | float, expected: int, models: int
) -> None:
    for platform in ("linux", "darwin"):
        machine(total=100 * GB, free=95 * GB, platform=platform)
        assert Memory(budget, models).available() == expected
    machine(total=100 * GB, free=10 * GB)
    assert Memory(budget, models).available(held=GB) == 11 * GB


def test_without_a_budget_a_mac_gives_what_metal_recommends(machine: Machine) -> None:
    machine(total=64 * GB, free=2 * GB, platform="darwin")
    assert Memory(models=3).available() == Memory().available(held=GB) == 48 * GB


def test_a_system_that_shows_no_memory_refuses_nothing_but_what_the_budget_forbids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "ask", lambda question: None)
    assert Memory().available() == sys.maxsize
    assert Memory(5 * GB).available() == 5 * GB
    assert Memory(0.5).available() == sys.maxsize


def test_the_prompt_cache_of_each_model_has_a_part_of_what_is_left(machine: Machine) -> None:
    machine(total=100 * GB, free=1 * GB)
    assert Memory().cache_bytes(20 * GB) == 40 * GB
    assert Memory(60 * GB, models=3).cache_bytes(10 * GB) == 5 * GB
    assert Memory(60 * GB, models=3).cache_bytes(50 * GB) == SMALLEST_CACHE_BYTES


PSI = """\
some avg10=40.00 avg60=10.00 avg300=1.00 total=1
full avg10={} avg60=2.00 avg300=0.10 total=1
"""


@pytest.mark.parametrize(
    ("available", "pressure", "told"),
    [
        (50, "", None),
        (50, PSI.format("19.99"), None),
        (50, PSI.format("20.01"), "all processes were waiting for memory 20.01 %"),
        (4, PSI.format("0.00"), "only 4.0 GB of memory are left"),
        (50, "full avg10=much", None),
    ],
)
def test_linux_says_in_two_ways_that_memory_runs_out(
    available: int, pressure: str, told: str | None
) -> None:
    found = scarcity(100 * 10**9, available * 10**9, pressure)
    assert found is None if told is None else found is not None and found.startswith(told)


@pytest.mark.parametrize(("level", "runs_out"), [(1, False), (2, False), (4, True), (None, False)])
def test_a_mac_says_by_its_level_of_pressure_that_memory_runs_out(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, level: int | None, runs_out: bool
) -> None:
    machine(total=GB, free=1, platform="darwin")
    asked: list[bytes] = []
    monkeypatch.setattr(memory, "_sysctl", lambda name, kind: asked.append(name) or level)
    assert (memory.shortage() is not None) is runs_out
    assert asked == [b"kern.memorystatus_vm_pressure_level"]


def test_what_the_system_has_killed_for_want_of_memory_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "shortage", lambda: None)
    monkeypatch.setattr(memory, "_read", lambda path: "pgfault 7\noom_kill 3\n")
    assert memory.oom_kills() == 3
    assert memory.ran_out(kills_before=2)
    assert not memory.ran_out(kills_before=3)
    monkeypatch.setattr(memory, "_read", lambda path: "")
    assert memory.oom_kills() == 0
    monkeypatch.setattr(memory, "shortage", lambda: "memory pressure is critical")
    assert memory.ran_out(kills_before=0)


def test_a_macs_process_holds_its_physical_footprint() -> None:
    """As <sys/resource.h> lays out `struct rusage_info_v0`."""

    def proc_pid_rusage(pid: Any, flavor: Any, buffer: Any) -> int:
        assert (pid.value, flavor.value) == (7, 0)
        numbers = list(range(100, 110))
        buffer.raw = bytes(16) + b"".join(each.to_bytes(8, sys.byteorder) for each in numbers)
        return 0

    assert memory._physical_footprint(proc_pid_rusage, 7) == 107
    assert memory._physical_footprint(lambda *_: -1, 7) is None


def test_a_process_holds_memory_and_one_that_is_gone_does_not() -> None:
    held = memory.footprint(os.getpid())
    assert held is not None
    assert held > 1 << 20
    assert memory.footprint(1 << 30) is None


@pytest.mark.skipif(sys.platform != "darwin", reason="Metal is a Mac's")
def test_a_macs_share_is_less_than_its_memory() -> None:
    assert GB < Memory().available() <= psutil.virtual_memory().total
