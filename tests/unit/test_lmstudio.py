"""The models folder is the one that LM Studio itself uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlxproxy.catalog.lmstudio import models_folder
from tests.support.model_folders import write


def test_a_new_lm_studio_keeps_its_models_in_the_hidden_folder(tmp_path: Path) -> None:
    assert models_folder(tmp_path) == tmp_path / ".lmstudio" / "models"


def test_an_old_lm_studio_keeps_its_models_in_its_cache_folder(tmp_path: Path) -> None:
    older = tmp_path / ".cache" / "lm-studio"
    older.mkdir(parents=True)
    assert models_folder(tmp_path) == older / "models"


def test_a_moved_lm_studio_home_is_found_by_its_pointer(tmp_path: Path) -> None:
    (tmp_path / ".cache" / "lm-studio").mkdir(parents=True)
    (tmp_path / ".lmstudio-home-pointer").write_text(f"{tmp_path}/elsewhere\n")
    assert models_folder(tmp_path) == tmp_path / "elsewhere" / "models"


def test_the_downloads_folder_of_lm_studios_settings_is_used(tmp_path: Path) -> None:
    (tmp_path / ".lmstudio").mkdir()
    write(tmp_path / ".lmstudio" / "settings.json", {"downloadsFolder": "/Volumes/My SSD/Models"})
    assert models_folder(tmp_path) == Path("/Volumes/My SSD/Models")


def test_a_tilde_in_the_settings_is_the_users_home(tmp_path: Path) -> None:
    (tmp_path / ".lmstudio").mkdir()
    write(tmp_path / ".lmstudio" / "settings.json", {"downloadsFolder": "~/Models"})
    assert models_folder(tmp_path) == tmp_path / "Models"


def test_the_present_users_home_is_taken_where_none_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_folder() == tmp_path / ".lmstudio" / "models"


@pytest.mark.parametrize(
    "settings",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"downloadsFolder": 5}',
        b'{"downloadsFolder": ""}',
        b'{"downloadsFolder": "relative"}',
        b'{"downloadsFolder": "/a\\u0000b"}',
    ],
)
def test_broken_lm_studio_settings_count_as_none(tmp_path: Path, settings: bytes) -> None:
    (tmp_path / ".lmstudio").mkdir()
    (tmp_path / ".lmstudio" / "settings.json").write_bytes(settings)
    assert models_folder(tmp_path) == tmp_path / ".lmstudio" / "models"


@pytest.mark.parametrize("pointer", [b"", b"\n", b"relative", b"\xff", b"/a\0b"])
def test_a_broken_lm_studio_pointer_counts_as_none(tmp_path: Path, pointer: bytes) -> None:
    (tmp_path / ".lmstudio-home-pointer").write_bytes(pointer)
    assert models_folder(tmp_path) == tmp_path / ".lmstudio" / "models"


def test_a_pipe_in_the_place_of_a_settings_file_keeps_nobody_waiting(tmp_path: Path) -> None:
    (tmp_path / ".lmstudio").mkdir()
    os.mkfifo(tmp_path / ".lmstudio" / "settings.json")
    os.mkfifo(tmp_path / ".lmstudio-home-pointer")
    assert models_folder(tmp_path) == tmp_path / ".lmstudio" / "models"
