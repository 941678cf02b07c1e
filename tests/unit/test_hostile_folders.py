"""What a models folder may hold: each is listed as unusable or left out, and hides nothing else."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxproxy.catalog.layout import Folder
from mlxproxy.catalog.model import Model
from mlxproxy.engines.mlx_lm.inspection import Inspector
from mlxproxy.engines.mlx_lm.package import Package
from tests.support.model_folders import (
    CONFIG,
    catalog_of,
    hub_model,
    model,
    raw_weights,
    weights,
    write,
)

LIMIT = 10.0  # seconds: far more than any of these may take, far less than a hang


@pytest.fixture
def root(tmp_path: Path) -> Path:
    model(tmp_path / "models" / "good" / "model")
    return tmp_path / "models"


Look = Callable[[], dict[str, Model]]


@pytest.fixture
def look(root: Path) -> Iterator[Look]:
    """Lists the folder; the good model in it must never suffer."""
    catalog = catalog_of([root], patience=LIMIT)

    def look() -> dict[str, Model]:
        begun = time.monotonic()
        found = {it.id: it for it in catalog.models()}
        assert time.monotonic() - begun < LIMIT
        good = found.pop("good/model")
        assert good.loadable
        assert not good.stale
        json.dumps([it.to_dict() for it in found.values()]).encode()
        return found

    yield look
    look()


def reason(look: Look, id_: str = "bad/model") -> str:
    """Why the only other model cannot be loaded."""
    found = look()
    assert list(found) == [id_]
    assert not found[id_].loadable
    return str(found[id_].reason)


# -- config.json


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "config.json is not valid JSON (line 1)."),
        (b"{", "config.json is not valid JSON (line 1)."),
        (b'{"a": 1,\n"b"}', "config.json is not valid JSON (line 2)."),
        (b"[]", "config.json does not hold a JSON object."),
        (b'"llama"', "config.json does not hold a JSON object."),
        (b"\xff\xfe{}", "config.json is not UTF-8 text."),
        (b"\xef\xbb\xbf{}", "config.json is not valid JSON (line 1)."),
        (b"[" * 100_000, "config.json is not valid JSON."),
        (b'{"a":' * 100_000, "config.json is not valid JSON."),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "config.json is not valid JSON."),
        (b"\0" * 4096, "config.json is not valid JSON (line 1)."),
    ],
)
def test_a_broken_config_says_what_is_wrong(
    root: Path, look: Look, content: bytes, expected: str
) -> None:
    (model(root / "bad" / "model") / "config.json").write_bytes(content)
    assert reason(look) == expected


def test_a_config_of_two_gigabytes_is_not_read(root: Path, look: Look) -> None:
    os.truncate(model(root / "bad" / "model") / "config.json", 2_000_000_000)
    assert reason(look) == "config.json is larger than 4 MB."


def test_a_config_that_is_not_there_is_said_to_be_missing(root: Path, look: Look) -> None:
    (model(root / "bad" / "model") / "config.json").unlink()
    assert reason(look) == "config.json is missing."


# -- what is no file


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(
    root: Path, look: Look, name: str
) -> None:
    folder = model(root / "bad" / "model")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert reason(look) == f"{name} is not a regular file."


def test_pipes_in_the_place_of_weights_and_index_keep_nobody_waiting(
    root: Path, look: Look
) -> None:
    folder = model(root / "bad" / "model")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    os.mkfifo(folder / "model.safetensors.index.json")
    assert reason(look) == "model.safetensors is not a regular file."


def test_a_folder_a_socket_or_a_device_is_not_read_as_config(
    root: Path, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("folder", "socket", "device", "circle"):
        (model(root / "bad" / name) / "config.json").unlink()
    (root / "bad" / "folder" / "config.json").mkdir()
    monkeypatch.chdir(root / "bad" / "socket")  # a socket's path may have 108 bytes
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("config.json")
    (root / "bad" / "device" / "config.json").symlink_to("/dev/zero")
    (root / "bad" / "circle" / "config.json").symlink_to("config.json")
    found = look()
    assert {it.loadable for it in found.values()} == {False}
    assert found["bad/device"].reason == "config.json is not a regular file."
    assert len(found) == 4


def test_an_unreadable_folder_is_left_out_with_one_line_in_the_log(
    root: Path, look: Look, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model(root / "bad" / "model")
    scandir = os.scandir

    def refused(path: str) -> Any:  # root, who may run this, is refused nothing
        if path == str(folder):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    for _ in range(3):
        assert look() == {}
    assert caplog.messages == [f"'{folder}' cannot be read (Permission denied)."]
    monkeypatch.undo()
    folder.chmod(0o755)
    assert look()["bad/model"].loadable


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_named(root: Path, look: Look) -> None:
    (model(root / "bad" / "model") / "config.json").chmod(0)
    assert reason(look) == "config.json cannot be read (Permission denied)."


# -- names


@pytest.mark.parametrize(
    "name",
    [
        'it\'s "quoted" <b>&amp;',
        "a..b",
        "...",
        "-rf",
        "~",
        "$(reboot)",
        "50% off",
        "a\\b",
        "模型 🤖",
        "x" * 255,
        "models--",
        " ",
    ],
)
def test_a_folder_with_an_odd_name_is_listed(root: Path, look: Look, name: str) -> None:
    model(root / "odd" / name)
    assert [it.loadable for it in look().values()] == ([] if name.startswith(".") else [True])


@pytest.mark.parametrize("name", [b"a\nb", b"a\rb", b"\x1b[31mred", b"\xff\xfe", b"\x7f", b"a\tb"])
def test_a_folder_name_that_is_no_unicode_is_left_out_with_one_line_in_the_log(
    root: Path, look: Look, caplog: pytest.LogCaptureFixture, name: bytes
) -> None:
    folder = os.path.join(os.fsencode(root), name)
    try:
        os.rename(model(root / "odd"), folder)
    except OSError:
        pytest.skip("this disk refuses such a name")
    for _ in range(3):
        assert look() == {}
    assert len(caplog.messages) == 1
    assert caplog.messages[0].isprintable()


def test_a_path_of_thousands_of_letters_does_not_break_the_listing(root: Path, look: Look) -> None:
    folder = root
    here = os.open(root, os.O_RDONLY)
    try:
        for _ in range(40):  # beyond the 4,096 bytes that a path may have
            os.mkdir("d" * 200, dir_fd=here)
            deeper = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = deeper
    finally:
        os.close(here)
    assert look() == {}
    assert folder.exists()


def test_ten_thousand_nested_and_neighbouring_folders_are_scanned(root: Path, look: Look) -> None:
    folder = root
    for number in range(500):
        folder = folder / str(number % 10)
    folder.mkdir(parents=True)
    for number in range(5000):
        (root / "wide" / str(number)).mkdir(parents=True)
    assert look() == {}


@pytest.mark.parametrize("revision", ["../../../../outside", "/etc", "..", "", "a\0b", "x" * 5000])
def test_a_hugging_face_cache_cannot_name_a_revision_outside_it(
    root: Path, look: Look, tmp_path: Path, revision: str
) -> None:
    model(tmp_path / "outside")
    true = hub_model(root, "org/name", "abc")
    (root / "models--org--name" / "refs" / "main").write_text(revision)
    assert look()["org/name"].path == true


def test_a_pipe_that_should_name_the_revision_keeps_nobody_waiting(root: Path, look: Look) -> None:
    hub_model(root, "org/name", "abc")
    (root / "models--org--name" / "refs" / "main").unlink()
    os.mkfifo(root / "models--org--name" / "refs" / "main")
    assert look()["org/name"].loadable


# -- weights


def _tensor(**entry: Any) -> bytes:
    return json.dumps(
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}}
    ).encode()


@pytest.mark.parametrize(
    ("write_file", "expected"),
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"1234"), "is truncated"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "Git LFS"),
        (
            lambda path: path.write_text("<!DOCTYPE html><title>404</title>"),
            "not a safetensors file",
        ),
        (lambda path: raw_weights(path, b"{}", length=2**63), "not a safetensors file"),
        (lambda path: raw_weights(path, b"{}", length=1000), "is truncated"),
        (lambda path: raw_weights(path, b"{}  ", length=1), "damaged header"),
        (lambda path: raw_weights(path, b"[]"), "damaged header"),
        (lambda path: raw_weights(path, b"[" * 100_000), "damaged header"),
        (lambda path: raw_weights(path, b'{"a": 5}'), "damaged header"),
        (lambda path: raw_weights(path, b'{"a": {}}'), "damaged header"),
        (lambda path: raw_weights(path, b"\xff" * 100), "damaged header"),
        (lambda path: raw_weights(path, _tensor(dtype="F1"), data=4), "damaged header"),
        (lambda path: raw_weights(path, _tensor(dtype=[]), data=4), "damaged header"),
        (lambda path: raw_weights(path, _tensor(shape=[2]), data=4), "damaged header"),
        (lambda path: raw_weights(path, _tensor(shape=[-1]), data=4), "damaged header"),
        (lambda path: raw_weights(path, _tensor(shape="1"), data=4), "damaged header"),
        (lambda path: raw_weights(path, _tensor(data_offsets=[4, 0]), data=4), "damaged header"),
        (lambda path: raw_weights(path, _tensor(data_offsets=[-4, 0]), data=4), "damaged header"),
        (lambda path: raw_weights(path, _tensor(data_offsets=[0]), data=4), "damaged header"),
        (lambda path: raw_weights(path, _tensor(data_offsets=5), data=4), "damaged header"),
        (lambda path: raw_weights(path, _tensor(), data=3), "is truncated (0.00 of 0.00 GB)"),
        (
            lambda path: raw_weights(path, _tensor(shape=[2**40], data_offsets=[0, 2**42]), data=4),
            "is truncated (0.00 of 4398.05 GB)",
        ),
    ],
)
def test_damaged_weights_are_recognized_by_their_header(
    root: Path, look: Look, write_file: Callable[[Path], object], expected: str
) -> None:
    write_file(model(root / "bad" / "model") / "model.safetensors")
    assert expected in reason(look)


def test_a_sparse_weights_file_of_a_terabyte_is_not_read(root: Path, look: Look) -> None:
    file = model(root / "bad" / "model") / "model.safetensors"
    file.write_bytes(b"")
    os.truncate(file, 10**12)
    assert "damaged header" in reason(look)


def test_a_claim_of_a_million_shards_is_not_looked_up(root: Path, look: Look) -> None:
    folder = model(root / "bad" / "model")
    (folder / "model.safetensors").rename(folder / "model-000001-of-999999.safetensors")
    assert "999995 more are missing" in reason(look)


@pytest.mark.parametrize("index", [b"{", b"[]", b'{"weight_map": 5}', b'{"weight_map": {"a": []}}'])
def test_a_broken_index_makes_no_model_unloadable(root: Path, look: Look, index: bytes) -> None:
    folder = model(root / "odd" / "model")
    (folder / "model.safetensors.index.json").write_bytes(index)
    assert list(look()) == ["odd/model"]


# -- templates and vocabularies


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10000000000 }}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set x = 'a' %}" + "{% set x = x ~ x %}" * 1000,
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% if " + "not " * 50_000 + "x %}{% endif %}",
        "{{ x" + "[0]" * 50_000 + " }}",
        "{% if a %}" * 20_000,
        "{{ " + "a and " * 30_000 + "a }}",
        "\0",
    ],
)
def test_a_chat_template_that_would_never_end_is_not_run(
    root: Path, look: Look, template: str
) -> None:
    text = template + "{% if enable_thinking %}<think>{% endif %}"
    model(root / "odd" / "model", template=text, tokens=["<think>", "</think>"])
    assert look()["odd/model"].capabilities.thinking


@pytest.mark.parametrize(
    "value",
    [5, [], {}, [5], [{"name": []}], [{"name": "default"}], {"default": 5}, None, True, ["a", {}]],
)
def test_a_tokenizer_config_of_any_shape_breaks_nothing(root: Path, look: Look, value: Any) -> None:
    folder = model(root / "odd" / "model")
    keys = ("chat_template", "added_tokens_decoder", "auto_map", "chat_template_type")
    write(folder / "tokenizer_config.json", dict.fromkeys(keys, value))
    found = look()["odd/model"]
    assert found.reason is None


def test_a_chat_template_that_is_no_text_is_named_as_the_fault(root: Path, look: Look) -> None:
    folder = model(root / "bad" / "model")
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    assert reason(look) == "chat_template.jinja is not UTF-8 text."


def test_numbers_of_thousands_of_digits_are_ignored(root: Path, look: Look) -> None:
    names = [name for name, value in CONFIG.items() if isinstance(value, int)]
    model(root / "odd" / "model", config=dict.fromkeys(names, 10**4000))
    found = look()["odd/model"]
    assert (found.vocab_size, found.max_context_length, found.kv_cache) == (None, None, None)


# -- anything

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
_KEYS = [
    *CONFIG,
    "text_config",
    "vision_config",
    "quantization",
    "quantization_config",
    "layer_types",
    "hybrid_override_pattern",
    "full_attention_interval",
    "full_attn_idxs",
    "linear_attn_config",
    "attn_layer_period",
    "attn_layer_offset",
    "layer_group_size",
    "sliding_window",
    "sliding_window_pattern",
    "num_kv_shared_layers",
    "kv_lora_rank",
    "processor_type",
    "model_file",
    "torch_dtype",
]


@pytest.fixture(scope="module")
def inspector() -> Inspector:
    return Inspector(Package())


FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FUZZ
@given(st.dictionaries(st.sampled_from(_KEYS), _json))
def test_any_generated_config_is_understood_or_rejected(
    tmp_path_factory: pytest.TempPathFactory, inspector: Inspector, config: dict[str, Any]
) -> None:
    folder = model(tmp_path_factory.mktemp("any") / "model", config=config)
    sizes = {it.name: it.stat().st_size for it in folder.iterdir()}
    found = inspector(Folder(str(folder), "any/model", sizes, 0))
    assert "could not be inspected" not in str(found.reason)
    assert found.loadable == (found.reason is None)
    assert Model.from_json(json.loads(json.dumps(found.to_json()))) == found


@FUZZ
@given(st.one_of(st.binary(max_size=200), _json.map(lambda it: json.dumps({"a": it}).encode())))
def test_any_generated_header_is_understood_or_rejected(
    tmp_path_factory: pytest.TempPathFactory, inspector: Inspector, header: bytes
) -> None:
    folder = tmp_path_factory.mktemp("any")
    write(folder / "config.json", CONFIG)
    write(folder / "tokenizer.json", {})
    raw_weights(folder / "model-00001-of-00002.safetensors", header, data=8)
    weights(folder / "model-00002-of-00002.safetensors")
    sizes = {it.name: it.stat().st_size for it in folder.iterdir()}
    found = inspector(Folder(str(folder), "any/model", sizes, 0))
    assert "could not be inspected" not in str(found.reason)
