"""Which models folder a start without settings takes, and what it says."""

from __future__ import annotations

import json
import threading
from functools import partial
from pathlib import Path

import pytest

from mlxproxy import demo, services, serving, settings
from mlxproxy.catalog import catalog
from mlxproxy.catalog.scanning import Inspect, Snapshot, scan
from tests import tiny
from tests.conftest import until


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
    folders: list[Path] = []
    monkeypatch.setattr(demo, "ensure", folders.append)
    return folders


def given(tmp_path: Path, **env: str) -> settings.Settings:
    environment = {f"MLXPROXY_{name}": value for name, value in env.items()}
    return settings.load({}, {"MLXPROXY_INSTANCE_PATH": str(tmp_path / "instance"), **environment})


def test_a_machine_with_mlx_models_of_its_own_gets_no_demo_model(
    home: Path, provided: list[Path], tmp_path: Path
) -> None:
    tiny.build(home / ".lmstudio" / "models" / "tiny" / "own")
    found = serving.with_models(given(tmp_path))
    assert found.models_root == (home / ".lmstudio" / "models",)
    assert not provided


def test_without_lm_studio_the_demo_model_is_provided(
    home: Path, provided: list[Path], tmp_path: Path
) -> None:
    found = serving.with_models(given(tmp_path))
    assert found.models_root == (tmp_path / "instance" / "models",)
    assert provided == [tmp_path / "instance" / "models"]


def test_with_only_gguf_models_the_demo_model_stands_beside_lm_studios_folder(
    home: Path, provided: list[Path], tmp_path: Path
) -> None:
    folder = home / ".lmstudio" / "models"
    (folder / "org" / "model").mkdir(parents=True)
    (folder / "org" / "model" / "model.gguf").write_bytes(b"GGUF")
    found = serving.with_models(given(tmp_path))
    assert found.models_root == (folder, tmp_path / "instance" / "models")
    assert provided


def test_a_library_that_takes_long_to_read_is_not_taken_for_an_empty_one(
    home: Path, provided: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = home / ".lmstudio" / "models"
    folder.mkdir()
    may_end = threading.Event()

    def slow(root: str, previous: Snapshot, inspect: Inspect) -> Snapshot:
        may_end.wait(30)
        return scan(root, previous, inspect)

    monkeypatch.setattr(catalog, "scan", slow)
    monkeypatch.setattr(services, "Catalog", partial(catalog.Catalog, patience=0.05))
    assert serving.with_models(given(tmp_path)).models_root == (folder,)
    assert not provided
    may_end.set()
    until(lambda: serving.with_models(given(tmp_path)).models_root != (folder,), what="the demo")
    assert provided


def test_a_folder_of_lm_studios_on_a_disk_that_is_not_mounted_gets_no_demo_model(
    home: Path, provided: list[Path], tmp_path: Path
) -> None:
    disk = tmp_path / "Volumes" / "SSD" / "models"
    (home / ".lmstudio" / "settings.json").write_text(json.dumps({"downloadsFolder": str(disk)}))
    assert serving.with_models(given(tmp_path)).models_root == (disk,)
    assert not provided


def test_a_folder_that_is_set_is_taken_as_it_is(
    home: Path, provided: list[Path], tmp_path: Path
) -> None:
    found = serving.with_models(given(tmp_path, MODELS_ROOT="/nowhere"))
    assert found.models_root == (Path("/nowhere"),)
    assert not provided


def test_where_the_demo_cannot_be_had_the_proxy_starts_all_the_same(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def offline(models: Path) -> Path:
        raise demo.DemoUnavailable("The demo model cannot be downloaded: offline.")

    monkeypatch.setattr(demo, "ensure", offline)
    found = serving.with_models(given(tmp_path))
    assert found.models_root == (home / ".lmstudio" / "models",)
    assert "offline" in caplog.text
