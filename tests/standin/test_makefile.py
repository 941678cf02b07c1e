"""`make run` on machines with one Python or another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("python3", *(f"python3.{minor}" for minor in range(10, 16)))

# Stands for a Python of some version; as the one of a virtual environment, which it makes of
# itself, it writes down what it is asked to run.
PYTHON = f"""\
#!{sys.executable}
import os, shutil, sys
from pathlib import Path

_, *arguments = sys.argv
minor = int(os.environ.get(Path(__file__).name.replace(".", "_"), "-1"))
if minor < 0 and "venv" not in __file__:
    sys.exit(127)
if arguments[0] == "-c":
    sys.version_info = (3, minor, 0)
    exec(arguments[1])
elif arguments[0] == "--version":
    print(f"Python 3.{{minor}}.0")
elif arguments[:2] == ["-m", "venv"]:
    folder = Path(arguments[-1], "bin")
    if "--clear" in arguments:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(__file__, folder / "python")
    Path("venvs").open("a").write(f"3.{{minor}} {{arguments[-1]}}\\n")
else:
    Path("asked").open("a").write(" ".join(arguments) + "\\n")
    for name in sorted(os.environ):
        if name.startswith("MLXPROXY_"):
            print(name, os.environ[name])
"""

Make = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Runs make in a checkout, on a machine with the given Pythons (name to minor version)."""
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in NAMES:
        (programs / name).write_text(PYTHON)
        (programs / name).chmod(0o755)

    def run(*arguments: str, **pythons: int) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{programs}:{os.defpath}",
            **{name: str(minor) for name, minor in pythons.items()},
        }
        return subprocess.run(
            ("make", *arguments), cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return run


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        pytest.param({"python3": 11}, "3.11", id="the one there is"),
        pytest.param({"python3": 14}, "3.14", id="Homebrew's"),
        pytest.param({"python3": 16}, "3.16", id="newer than this program"),
        pytest.param({"python3": 9, "python3_12": 12}, "3.12", id="besides Apple's, too old"),
        pytest.param({"python3": 10, "python3_13": 13}, "3.13", id="the one with newer mlx-lm"),
        pytest.param({"python3": 10}, "3.10", id="3.10 where there is nothing newer"),
        pytest.param({"python3_15": 15}, "3.15", id="no python3"),
    ],
)
def test_the_environment_is_made_with_a_suitable_python(
    make: Make, tmp_path: Path, pythons: dict[str, int], chosen: str
) -> None:
    done = make("install", **pythons)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "venvs").read_text() == f"{chosen} .venv\n"


@pytest.mark.parametrize("pythons", [{}, {"python3": 9}])
def test_without_one_it_says_what_to_install(make: Make, pythons: dict[str, int]) -> None:
    done = make("run", **pythons)
    assert done.returncode != 0
    assert "needs Python 3.10 or later" in done.stdout
    assert "brew install python" in done.stdout


def test_it_says_how_much_it_installs_and_lets_pip_show_how_far_it_is(
    make: Make, tmp_path: Path
) -> None:
    done = make("run", python3=12)
    assert "about 400 MB" in done.stdout
    install, serve = (tmp_path / "asked").read_text().splitlines()
    assert "pip install" in install
    assert "quiet" not in install
    assert serve == "-m mlxproxy serve"


def test_what_is_set_up_is_not_set_up_again(make: Make, tmp_path: Path) -> None:
    make("run", python3=12)
    make("run", python3=12)
    asked = (tmp_path / "asked").read_text()
    assert (asked.count("pip install"), asked.count("serve")) == (1, 2)


def test_an_environment_whose_python_is_gone_is_made_anew(make: Make, tmp_path: Path) -> None:
    make("install", python3=12)
    python = tmp_path / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to(tmp_path / "removed")
    assert make("run", python3=13).returncode == 0
    assert (tmp_path / "venvs").read_text() == "3.12 .venv\n3.13 .venv\n"
    assert (tmp_path / "asked").read_text().count("pip install") == 2


def test_a_python_that_is_named_has_an_environment_of_its_own(make: Make, tmp_path: Path) -> None:
    done = make("run", "PYTHON=python3.11", "PROXY_PORT=9000", python3=13, python3_11=11)
    assert (tmp_path / "venvs").read_text() == "3.11 .venv-python3.11\n"
    settings = [line for line in done.stdout.splitlines() if line.startswith("MLXPROXY_")]
    assert settings == ["MLXPROXY_PROXY_PORT 9000"]
