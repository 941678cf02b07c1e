"""The tests' tiny models can be broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import tiny_models


@pytest.mark.parametrize("how", tiny_models.DEFECTS)
def test_a_broken_tiny_model_differs_from_a_whole_one(tmp_path: Path, how: str) -> None:
    def content(folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    whole = tiny_models.build(tmp_path / "whole", shards=2)
    broken = tiny_models.break_model(tiny_models.build(tmp_path / "broken", shards=2), how)
    assert content(whole) != content(broken)
