"""Which models folder a start without settings takes, and what it says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from mlxproxy import main, settings, wiring
from mlxproxy.blueprints.app import create_app
from mlxproxy.blueprints.services import Services
from mlxproxy.catalog import catalog
from mlxproxy.catalog.scanning import Inspect, Snapshot, scan
from mlxproxy.commands.client import Client
from mlxproxy.commands.ls import ls
from mlxproxy.demo import provide
from tests.support import model_folders, tiny_models
from tests.support.model_folders import catalog_of
from tests.support.ports import free_port
from tests.support.waiting import until


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with LM Studio's own folder in it."""
    home = tmp_path / "home"
    (home / ".lmstudio").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture
def provided(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that the demo model was provided in."""
    model_folders: list[Path] = []
    monkeypatch.setattr(provide, "ensure", model_folders.append)
    return model_folders


def given(tmp_path: Path, **env: str) -> settings.Settings:
    environment = {f"MLXPROXY_{name}": value for name, value in env.items()}
    return settings.load({}, {"MLXPROXY_INSTANCE_PATH": str(tmp_path / "instance"), **environment})


def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Makes each reading of a models folder last until the event is set."""
    may_end = threading.Event()

    def slow(root: str, previous: Snapshot, inspect: Inspect) -> Snapshot:
        assert may_end.wait(30)
        return scan(root, previous, inspect)

    monkeypatch.setattr(catalog, "scan", slow)
    return may_end


def test_a_machine_with_mlx_models_of_its_own_gets_no_demo_model(
    home: Path, provided: list[Path], tmp_path: Path
) -> None:
    tiny_models.build(home / ".lmstudio" / "models" / "tiny" / "own")
    found = main.with_models(given(tmp_path))
    assert found.models_root == (home / ".lmstudio" / "models",)
    assert not provided


def test_without_lm_studio_the_demo_model_is_provided(
    home: Path, provided: list[Path], tmp_path: Path
) -> None:
    found = main.with_models(given(tmp_path))
    assert found.models_root == (tmp_path / "instance" / "models",)
    assert provided == [tmp_path / "instance" / "models"]


def test_with_only_gguf_models_the_demo_model_stands_beside_lm_studios_folder(
    home: Path, provided: list[Path], tmp_path: Path
) -> None:
    folder = home / ".lmstudio" / "models"
    (folder / "org" / "model").mkdir(parents=True)
    (folder / "org" / "model" / "model.gguf").write_bytes(b"GGUF")
    found = main.with_models(given(tmp_path))
    assert found.models_root == (folder, tmp_path / "instance" / "models")
    assert provided


def test_a_slow_library_is_not_taken_for_an_empty_one(
    home: Path, provided: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = home / ".lmstudio" / "models"
    folder.mkdir()
    may_end = slow_disk(monkeypatch)
    monkeypatch.setattr(wiring, "Catalog", partial(catalog.Catalog, patience=0.05))
    assert main.with_models(given(tmp_path)).models_root == (folder,)
    assert not provided
    may_end.set()
    until(lambda: main.with_models(given(tmp_path)).models_root != (folder,), what="the demo")
    assert provided


def test_a_folder_of_lm_studios_on_a_disk_that_is_not_mounted_gets_no_demo_model(
    home: Path, provided: list[Path], tmp_path: Path
) -> None:
    disk = tmp_path / "Volumes" / "SSD" / "models"
    (home / ".lmstudio" / "settings.json").write_text(json.dumps({"downloadsFolder": str(disk)}))
    assert main.with_models(given(tmp_path)).models_root == (disk,)
    assert not provided


def test_a_models_root_that_is_set_gets_no_demo_model(
    home: Path, provided: list[Path], tmp_path: Path
) -> None:
    found = main.with_models(given(tmp_path, MODELS_ROOT="/nowhere"))
    assert found.models_root == (Path("/nowhere"),)
    assert not provided


def test_the_proxy_starts_although_the_demo_model_cannot_be_downloaded(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def offline(models: Path) -> Path:
        raise provide.DemoUnavailable("The demo model cannot be downloaded: offline.")

    monkeypatch.setattr(provide, "ensure", offline)
    found = main.with_models(given(tmp_path))
    assert found.models_root == (home / ".lmstudio" / "models",)
    assert "offline" in caplog.text


# -- while a large library is being read


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    """A proxy whose callers wait for hardly any disk."""
    monkeypatch.setattr(wiring, "Catalog", partial(catalog.Catalog, patience=0.05))
    model_folders.model(tmp_path / "models" / "publisher" / "model")
    made = wiring.build(
        given(tmp_path, MODELS_ROOT=str(tmp_path / "models"), MLX_BACKEND_PORT=str(free_port()))
    )
    yield made.services
    made.close()


def listing(parts: Services) -> tuple[int, dict[str, Any]]:
    answer = create_app(parts).test_client().get("/v1/models")
    assert (answer.status_code == 503) == ("Retry-After" in answer.headers)
    return answer.status_code, answer.get_json()


def test_the_first_listing_waits_for_a_library_that_takes_longer_than_others_may(
    parts: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = slow_disk(monkeypatch)
    threading.Timer(0.4, may_end.set).start()  # longer than the catalogue's patience
    status, told = listing(parts)
    assert status == 200
    assert told["complete"] is True
    assert [item["id"] for item in told["data"]] == ["publisher/model"]


def test_a_library_that_has_not_been_read_yet_is_not_listed_as_empty(
    parts: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = slow_disk(monkeypatch)
    hasty = catalog_of(parts.roots, patience=0.05, first_patience=0.05)
    parts = replace(parts, catalog=hasty)
    status, told = listing(parts)
    assert status == 503
    assert told["error"]["code"] == "models_root_unavailable"
    assert "still being read" in told["error"]["message"]
    may_end.set()
    until(lambda: listing(parts)[0] == 200, what="the listing")
    assert listing(parts)[1]["complete"] is True


def test_a_model_is_found_while_its_folder_is_read_for_the_first_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first load after a start is not told to try again."""
    tiny_models.build(tmp_path / "tiny" / "alpha")
    may_end = slow_disk(monkeypatch)
    library = catalog_of([tmp_path], patience=0.05)
    end = threading.Timer(0.5, may_end.set)
    end.start()
    assert library.find("tiny/alpha").id == "tiny/alpha"
    end.join()


def test_a_listing_without_one_of_the_folders_says_that_it_is_not_complete(
    parts: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()
    disk = str(tmp_path / "disk")
    (tmp_path / "disk").mkdir()

    def slow(root: str, previous: Snapshot, inspect: Inspect) -> Snapshot:
        assert root != disk or may_end.wait(30)
        return scan(root, previous, inspect)

    monkeypatch.setattr(catalog, "scan", slow)
    two_disks = catalog_of(
        [tmp_path / "models", tmp_path / "disk"], patience=0.2, first_patience=0.2
    )
    parts = replace(parts, catalog=two_disks)
    until(lambda: parts.catalog.models(), what="the first folder's model")
    status, told = listing(parts)
    assert status == 200
    assert told["complete"] is False
    assert [item["id"] for item in told["data"]] == ["publisher/model"]
    may_end.set()
    until(lambda: listing(parts)[1]["complete"], what="the whole listing")


def test_ls_says_that_a_listing_may_be_incomplete(capsys: pytest.CaptureFixture[str]) -> None:
    class Answering:
        complete = False

        def get(self, path: str) -> dict[str, Any]:
            if path == "/health":
                return {"models_root": ["/models"]}
            return {"object": "list", "complete": self.complete, "data": []}

    proxy = Answering()
    client = cast(Client, proxy)
    ls(client, everything=False, as_json=False)
    said = capsys.readouterr()
    assert "still being read" in said.err
    assert "can be loaded" not in said.err
    proxy.complete = True
    ls(client, everything=False, as_json=False)
    said = capsys.readouterr()
    assert "still being read" not in said.err
    assert "No model in /models can be loaded" in said.err
