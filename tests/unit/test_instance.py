"""The files of the instance folder, in whatever state they are found."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import psutil
import pytest

from mlxproxy.backend import processes
from mlxproxy.backend.lock import AlreadyRunning, PortLock
from mlxproxy.backend.orphan import ChildRecord, Orphans, Record
from mlxproxy.controller import History
from mlxproxy.files import read_record
from tests.support.damaged_files import DAMAGES, FILES, damaged
from tests.support.model_folders import catalog_of
from tests.support.waiting import until

# -- damaged files


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_the_instance_folder_counts_as_missing(
    name: str, kind: str, tmp_path: Path, models: Path
) -> None:
    path = damaged(tmp_path / name.format(1), kind)
    history = History(tmp_path / "history.json")
    assert history.last() in (
        None,
        {"model_id": "tiny/alpha", "enable_thinking": False, "ttl": None},
    )
    history.unloaded()
    lock, record = PortLock(tmp_path, range(1, 2)), ChildRecord(tmp_path, 1)
    lock.acquire()
    Orphans(tmp_path, range(1, 2)).reclaim()
    record.starting(["x", "y"])
    assert Record.read(tmp_path / "backend-1.json").command == ("x", "y")
    record.started(["x", "y"], os.getpid())
    record.stopped()
    lock.release()
    catalog = catalog_of([models], cache_file=tmp_path / "catalog.json", patience=10)
    assert [model.id for model in catalog.models()] == ["tiny/alpha", "tiny/beta"]
    if name in ("history.json", "catalog.json"):
        until(lambda: read_record(path), what="the new file in the old one's place")


def test_a_catalog_cache_with_wrong_values_is_read_again(tmp_path: Path, models: Path) -> None:
    cache = tmp_path / "catalog.json"
    assert len(catalog_of([models], cache_file=cache, patience=10).models()) == 2
    until(cache.exists, what="the cache")
    stored = json.loads(cache.read_text())
    for entry in stored["roots"][str(models)].values():
        entry["model"]["size_bytes"] = "many"
    cache.write_text(json.dumps(stored))
    models_found = catalog_of([models], cache_file=cache, patience=10).models()
    assert all(isinstance(model.size_bytes, int) for model in models_found)


# -- a wrapper whose child goes its own way


def test_a_process_that_cannot_be_killed_is_waited_for_no_longer_than_configured() -> None:
    """A process that the system does not end (it waits for a lost disk) and one that was reaped."""
    immortal = psutil.Process()
    begun = time.monotonic()

    class Immortal(psutil.Process):
        def kill(self) -> None:
            pass

    left = processes.kill(lambda: [Immortal(immortal.pid)], 0.3)
    assert [process.pid for process in left] == [immortal.pid]
    assert time.monotonic() - begun < 5


# -- several slots


def test_a_proxy_holds_the_ports_of_all_its_slots(tmp_path: Path) -> None:
    holder = PortLock(tmp_path, range(7000, 7003))
    holder.acquire()
    for ports in (range(7002, 7003), range(6998, 7001), range(7000, 7001)):
        with pytest.raises(AlreadyRunning, match=str(os.getpid())):
            PortLock(tmp_path, ports).acquire()
    beside = PortLock(tmp_path, range(6998, 7000))  # nothing of a refused one is kept
    beside.acquire()
    beside.release()
    holder.release()
    again = PortLock(tmp_path, range(7002, 7003))
    again.acquire()
    again.release()
