"""Finding: the listing is what is on disk now, and a model is found by the names people use."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import os
import shutil
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlxproxy import selection
from mlxproxy.catalog import Catalog, layout, scanning
from mlxproxy.catalog import catalog as catalog_module
from mlxproxy.catalog.inspector import Inspectors
from mlxproxy.catalog.layout import Folder
from mlxproxy.catalog.model import Model
from mlxproxy.catalog.scanning import Inspect, Snapshot
from mlxproxy.engines.mlx_lm.inspection import Inspector
from mlxproxy.errors import (
    AmbiguousModel,
    ModelNotFound,
    ModelsRootUnavailable,
    ModelUnusable,
)
from tests.support.model_folders import catalog_of, hub_model, model, write
from tests.support.waiting import until


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def catalog(root: Path) -> Catalog:
    return catalog_of([root], patience=30)


@pytest.fixture
def inspected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the folders that were read. Whatever is old enough to be trusted counts as so."""
    ids: list[str] = []
    inspect = Inspector.__call__

    def watched(self: Inspector, folder: Folder) -> Model:
        ids.append(folder.id)
        return inspect(self, folder)

    monkeypatch.setattr(Inspector, "__call__", watched)
    monkeypatch.setattr(scanning, "_GRAIN", -1)
    return ids


class Disk:
    """Stands between the catalogue and a disk that can stop answering."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.answers.set()
        self.hanging: set[str] | None = None  # these roots; None for all
        self.scans = 0

    def scan(self, root: str, previous: Snapshot, inspect: Inspect) -> Snapshot:
        self.scans += 1
        if self.hanging is None or root in self.hanging:
            assert self.answers.wait(30)
        return scanning.scan(root, previous, inspect)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(catalog_module, "scan", disk.scan)
    yield disk
    disk.answers.set()


def ids(catalog: Catalog) -> list[str]:
    return [model.id for model in catalog.models()]


# -- finding


def test_model_ids_are_paths_below_the_models_folder(root: Path, catalog: Catalog) -> None:
    for id_ in ("zeta/b", "alpha/c", "alpha/a"):
        model(root / id_)
    assert ids(catalog) == ["alpha/a", "alpha/c", "zeta/b"]
    first = catalog.models()[0]
    assert first.path == root / "alpha" / "a"
    assert first.to_dict()["object"] == "model"
    assert first.to_dict()["path"] == str(root / "alpha" / "a")
    assert first.to_dict()["owned_by"] == "alpha"
    assert abs(first.created - time.time()) < 60


def test_models_at_any_depth_are_found(root: Path, catalog: Catalog) -> None:
    model(root / "alone")
    model(root / "a" / "b" / "c" / "deep")
    assert ids(catalog) == ["a/b/c/deep", "alone"]
    assert catalog.models()[1].to_dict()["owned_by"] == "unknown"


def test_hidden_folders_and_partial_downloads_are_not_listed(root: Path, catalog: Catalog) -> None:
    model(root / ".cache" / "huggingface" / "model")
    (root / "publisher" / "coming").mkdir(parents=True)
    (root / "publisher" / "coming" / "downloading_model.safetensors.part").write_bytes(b"1")
    (root / "publisher" / "._model.safetensors").write_bytes(b"macOS's own on other disks")
    assert ids(catalog) == []


def test_a_stray_config_in_a_publishers_folder_hides_no_model(root: Path, catalog: Catalog) -> None:
    model(root / "publisher" / "model")
    write(root / "publisher" / "config.json", {})
    write(root / "config.json", {})
    (root / "left over.gguf").write_bytes(b"GGUF")
    assert ids(catalog) == ["publisher/model"]


def test_a_models_own_folders_are_not_listed(root: Path, catalog: Catalog) -> None:
    model(root / "publisher" / "model")
    model(root / "publisher" / "model" / "original")
    assert ids(catalog) == ["publisher/model"]


def test_a_folder_that_is_a_model_itself_can_be_the_models_folder(tmp_path: Path) -> None:
    catalog = catalog_of([model(tmp_path / "my-model")], patience=30)
    assert ids(catalog) == ["my-model"]
    assert catalog.find("my-model").loadable


def test_a_hugging_face_cache_lists_publisher_and_name(root: Path, catalog: Catalog) -> None:
    snapshot = hub_model(root, "mlx-community/Qwen3-4B-4bit")
    model(root / "datasets--someone--corpus" / "snapshots" / "1")
    (root / "models--nobody--nothing" / "snapshots").mkdir(parents=True)
    (found,) = catalog.models()
    assert found.id == "mlx-community/Qwen3-4B-4bit"
    assert found.path == snapshot
    assert found.publisher == "mlx-community"
    assert found.loadable


def test_a_cache_lists_the_revision_it_fetched_last(
    root: Path, catalog: Catalog, inspected: list[str]
) -> None:
    hub_model(root, "org/name", "old")
    assert catalog.find("org/name").path.name == "old"
    hub_model(root, "org/name", "new")
    assert catalog.find("org/name").path.name == "new"
    assert len(catalog.models()) == 1


def test_a_link_in_the_models_folder_may_lead_anywhere(
    root: Path, catalog: Catalog, tmp_path: Path
) -> None:
    model(tmp_path / "elsewhere" / "publisher" / "model")
    (root / "external").symlink_to(tmp_path / "elsewhere")
    assert ids(catalog) == ["external/publisher/model"]


def test_a_link_in_the_models_folder_is_found_when_its_disk_comes(
    root: Path, catalog: Catalog, tmp_path: Path, inspected: list[str]
) -> None:
    (root / "external").symlink_to(tmp_path / "elsewhere")
    assert ids(catalog) == []
    model(tmp_path / "elsewhere" / "model")
    assert ids(catalog) == ["external/model"]


def test_a_link_further_down_does_not_lead_out_of_the_models_folder(
    root: Path, catalog: Catalog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model(tmp_path / "elsewhere" / "model")
    (root / "publisher").mkdir()
    (root / "publisher" / "link").symlink_to(tmp_path / "elsewhere")
    for _ in range(3):
        assert ids(catalog) == []
    assert len(caplog.messages) == 1
    assert "links to a place outside the models folder" in caplog.messages[0]


def test_circular_links_are_not_followed_for_ever(root: Path, catalog: Catalog) -> None:
    model(root / "publisher" / "model")
    for number in range(20):
        (root / "publisher" / f"again{number}").symlink_to(root)
        (root / f"again{number}").symlink_to(root / "publisher")
    (root / "itself").symlink_to(root / "itself")
    assert ids(catalog) == ["publisher/model"]


def test_a_model_that_is_reached_twice_is_listed_once(root: Path, tmp_path: Path) -> None:
    model(root / "publisher" / "model")
    (root / "a-favourite").symlink_to(root / "publisher" / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "also").symlink_to(root / "publisher")
    catalog = catalog_of([root, tmp_path / "other", root], patience=30)
    assert ids(catalog) == ["publisher/model"]


def test_two_models_with_one_id_are_told_apart_and_logged_once(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model(root / "publisher" / "model")
    second = model(tmp_path / "usb" / "publisher" / "model")
    catalog = catalog_of([root, tmp_path / "usb"], patience=30)
    for _ in range(3):
        assert ids(catalog) == ["publisher/model", "publisher/model@usb"]
    assert catalog.find("publisher/model").path == root / "publisher" / "model"
    assert catalog.find("publisher/model@usb").path == second
    assert len(caplog.messages) == 1
    assert str(second) in caplog.messages[0]


# -- names


@pytest.mark.parametrize(
    "name",
    [
        "mlx-community/Qwen3.5-9B-MLX-4bit",
        "mlx-community/Qwen3.5-9B-MLX-4bit/",
        "MLX-Community/qwen3.5-9b-mlx-4BIT",
        "Qwen3.5-9B-MLX-4bit",
        "qwen3.5-9b-mlx-4bit",
    ],
)
def test_a_model_is_found_by_id_and_short_name_whatever_the_capitals(
    root: Path, catalog: Catalog, name: str
) -> None:
    expected = model(root / "mlx-community" / "Qwen3.5-9B-MLX-4bit")
    model(root / "mlx-community" / "Qwen3.5-9B-MLX-8bit")
    assert catalog.find(name).path == expected


def test_a_model_is_found_by_its_path(root: Path, catalog: Catalog) -> None:
    expected = model(root / "publisher" / "Model")
    assert catalog.find(str(expected)).id == "publisher/Model"
    assert catalog.find(f"{expected}/").id == "publisher/Model"


def test_a_name_with_accents_is_found_however_it_is_encoded(root: Path, catalog: Catalog) -> None:
    model(root / "cafe\u0301" / "model")  # as macOS may write it
    assert catalog.find("caf\u00e9/model").path.name == "model"


@pytest.mark.parametrize(
    "name",
    [
        "/etc",
        "/",
        "",
        ".",
        "..",
        "../models/publisher/model",
        "publisher/../publisher/model",
        "{root}/publisher/../publisher/model",
        "{root}",
        "{root}/publisher",
        "{root}/../outside",
        "{outside}",
        "ublisher/model",
        "a\0b",
        "\ud800",
        "x" * 1_000_000,
    ],
)
def test_a_name_that_is_not_listed_is_not_found(
    root: Path, catalog: Catalog, tmp_path: Path, name: str
) -> None:
    model(root / "publisher" / "model")
    outside = model(tmp_path / "outside")
    with pytest.raises(ModelNotFound) as caught:
        catalog.find(name.replace("{root}", str(root)).replace("{outside}", str(outside)))
    assert len(caught.value.message) < 1000


def test_an_unknown_name_is_answered_with_the_nearest_three(root: Path, catalog: Catalog) -> None:
    for name in ("Qwen3-4B-4bit", "Qwen3-4B-8bit", "Qwen3-8B-4bit", "Llama-3-8B", "gemma-2b"):
        model(root / "mlx-community" / name)
    with pytest.raises(ModelNotFound, match="Did you mean") as caught:
        catalog.find("qwen3-4b-bit")
    message = caught.value.message
    assert "mlx-community/Qwen3-4B-4bit" in message
    assert "mlx-community/Qwen3-4B-8bit" in message
    assert message.count("mlx-community/") <= 3
    assert "gemma" not in message


@pytest.fixture
def normalised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the texts that are put into normal form, which takes their square."""
    lengths: list[int] = []
    normalize = unicodedata.normalize

    def watched(form: str, text: str) -> str:
        lengths.append(len(text))
        return normalize(form, text)  # type: ignore[arg-type]

    monkeypatch.setattr(unicodedata, "normalize", watched)
    return lengths


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "a" + "\u0315\u0300" * 120_000,
        "publisher/" + "a" * 100_000,
        "/" + "a/" * 100_000,
        "/" * 100_000,
        "\u00e9" * (catalog_module.LONGEST_NAME // 2 + 1),  # bytes count, not characters
        "\ud800" * 100_000,
    ],
    ids=["combining marks", "id", "path", "slashes", "bytes", "no text"],
)
def test_a_name_longer_than_any_path_is_unknown_without_a_search(
    root: Path, catalog: Catalog, normalised: list[int], name: str, fresh: bool
) -> None:
    model(root / "publisher" / "model")
    catalog.models()
    with pytest.raises(ModelNotFound, match="No model"):
        catalog.find(name, fresh=fresh)
    assert not normalised


def test_a_name_as_long_as_a_path_is_looked_up(root: Path, catalog: Catalog) -> None:
    parts = [letter * 200 for letter in "abcdefghij"]
    long = model(root.joinpath(*parts))
    assert catalog.find("/".join(parts)).path == long
    assert catalog.find(str(long).upper().replace(str(root).upper(), str(root))).path == long


def test_names_are_folded_once_per_listing_and_not_per_lookup(
    root: Path, catalog: Catalog, normalised: list[int]
) -> None:
    for number in range(20):
        model(root / "publisher" / f"model-{number}")
    catalog.find("MODEL-3")
    normalised.clear()
    for number in range(20):
        assert catalog.find(f"MODEL-{number}").id == f"publisher/model-{number}"
    assert len(normalised) == 20


def test_similar_names_are_found_with_little_work_in_a_large_library(
    root: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(60):
        model(root / "publisher" / f"model-{number:02}")
    work: list[int] = []
    ratio = difflib.SequenceMatcher.ratio

    def watched(self: difflib.SequenceMatcher[str]) -> float:
        work.append(len(self.a) * len(self.b))
        return ratio(self)

    monkeypatch.setattr(difflib.SequenceMatcher, "ratio", watched)
    with pytest.raises(ModelNotFound, match="Did you mean publisher/model-07"):
        catalog.find("publisher/modell-07")
    with pytest.raises(ModelNotFound):
        catalog.find("publisher/" + "model-0" * 500)
    assert work
    assert len(work) <= 2 * 20
    assert max(work) <= 100 * len("model-00")


def test_a_short_name_of_several_models_is_answered_with_them(root: Path, catalog: Catalog) -> None:
    model(root / "one" / "Qwen3-4B")
    model(root / "two" / "Qwen3-4B")
    with pytest.raises(AmbiguousModel) as caught:
        catalog.find("qwen3-4b")
    assert caught.value.body()["error"]["candidates"] == ["one/Qwen3-4B", "two/Qwen3-4B"]
    assert "one/Qwen3-4B, two/Qwen3-4B" in caught.value.message


def test_a_short_name_means_the_model_that_can_be_loaded(root: Path, catalog: Catalog) -> None:
    (root / "one" / "Qwen3-4B").mkdir(parents=True)
    (root / "one" / "Qwen3-4B" / "q4.gguf").write_bytes(b"GGUF")
    model(root / "two" / "Qwen3-4B")
    assert catalog.find("qwen3-4b").id == "two/Qwen3-4B"


def test_a_model_that_cannot_be_loaded_is_found_and_refused_with_the_reason(
    root: Path, catalog: Catalog
) -> None:
    model(root / "publisher" / "model", config={"model_type": "nonesuch"})
    found = catalog.find("publisher/model")
    with pytest.raises(ModelUnusable, match=r"publisher/model.*architecture 'nonesuch'"):
        found.require_loadable()


# -- fresh


def test_new_changed_and_removed_models_are_noticed_at_the_next_call(
    root: Path, catalog: Catalog, inspected: list[str]
) -> None:
    folder = model(root / "publisher" / "a")
    assert ids(catalog) == ["publisher/a"]
    model(root / "publisher" / "b")
    model(root / "new publisher" / "c")
    assert ids(catalog) == ["new publisher/c", "publisher/a", "publisher/b"]
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 7}')
    assert catalog.find("publisher/a").architecture == "llama"
    assert catalog.find("publisher/a").vocab_size == 7
    shutil.rmtree(folder)
    assert ids(catalog) == ["new publisher/c", "publisher/b"]
    (root / "publisher" / "b").rename(root / "publisher" / "d")
    assert ids(catalog) == ["new publisher/c", "publisher/d"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 100), "truncated"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    ],
)
def test_a_damaged_model_is_noticed_at_the_next_call(
    root: Path,
    catalog: Catalog,
    inspected: list[str],
    change: Callable[[Path], object],
    reason: str,
) -> None:
    folder = model(root / "publisher" / "model")
    assert catalog.find("publisher/model").loadable
    change(folder)
    assert reason in str(catalog.find("publisher/model").reason)


def test_a_download_is_listed_when_it_is_complete(
    root: Path, catalog: Catalog, inspected: list[str]
) -> None:
    folder = model(root / "publisher" / "model", shards=2)
    second = folder / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    assert not catalog.find("publisher/model").loadable
    with second.open("ab") as file:
        file.write(whole[-1:])
    assert catalog.find("publisher/model").loadable


def test_unchanged_folders_are_not_read_again(
    root: Path, catalog: Catalog, inspected: list[str]
) -> None:
    model(root / "publisher" / "a")
    model(root / "publisher" / "b")
    catalog.models()
    assert sorted(inspected) == ["publisher/a", "publisher/b"]
    catalog.models()
    model(root / "publisher" / "c")
    catalog.models()
    assert inspected[2:] == ["publisher/c"]


def test_a_change_that_keeps_time_and_size_is_noticed(
    root: Path, catalog: Catalog, inspected: list[str]
) -> None:
    folder = model(root / "publisher" / "model", config={"vocab_size": 100})
    config = folder / "config.json"
    assert catalog.find("publisher/model").vocab_size == 100
    before = config.stat()
    until(
        lambda: _touched(root.parent / "clock") > before.st_ctime_ns, what="the clock's next tick"
    )
    config.write_text(config.read_text().replace("100", "999"))
    os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert catalog.find("publisher/model").vocab_size == 999


def test_a_change_within_the_resolution_of_a_coarse_clock_is_read(
    root: Path, catalog: Catalog, inspected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "_GRAIN", 60_000_000_000)
    model(root / "publisher" / "model")
    for _ in range(3):
        catalog.models()
    assert inspected == ["publisher/model"] * 3
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 120_000_000_000)
    for _ in range(3):
        catalog.models()
    assert inspected == ["publisher/model"] * 4


def test_in_a_library_of_thousands_every_file_is_checked_in_turn(
    root: Path, catalog: Catalog, inspected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "_LOOKS", 3)
    model_folders = [model(root / "publisher" / f"m{number}") for number in range(6)]
    catalog.models()
    os.truncate(model_folders[4] / "model.safetensors", 100)
    assert until(lambda: not catalog.find("m4").loadable, what="the damage")


def test_a_models_folder_that_appears_later_is_found_without_a_restart(tmp_path: Path) -> None:
    catalog = catalog_of([tmp_path / "models"], patience=30)
    assert ids(catalog) == []
    assert catalog.missing_roots() == [tmp_path / "models"]
    with pytest.raises(ModelsRootUnavailable, match="does not exist"):
        catalog.find("publisher/model")
    model(tmp_path / "models" / "publisher" / "model")
    assert ids(catalog) == ["publisher/model"]
    assert catalog.missing_roots() == []


def test_a_file_in_the_place_of_the_models_folder_counts_as_missing(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("")
    assert catalog_of([tmp_path / "models"]).missing_roots() == [tmp_path / "models"]


def test_models_on_an_unplugged_disk_are_listed_as_stale(
    root: Path, catalog: Catalog, tmp_path: Path
) -> None:
    model(root / "publisher" / "model")
    assert [model.stale for model in catalog.models()] == [False]
    root.rename(tmp_path / "unplugged")
    (known,) = catalog.models()
    assert known.id == "publisher/model"
    assert known.to_dict()["stale"] is True
    assert catalog.missing_roots() == [root]
    with pytest.raises(ModelsRootUnavailable, match=str(root)):
        catalog.find("publisher/model").require_loadable()
    with pytest.raises(ModelsRootUnavailable):
        catalog.find("something else")
    (tmp_path / "unplugged").rename(root)
    assert [model.stale for model in catalog.models()] == [False]
    catalog.find("publisher/model").require_loadable()


# -- across starts


def test_a_second_start_reads_no_model_again(
    root: Path, tmp_path: Path, inspected: list[str]
) -> None:
    cache = tmp_path / "catalog.json"
    model(root / "publisher" / "model", template="{{ messages }}", tokens=["<think>"])
    before = catalog_of([root], cache_file=cache, patience=30).models()
    until(cache.exists, what="the cache file")
    again = catalog_of([root], cache_file=cache, patience=30)
    assert again.models() == before
    assert inspected == ["publisher/model"]
    model(root / "publisher" / "new")
    assert ids(again) == ["publisher/model", "publisher/new"]
    assert inspected == ["publisher/model", "publisher/new"]


def test_models_known_from_an_earlier_start_on_a_missing_disk_are_listed_as_stale(
    root: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "catalog.json"
    model(root / "publisher" / "model")
    catalog_of([root], cache_file=cache, patience=30).models()
    until(cache.exists, what="the cache file")
    root.rename(tmp_path / "unplugged")
    assert [it.stale for it in catalog_of([root], cache_file=cache, patience=30).models()] == [True]
    assert catalog_of([tmp_path / "another"], cache_file=cache, patience=30).models() == []


def test_another_version_of_mlx_lm_has_every_model_read_again(
    root: Path, tmp_path: Path, inspected: list[str]
) -> None:
    cache = tmp_path / "catalog.json"
    model(root / "publisher" / "model")
    assert catalog_of([root], cache_file=cache, patience=30).models()[0].loadable
    until(cache.exists, what="the cache file")
    older = tmp_path / "mlx_lm"
    (older / "models").mkdir(parents=True)
    (older / "models" / "llama.py").write_text("class Model: pass")
    (found,) = catalog_of([root], cache_file=cache, mlx_lm=older, patience=30).models()
    assert found.reason == "The installed mlx-lm does not support the architecture 'qwen3'."
    assert inspected == ["publisher/model", "publisher/model"]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"fingerprint": 1}', "roots", "entry", "model"])
def test_a_damaged_cache_file_is_ignored(root: Path, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "catalog.json"
    model(root / "publisher" / "model")
    catalog_of([root], cache_file=cache, patience=30).models()
    content = json.loads(until(lambda: cache.exists() and cache.read_text(), what="the cache file"))
    path = str(root / "publisher" / "model")
    if damage == "roots":
        content["roots"] = []
    elif damage == "entry":
        content["roots"][str(root)][path] = {}
    elif damage == "model":
        content["roots"][str(root)][path]["model"] = {"id": 5}
    else:
        content = None
    cache.write_text(damage if content is None else json.dumps(content))
    assert ids(catalog_of([root], cache_file=cache, patience=30)) == ["publisher/model"]


def test_a_cache_file_that_cannot_be_written_is_ignored(root: Path, tmp_path: Path) -> None:
    model(root / "publisher" / "model")
    cache = tmp_path / "no" / "folder" / "catalog.json"
    catalog = catalog_of([root], cache_file=cache, patience=30)
    assert ids(catalog) == ["publisher/model"]


# -- whether a model is still the one that was loaded


def test_each_change_of_a_models_files_changes_its_fingerprint(root: Path) -> None:
    folder, other = model(root / "a"), model(root / "b")
    link = root / "link"
    link.symlink_to(folder)
    seen = [scanning.fingerprint(str(link))]

    def changed() -> bool:
        seen.append(scanning.fingerprint(str(link)))
        return seen[-1] != seen[-2]

    assert not changed()
    weights = folder / "model.safetensors"
    times = (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    weights.rename(folder / "kept")
    shutil.copy(folder / "kept", weights)
    os.utime(weights, ns=times)
    assert changed(), "another file of the same size and time"
    with weights.open("r+b") as file:
        file.write(b"x")
    os.utime(weights, ns=(0, 0))
    assert changed(), "rewritten in place"
    (folder / "generation_config.json").write_text("{}")
    assert changed(), "one more file"
    (folder / "notes.md").write_text("what mlx-lm does not read")
    assert not changed()
    link.unlink()
    link.symlink_to(other)
    assert changed(), "another model"


def test_every_file_that_is_read_of_a_model_is_found_by_the_scan() -> None:
    names = {value for name, value in vars(layout).items() if name.isupper() and name != "NAMES"}
    assert names == set(layout.NAMES)
    assert scanning._relevant(layout.NAMES, alone=True, root=False) != ()
    assert set(scanning._relevant(layout.NAMES, alone=True, root=False)) == names


def test_the_sampling_that_a_model_recommends_is_listed_and_followed_when_it_changes(
    root: Path, catalog: Catalog
) -> None:
    folder = model(root / "publisher" / "model")
    file = folder / "generation_config.json"
    assert catalog.find("publisher/model").sampling == {}
    file.write_text('{"temperature": 0.6, "top_p": 0.95}')
    assert catalog.find("publisher/model").sampling == {"temperature": 0.6, "top_p": 0.95}
    file.write_text('{"temperature": 0.7, "top_p": 0.95}')
    assert catalog.find("publisher/model").sampling == {"temperature": 0.7, "top_p": 0.95}


def test_a_fingerprint_does_not_wait_for_a_disk_that_hangs(
    root: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    model(root / "publisher" / "model")
    found = catalog.find("publisher/model")
    assert selection.files_of(found) is not None
    asked: list[str] = []
    monkeypatch.setattr(selection, "fingerprint", asked.append)
    assert selection.files_of(dataclasses.replace(found, stale=True)) is None
    assert not asked


# -- slow disks


def test_a_disk_that_hangs_delays_a_listing_by_a_second_at_most(root: Path, disk: Disk) -> None:
    model(root / "publisher" / "model")
    catalog = catalog_of([root], patience=0.2)
    until(lambda: ids(catalog), what="the first listing")
    disk.answers.clear()
    begun = time.monotonic()
    (known,) = catalog.models()
    assert time.monotonic() - begun < 2
    assert known.stale
    assert catalog.find("publisher/model").stale
    until(
        lambda: _seconds(catalog.models) < 0.1, what="an answer at once from a disk known to hang"
    )
    assert catalog.missing_roots() == []
    disk.answers.set()
    until(lambda: not catalog.models()[0].stale, what="the disk's return")


def test_no_model_is_called_unknown_before_its_disk_was_read(root: Path, disk: Disk) -> None:
    model(root / "publisher" / "model")
    disk.answers.clear()
    catalog = catalog_of([root], patience=0.1)
    assert catalog.models() == []
    with pytest.raises(ModelsRootUnavailable, match="still being read") as caught:
        catalog.find("publisher/model")
    assert caught.value.retry_after is not None
    disk.answers.set()
    until(lambda: ids(catalog) == ["publisher/model"], what="the model")


def test_one_hanging_disk_does_not_make_another_stale(
    root: Path, tmp_path: Path, disk: Disk
) -> None:
    network = tmp_path / "network"
    model(root / "local" / "a")
    model(network / "remote" / "b")
    catalog = catalog_of([root, network], patience=0.2)
    until(lambda: len(catalog.models()) == 2, what="both models")
    disk.hanging = {str(network)}
    disk.answers.clear()
    model(root / "local" / "c")
    until(
        lambda: (
            [(it.id, it.stale) for it in catalog.models()]
            == [("local/a", False), ("local/c", False), ("remote/b", True)]
        ),
        what="the new local model",
    )


def test_a_known_model_is_found_without_reading_the_disk(root: Path, disk: Disk) -> None:
    model(root / "publisher" / "model")
    catalog = catalog_of([root], patience=30)
    catalog.models()
    disk.answers.clear()
    scans = disk.scans
    assert catalog.find("publisher/model", fresh=False).id == "publisher/model"
    assert disk.scans == scans


def test_callers_at_the_same_time_share_a_scan(root: Path, disk: Disk) -> None:
    model(root / "publisher" / "model")
    catalog = catalog_of([root], patience=30)
    catalog.models()
    disk.answers.clear()
    scans = disk.scans
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append(ids(catalog))) for _ in range(32)]
    for thread in threads:
        thread.start()
    until(lambda: disk.scans > scans, what="the first scan")
    disk.answers.set()
    for thread in threads:
        thread.join(30)
    assert found == [["publisher/model"]] * 32
    # The one under way, one for all who came during it, and some for stragglers.
    assert disk.scans - scans < 16


def test_a_failed_scan_keeps_the_last_listing(
    root: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model(root / "publisher" / "model")
    catalog.models()

    def broken(*_: object) -> Snapshot:
        raise RuntimeError("a bug")

    monkeypatch.setattr(catalog_module, "scan", broken)
    assert ids(catalog) == ["publisher/model"]
    assert "could not be scanned" in caplog.text


def test_the_log_names_a_missing_models_folder_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mlxproxy.catalog")
    catalog = catalog_of([tmp_path / "none"], patience=30)
    for _ in range(3):
        catalog.models()
    assert caplog.messages == [f"The models folder '{tmp_path}/none' does not exist."]


def _touched(file: Path) -> int:
    file.write_text("")
    return file.stat().st_ctime_ns


def _seconds(call: Callable[[], object]) -> float:
    begun = time.monotonic()
    call()
    return time.monotonic() - begun


# -- several engines


class Reads:
    """An engine's inspector that can load the models of one publisher."""

    kinds = frozenset({"unknown"})

    def __init__(self, publisher: str) -> None:
        self.fingerprint = self.publisher = publisher

    def __call__(self, folder: Folder) -> Model:
        fits = folder.id.startswith(f"{self.publisher}/")
        reason = None if fits else f"Not one of {self.publisher}'s."
        path = Path(folder.path)
        return Model(folder.id, path, engine=self.publisher, loadable=fits, reason=reason)


def test_the_first_engine_that_can_load_a_model_serves_it(root: Path, tmp_path: Path) -> None:
    for name in ("north/a", "south/b", "west/c"):
        model(root / name)
    inspect = Inspectors([Reads("north"), Reads("south")])
    cache = tmp_path / "catalog.json"
    for _ in range(2):  # as read, and as remembered
        found = Catalog([root], inspect, cache_file=cache, patience=30).models()
        assert [(it.engine, it.loadable, it.reason) for it in found] == [
            ("north", True, None),
            ("south", True, None),
            ("north", False, "Not one of north's."),
        ]
        until(cache.exists, what="the cache file")


def test_another_engine_looks_at_the_models_anew(root: Path, tmp_path: Path) -> None:
    model(root / "south" / "b")
    cache = tmp_path / "catalog.json"
    for engines, loadable in ((["north"], False), (["north", "south"], True), (["north"], False)):
        inspect = Inspectors([Reads(name) for name in engines])
        (found,) = Catalog([root], inspect, cache_file=cache, patience=30).models()
        assert found.loadable is loadable
        mark = f':{inspect.fingerprint}"'
        until(lambda mark=mark: cache.exists() and mark in cache.read_text(), what="the cache file")
