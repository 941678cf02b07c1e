"""The package that `uv tool install` and `pipx` build: whole, and able to serve."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.support.proxy import Proxy
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
# What an sdist is made from; the rest of a checkout may hold environments of gigabytes.
SOURCES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built out of the sdist as a package index would have it."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "mlxproxy", source / "mlxproxy", ignore=_no_cache)
    dist = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(source))
    subprocess.run(build, check=True, capture_output=True, timeout=110)
    (sdist,) = dist.glob("*.tar.gz")
    (built,) = dist.glob("*.whl")
    assert sdist.name.removesuffix(".tar.gz") == "-".join(built.name.split("-")[:2])
    return built


_no_cache = shutil.ignore_patterns("__pycache__")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed in; what it needs comes from this environment."""
    site = tmp_path_factory.mktemp("site")
    install = ("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    subprocess.run(
        (sys.executable, "-m", "pip", *install), check=True, capture_output=True, timeout=60
    )
    return site


@pytest.fixture
def proxy(installed: Path, tmp_path: Path, models: Path) -> Iterator[Proxy]:
    """A proxy of the installed package, run where no checkout is near."""
    proxy = Proxy(tmp_path / "instance", models)
    proxy.environment["PYTHONPATH"] = str(installed)
    with proxy.output.open("w") as output:
        proxy.process = subprocess.Popen(
            [installed / "bin" / "mlxproxy", "serve"],
            env=proxy.environment,
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        until(proxy.answers, 20, "the proxy's first answer")
        yield proxy
    finally:
        proxy.clean_up()


def metadata(wheel: Path) -> Message:
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_has_every_file_of_the_program_and_none_besides(wheel: Path) -> None:
    files = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "mlxproxy").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == files


def test_the_wheel_excludes_no_newer_python(wheel: Path) -> None:
    assert metadata(wheel)["Requires-Python"] == ">=3.10"


def test_the_demo_model_can_be_fetched_where_the_environment_came_without_pip(wheel: Path) -> None:
    needed = metadata(wheel).get_all("Requires-Dist", ())
    assert any(requirement.split(">")[0].strip() == "pip" for requirement in needed)


def test_the_installed_program_loads_a_model_and_answers(proxy: Proxy, installed: Path) -> None:
    assert proxy.load("tiny/alpha").json()["status"] == "loaded"
    answer = proxy.chat().json()
    assert answer["choices"][0]["message"]["content"]
    backend = " ".join(" ".join(child.cmdline()) for child in proxy.children())
    assert str(installed / "mlxproxy" / "engines") in backend, "with the additions of the package"


def test_the_installed_program_keeps_its_files_in_the_users_folders(
    installed: Path, tmp_path: Path
) -> None:
    code = "from mlxproxy import settings; print(settings.load({}, {}).instance_path)"
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(installed)}
    environment.pop("XDG_STATE_HOME", None)
    found = subprocess.run(
        (sys.executable, "-c", code), env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert Path(found.stdout.strip()).is_relative_to(tmp_path)
