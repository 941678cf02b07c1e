"""The house of docs/architecture.md stands: no import goes up a floor."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mlxproxy"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
FLOORS = [
    re.findall(r"`([\w.]+?)(?:\.py|/)?`", line)
    for line in PAGE.partition("<!-- floors -->")[2].partition("<!-- ground -->")[0].splitlines()
    if line.startswith("| `")
]
LEVEL = {room: level for level, rooms in enumerate(reversed(FLOORS)) for room in rooms}


def room_of(module: str) -> str:
    """Return the folder or file of the package that a module's dotted name lies in."""
    return module.split(".")[1] if "." in module else "__init__"


def imported(source: str) -> Iterator[str]:
    """Return the product's modules that a source imports, wherever in it that is done."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("mlxproxy"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlxproxy"):
            assert node.module
            for alias in node.names:
                name = alias.name
                inner = node.module == "mlxproxy" and not name.startswith("__")
                yield f"mlxproxy.{name}" if inner else node.module


def upward(path: str, source: str) -> list[str]:
    """Return what a file imports although it stands on a higher floor."""
    level = LEVEL[Path(path).parts[0].removesuffix(".py")]
    return [module for module in imported(source) if LEVEL[room_of(module)] > level]


FILES = sorted(str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py"))


def test_every_room_has_its_floor() -> None:
    assert {Path(file).parts[0].removesuffix(".py") for file in FILES} == LEVEL.keys()


@pytest.mark.parametrize("file", FILES)
def test_no_import_goes_up_a_floor(file: str) -> None:
    assert upward(file, (PACKAGE / file).read_text()) == []


def test_what_runs_inside_the_backend_imports_nothing_of_the_proxy() -> None:
    inside = PACKAGE / "engines" / "mlx_lm" / "inside"
    for file in inside.rglob("*.py"):
        modules = set(imported(file.read_text()))
        assert all(name.startswith("mlxproxy.engines.mlx_lm.inside") for name in modules), file


@pytest.mark.parametrize(
    "source",
    [
        "from mlxproxy import main",
        "from mlxproxy.blueprints.app import create_app",
        "import mlxproxy.cli",
        "def late():\n    from mlxproxy import wiring",
    ],
)
def test_an_import_that_goes_up_is_found(source: str) -> None:
    assert upward("controller/plan.py", source)


def test_every_module_that_the_page_names_exists() -> None:
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", PAGE):
        assert (PACKAGE / name).is_file() or (ROOT / name).is_file(), name
