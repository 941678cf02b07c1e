"""Telling: what the listing says of a model is what the backend will do with it."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from mlxproxy.catalog.layout import Folder
from mlxproxy.catalog.model import Model
from mlxproxy.catalog.template import thinking_switch
from mlxproxy.catalog.weights import missing_shards
from mlxproxy.engines.mlx_lm import capabilities as rules
from mlxproxy.engines.mlx_lm.inspection import Inspector
from mlxproxy.engines.mlx_lm.package import Package
from tests.support import tiny_models
from tests.support.model_folders import model, raw_weights, weights, write

THINK = ("<think>", "</think>")


@pytest.fixture(scope="module")
def mlx_lm() -> Package:
    return Package()


@pytest.fixture
def inspect(mlx_lm: Package) -> Callable[[Path], Model]:
    inspector = Inspector(mlx_lm)

    def inspect(folder: Path) -> Model:
        sizes = {it.name: it.stat().st_size for it in folder.iterdir()}
        return inspector(Folder(str(folder), f"publisher/{folder.name}", sizes, 0))

    return inspect


Inspect = Callable[[Path], Model]


# For Python 3.10 there is no newer mlx-lm than 0.31: fewer tool parsers, and no images.
newest_mlx_lm = pytest.mark.skipif(
    importlib.metadata.version("mlx-lm").startswith("0.31."),
    reason="the catalogue's rules are those of mlx-lm 0.32",
)


def installed() -> Path:
    """The package folder of mlx-lm, without importing it."""
    spec = importlib.util.find_spec("mlx_lm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


# -- what it is


def test_a_chat_model_is_recognized(inspect: Inspect, tmp_path: Path) -> None:
    found = inspect(model(tmp_path / "model"))
    assert (found.type, found.compatibility_type, found.loadable) == ("llm", "mlx", True)
    assert (found.architecture, found.publisher) == ("qwen3", "publisher")
    assert (found.max_context_length, found.vocab_size) == (4096, 100)


def test_a_vision_model_that_the_backend_loads_as_text_has_no_vision(
    inspect: Inspect, tmp_path: Path
) -> None:
    config = {
        "model_type": "qwen3_5",
        "vision_config": {"depth": 2},
        "text_config": {"max_position_embeddings": 262144, "vocab_size": 248320},
    }
    found = inspect(model(tmp_path / "model", config=config))
    assert (found.type, found.loadable, found.capabilities.vision) == ("vlm", True, False)
    assert (found.max_context_length, found.vocab_size) == (262144, 248320)


@pytest.mark.parametrize(
    ("name", "config", "kind"),
    [
        ("Qwen3-Embedding-0.6B-4bit", {}, "embedding"),
        ("nomicai-modernbert-embed-base", {}, "embedding"),
        ("bge", {"model_type": "bert", "architectures": ["BertModel"]}, "embedding"),
        ("Qwen3-Reranker-0.6B", {}, "reranker"),
        ("judge", {"architectures": ["Qwen2ForSequenceClassification"]}, "reranker"),
    ],
)
def test_a_model_that_generates_no_text_says_so(
    inspect: Inspect, tmp_path: Path, name: str, config: dict[str, Any], kind: str
) -> None:
    found = inspect(model(tmp_path / name, config=config))
    assert (found.type, found.loadable) == (kind, False)
    assert "mlx-lm only generates text" in str(found.reason)


def test_sentence_transformers_files_make_an_embedding_model(
    inspect: Inspect, tmp_path: Path
) -> None:
    folder = model(tmp_path / "model")
    write(folder / "modules.json", [])
    assert inspect(folder).type == "embedding"


def test_an_adapter_and_an_image_model_say_what_they_are(inspect: Inspect, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write(adapter / "adapter_config.json", {})
    weights(adapter / "adapters.safetensors")
    image = tmp_path / "image"
    image.mkdir()
    write(image / "model_index.json", {})
    assert (
        inspect(adapter).reason == "It is an adapter for another model; mlx-lm only generates text."
    )
    assert inspect(image).type == "image"


def test_a_gguf_folder_says_which_program_it_is_for(inspect: Inspect, tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "q4_k_m.gguf").write_bytes(b"GGUF")
    found = inspect(tmp_path / "gguf")
    assert (found.type, found.compatibility_type, found.loadable) == ("llm", "gguf", False)
    assert found.size_bytes == 4
    assert found.reason == "It is in GGUF format, for llama.cpp; mlx-lm needs an MLX version of it."


# -- whether it loads


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": None}, "config.json names no model_type."),
        ({"model_type": 5}, "config.json names no model_type."),
        (
            {"model_type": "whisper"},
            "The installed mlx-lm does not support the architecture 'whisper'",
        ),
        ({"model_type": "cache"}, "The installed mlx-lm does not support the architecture 'cache'"),
        (
            {"model_type": "../utils"},
            "The installed mlx-lm does not support the architecture '../utils'",
        ),
        ({"model_file": "model.py"}, "It comes with its own Python code (model_file)"),
        ({"quantization": {"bits": 4}}, "config.json has an invalid quantization."),
        ({"quantization_config": {"bits": 4}}, "config.json has an invalid quantization."),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "The installed mlx-lm does not support the quantization 'bitsandbytes'.",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 8}},
            "Its GPTQ weights have 8 bits; mlx-lm supports only 4.",
        ),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "float"}},
            "The installed mlx-lm does not support the quantization 'float'.",
        ),
    ],
)
def test_a_config_that_mlx_lm_refuses_is_not_loadable(
    inspect: Inspect, tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    found = inspect(model(tmp_path / "model", config=config))
    assert not found.loadable
    assert str(found.reason).startswith(reason)


@pytest.mark.parametrize("kind", ["mistral", "llava", "falcon_mamba", "minimax_m2", "qwen2_5_vl"])
def test_an_architecture_that_mlx_lm_knows_by_another_name_is_loadable(
    inspect: Inspect, tmp_path: Path, kind: str
) -> None:
    assert inspect(model(tmp_path / "model", config={"model_type": kind})).loadable


def test_every_model_module_of_the_installed_mlx_lm_counts_as_known(mlx_lm: Package) -> None:
    modules = {it.stem for it in (installed() / "models").glob("*.py")}
    helpers = {name for name in modules if mlx_lm.architecture({"model_type": name}) is None}
    assert {"llama", "qwen3", "gemma3", "deepseek_v3", "gpt_oss"} <= modules - helpers
    assert helpers == {
        "__init__",
        "activations",
        "base",
        "bitlinear_layers",
        "cache",
        "gated_delta",
        "mla",
        "pipeline",
        "rope_utils",
        "ssm",
        "switch_layers",
    }


def test_a_missing_mlx_lm_makes_no_model_unloadable(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", config={"model_type": "anything"})
    sizes = {it.name: it.stat().st_size for it in folder.iterdir()}
    assert Inspector(Package(tmp_path / "none"))(Folder(str(folder), "a/b", sizes, 0)).loadable


def test_missing_weights_say_what_is_missing(inspect: Inspect, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert "the download is incomplete" in str(inspect(folder).reason)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "mlx_lm.convert" in str(inspect(folder).reason)
    weights(folder / "weights.safetensors")
    assert "not named model*.safetensors" in str(inspect(folder).reason)


def test_missing_shards_are_named(inspect: Inspect, tmp_path: Path) -> None:
    folder = model(tmp_path / "model", shards=7)
    (folder / "model-00002-of-00007.safetensors").unlink()
    assert inspect(folder).reason == "model-00002-of-00007.safetensors is missing."
    for number in range(3, 7):
        (folder / f"model-0000{number}-of-00007.safetensors").unlink()
    assert inspect(folder).reason == (
        "model-00002-of-00007.safetensors, model-00003-of-00007.safetensors, "
        "model-00004-of-00007.safetensors and 2 more are missing."
    )


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        (["model.safetensors"], ""),
        (["model-1-of-2.safetensors", "model-2-of-2.safetensors"], ""),
        (["model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"], ""),
        (["model-2-of-2.safetensors"], "model-1-of-2.safetensors is"),
        (
            ["model-000001-of-999999.safetensors"],
            "model-000002-of-999999.safetensors, model-000003-of-999999.safetensors, "
            "model-000004-of-999999.safetensors and 999995 more are",
        ),
    ],
)
def test_shards_are_counted_by_their_names(files: list[str], missing: str) -> None:
    assert missing_shards(files) == missing


def test_a_missing_weights_file_without_a_number_is_found_by_the_index(
    inspect: Inspect, tmp_path: Path
) -> None:
    folder = model(tmp_path / "model")
    places = {
        "model.embed_tokens.weight": "model.safetensors",
        "lm_head.weight": "model-b.safetensors",
    }
    write(folder / "model.safetensors.index.json", {"weight_map": places})
    assert inspect(folder).reason == "model-b.safetensors is missing."


def test_an_outdated_index_makes_no_model_unloadable(inspect: Inspect, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    places = {"model.embed_tokens.weight": "model-00001-of-00009.safetensors"}
    write(folder / "model.safetensors.index.json", {"weight_map": places})
    assert inspect(folder).loadable


def test_a_model_without_a_tokenizer_is_not_loadable(inspect: Inspect, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    assert inspect(folder).reason == "The tokenizer is missing."
    (folder / "tokenizer.model").write_bytes(b"a sentencepiece model")
    assert inspect(folder).loadable


def test_a_half_downloaded_tokenizer_is_noticed(inspect: Inspect, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"added_tokens": [')
    assert inspect(folder).reason == "tokenizer.json is truncated or not JSON."


def test_reordered_gptq_weights_are_not_loadable(inspect: Inspect, tmp_path: Path) -> None:
    folder = model(
        tmp_path / "model",
        config={"quantization_config": {"quant_method": "gptq", "bits": 4}},
        tensors={
            "a.qweight": ("I32", [8, 8]),
            "a.g_idx": ("I32", [64]),
            "a.scales": ("F16", [1, 8]),
        },
    )
    assert "g_idx" in str(inspect(folder).reason)


@pytest.mark.parametrize(
    ("defect", "loadable"),
    [
        ("missing_config", False),
        ("truncated_weights", False),
        ("empty_weights", False),
        ("lfs_pointer", False),
        ("missing_weights", False),
        ("missing_shard", False),
        ("unknown_architecture", False),
        ("missing_tokenizer", False),
        ("no_tokenizer_files", False),
        ("shape_mismatch", True),  # only the backend can tell
        ("raising_template", True),
    ],
)
def test_the_defects_that_files_show_are_known_before_a_load(
    inspect: Inspect, tmp_path: Path, defect: str, loadable: bool
) -> None:
    folder = tiny_models.build(tmp_path / "model", shards=2)
    assert inspect(folder).loadable
    assert inspect(tiny_models.break_model(folder, defect)).loadable is loadable


# -- what it keeps of earlier prompts

HYBRID = {"model_type": "qwen3_next", "full_attention_interval": 4}
SLIDING = {"model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 6}


@newest_mlx_lm
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "qwen3"}, "prefix"),
        ({"model_type": "deepseek_v32", "kv_lora_rank": 16}, "prefix"),
        ({"model_type": "llama"}, "prefix"),
        (
            {
                "model_type": "llama",
                "sliding_window": 512,
                "layer_types": ["sliding_attention", "full_attention"],
                "num_hidden_layers": 2,
            },
            "window",
        ),
        (SLIDING, "window"),
        ({"model_type": "gemma3", "text_config": SLIDING}, "window"),
        ({"model_type": "mamba2"}, "whole"),
        (HYBRID, "whole"),
        ({"model_type": "deepseek_v41"}, None),  # a cache of its own
        ({"model_type": "unheard_of"}, None),
    ],
    ids=str,
)
def test_what_an_earlier_prompt_on_disk_spares_a_later_one_is_told(
    inspect: Inspect, tmp_path: Path, config: dict[str, Any], expected: str | None
) -> None:
    found = inspect(model(tmp_path / "model", config=config)).capabilities
    assert found.prompt_cache_disk == expected


@newest_mlx_lm
def test_an_mlx_lm_that_cannot_restore_caches_spares_nothing(tmp_path: Path) -> None:
    old = tmp_path / "mlx_lm"
    shutil.copytree(installed() / "models", old / "models", ignore=_all_but("cache", "qwen3"))
    cache = old / "models" / "cache.py"
    cache.write_text(
        cache.read_text().replace("def from_state(cls, state)", "def from_state(cls, state, meta)")
    )
    folder = model(tmp_path / "model")
    sizes = {it.name: it.stat().st_size for it in folder.iterdir()}
    found = Inspector(Package(old))(Folder(str(folder), "publisher/model", sizes, 0))
    assert found.capabilities.prompt_cache_disk is None
    assert found.architecture == "qwen3"


def _all_but(*modules: str) -> Callable[[str, list[str]], list[str]]:
    return lambda folder, names: [it for it in names if it.removesuffix(".py") not in modules]


# -- how large it is


def test_parameters_are_counted_as_before_quantization(inspect: Inspect, tmp_path: Path) -> None:
    plain = inspect(tiny_models.build(tmp_path / "plain", hidden=128))
    packed = inspect(tiny_models.build(tmp_path / "packed", hidden=128, quantize=4))
    tensors = load_file(plain.path / "model.safetensors").values()
    assert plain.parameters == packed.parameters == sum(it.size for it in tensors)
    assert plain.weights_bytes == sum(it.nbytes for it in tensors)
    assert packed.weights_bytes < plain.weights_bytes / 3
    assert packed.size_bytes > packed.weights_bytes
    assert packed.quantization == {"name": "4-bit", "bits": 4, "group_size": 64}


def _packed(rows: int, columns: int, bits: int, group: int, scales: str = "BF16") -> dict[str, Any]:
    return {
        "weight": ("U32", [rows, columns * bits // 32]),
        "scales": (scales, [rows, columns // group]),
        "biases": (scales, [rows, columns // group]),
    }


@pytest.mark.parametrize(
    ("config", "tensors", "parameters", "name"),
    [
        ({}, {"a.weight": ("BF16", [64, 64]), "a.bias": ("F32", [64])}, 64 * 65, None),
        (
            {"quantization": {"bits": 3, "group_size": 32}},
            {f"a.{kind}": it for kind, it in _packed(64, 128, 3, 32).items()},
            64 * 128,
            "3-bit",
        ),
        (
            {
                "quantization": {
                    "bits": 4,
                    "group_size": 64,
                    "b": {"bits": 8, "group_size": 32},
                    "c": False,
                }
            },
            {
                **{f"a.{kind}": it for kind, it in _packed(64, 128, 4, 64).items()},
                **{f"b.{kind}": it for kind, it in _packed(64, 128, 8, 32).items()},
                "c.weight": ("BF16", [10]),
            },
            2 * 64 * 128 + 10,
            "mixed 4/8-bit",
        ),
        (
            {"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}},
            {"a.weight": ("U32", [64, 16]), "a.scales": ("U8", [64, 4])},
            64 * 128,
            "mxfp4",
        ),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
            {
                "a.qweight": ("I32", [256, 8]),
                "a.qzeros": ("I32", [2, 8]),
                "a.scales": ("F16", [2, 64]),
            },
            256 * 64,
            "awq",
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            {"a.weight": ("F8_E4M3", [64, 64]), "a.weight_scale_inv": ("F32", [1, 1])},
            64 * 64,
            "fp8",
        ),
        (
            {"quantization_config": {"quant_method": "mxfp4"}},
            {"a.w_blocks": ("U8", [4, 4, 16]), "a.w_scales": ("U8", [4, 4])},
            4 * 4 * 32,
            "mxfp4",
        ),
    ],
)
def test_parameters_are_counted_in_every_kind_of_quantization(
    inspect: Inspect,
    tmp_path: Path,
    config: dict[str, Any],
    tensors: dict[str, Any],
    parameters: int,
    name: str | None,
) -> None:
    found = inspect(model(tmp_path / "model", config=config, tensors=tensors))
    assert (found.loadable, found.parameters) == (True, parameters)
    assert (found.quantization or {}).get("name") == name


def test_weights_that_the_backend_leaves_out_take_no_memory(
    inspect: Inspect, tmp_path: Path
) -> None:
    tensors = {
        "language_model.model.embed_tokens.weight": ("BF16", [100, 64]),
        "vision_tower.patch.weight": ("BF16", [100, 64]),
        "model.visual.patch.weight": ("BF16", [100, 64]),
    }
    config = {"model_type": "qwen3_vl", "vision_config": {"depth": 2}}
    found = inspect(model(tmp_path / "model", config=config, tensors=tensors))
    assert (found.parameters, found.weights_bytes) == (3 * 6400, 2 * 6400)


def test_weights_that_are_unpacked_when_loaded_take_twice_the_memory(
    inspect: Inspect, tmp_path: Path
) -> None:
    config = {"quantization_config": {"quant_method": "fp8"}}
    tensors = {"a.weight": ("F8_E4M3", [64, 64])}
    assert (
        inspect(model(tmp_path / "m", config=config, tensors=tensors)).weights_bytes == 2 * 64 * 64
    )


# -- what it can do

QWEN_LIKE = (
    "{%- for message in messages %}{{ message.content }}{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{%- if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>"
    "{%- endif %}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "tokens", "thinking", "default", "switch"),
    [
        pytest.param(QWEN_LIKE, THINK, True, True, True, id="on unless switched off"),
        pytest.param(QWEN_LIKE, (), False, None, False, id="the vocabulary cannot"),
        pytest.param("{{ messages }}", THINK, False, None, False, id="the template never does"),
        pytest.param("{{ messages }}<think>", THINK, True, True, False, id="always"),
        pytest.param(
            "{% if thinking %}<think>{% endif %}",
            THINK,
            True,
            None,
            False,
            id="by a foreign switch",
        ),
        pytest.param(None, THINK, False, None, False, id="no template"),
    ],
)
def test_thinking_is_recognized_by_vocabulary_and_template(
    inspect: Inspect,
    tmp_path: Path,
    template: str | None,
    tokens: Sequence[str],
    thinking: bool,
    default: bool | None,
    switch: bool,
) -> None:
    found = inspect(model(tmp_path / "model", template=template, tokens=tokens)).capabilities
    assert (found.thinking, found.thinking_default, found.thinking_switch) == (
        thinking,
        default,
        switch,
    )


SYSTEM_SETS_MODE = """
{%- if enable_thinking is defined %}
    {%- if enable_thinking is sameas true %}{% set mode = "/think" %}
    {%- elif enable_thinking is sameas false %}{% set mode = "/no_think" %}{% endif %}
{%- endif %}
{%- set mode = mode | default("/think") %}
{%- if messages[0].role == "system" and "/no_think" in messages[0].content %}
    {%- set mode = "/no_think" %}
{%- endif %}
{{ mode }}
"""
NAMESPACE = """
{%- set ns = namespace(think=enable_thinking is not defined or enable_thinking) %}
{%- for message in messages %}
    {%- if message.content == "/off" %}{% set ns.think = false %}{% endif %}
{%- endfor %}
{{- "<think>" if ns.think else "<think></think>" }}
"""


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (QWEN_LIKE, (True, True)),
        (
            "{% if enable_thinking is defined and enable_thinking is true %}a{% endif %}",
            (True, False),
        ),
        ("{% if not enable_thinking %}off{% endif %}", (True, False)),
        ("{% if not enable_thinking | default(true) %}off{% endif %}", (True, True)),
        (
            "{{ '/off' if enable_thinking is defined and not enable_thinking else '' }}",
            (True, True),
        ),
        ("{{ m.content ~ ('' if enable_thinking else '/off') }}", (True, False)),
        ("{% if enable_thinking != false and tools %}a{% endif %}", (False, None)),
        ("{% if enable_thinking and messages[-1].x %}a{% endif %}", (True, False)),
        (
            "{% set t = enable_thinking if enable_thinking is defined else true %}{{ t }}",
            (True, True),
        ),
        ("{% macro ask(x) %}{% if enable_thinking %}a{% endif %}{% endmacro %}", (True, False)),
        ("{% generation %}{% if enable_thinking %}a{% endif %}{% endgeneration %}", (True, False)),
        (
            "{% for m in messages %}{% if enable_thinking %}{% break %}{% endif %}{% endfor %}",
            (False, None),
        ),
        (SYSTEM_SETS_MODE, (True, True)),
        (NAMESPACE, (True, True)),
        ("{# enable_thinking #}", (False, None)),
        ("{% if enable_thinking %}", (False, None)),
        ("{{ enable_thinking " + "(" * 100_000, (False, None)),
        ("{{ 1" + "0" * 10_000 + " }}{{ enable_thinking }}", (False, None)),
        ("{% if enable_thinking %}" + "x" * 1_000_000 + "{% endif %}", (False, None)),
    ],
)
def test_the_default_of_thinking_is_what_the_template_does_without_an_option(
    template: str, expected: tuple[bool, bool | None]
) -> None:
    assert thinking_switch(template) == expected


def test_a_template_with_tool_calls_that_the_backend_reads_has_tools(
    inspect: Inspect, tmp_path: Path
) -> None:
    assert inspect(tiny_models.build(tmp_path / "tiny")).capabilities.tools
    plain = inspect(model(tmp_path / "plain", template="{{ tools }}")).capabilities
    by_token = inspect(
        model(tmp_path / "token", template="", tokens=["<|tool_call_start|>", "<|tool_call_end|>"])
    ).capabilities
    by_config = model(tmp_path / "config")
    write(by_config / "tokenizer_config.json", {"tool_parser_type": "json_tools"})
    assert (plain.tools, by_token.tools) == (False, True)
    assert inspect(by_config).capabilities.tools


def test_the_template_that_the_backend_uses_is_inspected(inspect: Inspect, tmp_path: Path) -> None:
    tool = "<tool_call>{{ tool_call.name }}"
    folder = model(tmp_path / "model")
    write(folder / "chat_template.json", {"chat_template": tool})  # for processors only
    assert not inspect(folder).capabilities.tools
    write(folder / "tokenizer_config.json", {"chat_template": tool})
    assert inspect(folder).capabilities.tools
    named = [
        {"name": "default", "template": QWEN_LIKE + tool},
        {"name": "tool_use", "template": tool},
    ]
    write(folder / "tokenizer_config.json", {"chat_template": named})
    write(folder / "tokenizer.json", {"added_tokens": [{"content": token} for token in THINK]})
    several = inspect(folder).capabilities
    assert (several.tools, several.thinking_switch) == (False, True)
    (folder / "chat_template.jinja").write_text(tool)
    assert inspect(folder).capabilities.tools


def test_a_token_across_two_pieces_of_a_large_vocabulary_is_found(
    inspect: Inspect, tmp_path: Path
) -> None:
    folder = model(tmp_path / "model", template=QWEN_LIKE)
    for at in range((1 << 20) - 10, (1 << 20) + 1):
        start = '{"model": "'.ljust(at - 4, "x") + '", {'
        assert len(start) == at
        (folder / "tokenizer.json").write_text(start + '"<think>": 1, "</think>": 2}}')
        assert inspect(folder).capabilities.thinking, at


@newest_mlx_lm
def test_a_model_whose_images_the_backend_reads_has_vision(
    inspect: Inspect, tmp_path: Path
) -> None:
    config = {"model_type": "muse_spark", "vision_config": {"depth": 2}}
    assert inspect(model(tmp_path / "sees", config=config)).capabilities.vision
    assert not inspect(
        model(tmp_path / "blind", config={"model_type": "muse_spark"})
    ).capabilities.vision


@newest_mlx_lm
def test_the_rules_for_tools_and_thinking_are_those_of_the_installed_mlx_lm() -> None:
    """The backend's own functions, cut out of its source: importing it takes two seconds."""
    source = (installed() / "tokenizer_utils.py").read_text()
    wanted = {"_infer_tool_parser", "_infer_thinking", "_is_xtml_vocab"}
    functions: list[ast.stmt] = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name in wanted
    ]
    theirs: dict[str, Any] = {}
    exec(compile(ast.Module(functions, type_ignores=[]), "tokenizer_utils.py", "exec"), theirs)

    class Tokenizer:
        def __init__(self, template: str | None, vocabulary: Sequence[str]) -> None:
            self.chat_template = template
            self._vocabulary = vocabulary

        def get_vocab(self) -> dict[str, int]:
            return {token: number for number, token in enumerate(self._vocabulary)}

        def encode(self, text: str, **_: object) -> list[int]:
            return [0]

    markers = {
        node.value
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 5
    }
    groups = [(marker,) for marker in markers] + [*rules._TOOL_CALLS, *rules._TOOL_TOKENS]
    groups += [*rules._THINK_TOKENS, ()]
    for group in groups:
        for template, vocabulary in (("".join(group), ()), (None, group), ("think", group)):
            parser = theirs["_infer_tool_parser"](Tokenizer(template, vocabulary))
            thinks = theirs["_infer_thinking"](Tokenizer(template, vocabulary))[0] is not None
            by_template = rules._any_in(rules._TOOL_CALLS, template or "")
            tools = by_template or rules._any_in(rules._TOOL_TOKENS, vocabulary)
            assert tools == (parser is not None), (template, vocabulary, parser)
            ours = any(set(it) <= set(vocabulary) for it in rules._THINK_TOKENS)
            assert ours == thinks, (template, vocabulary)


def test_a_weights_file_without_tensors_is_accepted(inspect: Inspect, tmp_path: Path) -> None:
    folder = model(tmp_path / "model", shards=2)
    raw_weights(folder / "model-00002-of-00002.safetensors", b'{"__metadata__": {}}')
    assert inspect(folder).loadable


def test_schemas_are_possible_where_the_tokenizer_is_of_that_kind_and_something_enforces_them(
    tmp_path: Path,
) -> None:
    package = tmp_path / "site-packages" / "mlx_lm"
    (package / "models").mkdir(parents=True)
    (package / "models" / "qwen3.py").write_text("class Model: pass")
    folder = tiny_models.build(tmp_path / "model")

    def schemas() -> tuple[str, bool]:
        inspector = Inspector(Package(package))
        sizes = {it.name: it.stat().st_size for it in folder.iterdir()}
        found = inspector(Folder(str(folder), "publisher/model", sizes, 0))
        return inspector.fingerprint, found.capabilities.schemas

    before = schemas()
    (package.parent / "llguidance").mkdir()
    after = schemas()
    assert (before[1], after[1]) == (False, True)
    assert before[0] != after[0]  # or what is remembered of a folder would not be renewed
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"type": "BPE"', '"type": "Unigram"'))
    tokenizer.write_text(tokenizer.read_text().replace('"type":"BPE"', '"type":"Unigram"'))
    assert schemas()[1] is False


def test_two_threads_never_parse_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    package, parse, parsing = Package(), ast.parse, threading.Lock()
    overlaps: list[str] = []

    def parsed(source: Any, *rest: Any, **named: Any) -> Any:
        if not parsing.acquire(blocking=False):
            overlaps.append(threading.current_thread().name)
            return parse(source, *rest, **named)
        try:
            time.sleep(0.05)  # as if another thread got its turn here
            return parse(source, *rest, **named)
        finally:
            parsing.release()

    configs = [{"model_type": name} for name in ("qwen3", "llama", "gemma3_text", "phi3")]
    with monkeypatch.context() as patch, ThreadPoolExecutor(len(configs)) as pool:
        patch.setattr(ast, "parse", parsed)
        assert all(pool.map(package.architecture, configs))
    assert overlaps == []
