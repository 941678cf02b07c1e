"""Which engine serves a folder: the catalogue's decision, with and without mlx-vlm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mlxproxy.catalog.inspector import Inspectors
from mlxproxy.catalog.layout import Folder
from mlxproxy.catalog.model import Model
from mlxproxy.engines.mlx_lm.inspection import Inspector as TextInspector
from mlxproxy.engines.mlx_lm.package import Package as TextPackage
from mlxproxy.engines.mlx_lm.rules import RULES
from mlxproxy.engines.mlx_vlm.inspection import Inspector
from mlxproxy.engines.mlx_vlm.package import Package
from mlxproxy.preferences import EngineChoice, Preferences
from mlxproxy.settings import SettingError, load
from tests.support import tiny_vision
from tests.support.model_folders import model, write

LM, VLM = "mlx_lm.server", "mlx_vlm.server"
SEES = {"model_type": "qwen3_vl", "vision_config": {"depth": 2}}
EYES = {"model.visual.blocks.0.weight": ("BF16", [8, 8])}
BERT = {"model_type": "bert", "architectures": ["BertModel"]}
RANKS = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}


@pytest.fixture(scope="module")
def mlx_vlm(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """The tables of an mlx-vlm, as far as they are read."""
    folder = tmp_path_factory.mktemp("site") / "mlx_vlm"
    sources = {
        "utils.py": "MODEL_REMAPPING = {'lfm2-vl': 'lfm2_vl'}",
        "embedding_loader.py": "EMBEDDING_MODEL_REMAPPING = {'qwen3': 'qwen3_embedding'}",
        "reranker.py": "_RERANKER_KINDS = {'bert': Kind.A, 'qwen3': Kind.B}",
        "models/qwen3_vl/language.py": "return LanguageModelOutput(logits=x)",
        "models/qwen3_vl/__init__.py": "from .x import LanguageModel, Model, VisionModel",
        "models/lfm2_vl/language.py": "return LanguageModelOutput(logits=x)",
        "models/lfm2_vl/__init__.py": "from .x import LanguageModel, Model, VisionModel",
        "models/onlyhere/language.py": "return LanguageModelOutput(logits=x)",
        "models/onlyhere/__init__.py": "from .x import LanguageModel, Model",
        "models/qwen3/language.py": "return LanguageModelOutput(logits=x)",
        "models/qwen3/__init__.py": "from .x import LanguageModel, Model",
        "models/bert/__init__.py": "from .bert import Model",
        "models/bert/bert.py": "return EmbeddingOutput(text_embeds=h)",
        "models/qwen3_embedding/q.py": "return EmbeddingOutput(text_embeds=h)",
    }
    for name, source in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)
    return Package(folder)


def judged(folder: Path, package: Package, chosen: EngineChoice | None = None) -> Model:
    sizes = {it.name: it.stat().st_size for it in folder.iterdir() if it.is_file()}
    inspect = Inspectors([TextInspector(TextPackage()), Inspector(package)], chosen)
    return inspect(Folder(str(folder), f"publisher/{folder.name}", sizes, 0))


@pytest.mark.parametrize(
    ("name", "config", "tensors", "engine", "kind", "vision"),
    [
        ("text", {}, {}, LM, "llm", False),
        ("sees", SEES, EYES, VLM, "vlm", True),
        ("blind", SEES, {}, LM, "vlm", False),
        ("alias", {**SEES, "model_type": "lfm2-vl"}, EYES, VLM, "vlm", True),
        ("unknown-to-mlx-lm", {"model_type": "onlyhere"}, {}, VLM, "llm", False),
        ("bert", BERT, {}, VLM, "embedding", False),
        ("Qwen3-Embedding", {}, {}, VLM, "embedding", False),
        ("ranks", RANKS, {}, VLM, "reranker", False),
        ("Qwen3-Reranker", {}, {}, VLM, "reranker", False),
    ],
)
def test_a_model_goes_where_it_does_most(
    mlx_vlm: Package,
    tmp_path: Path,
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    engine: str,
    kind: str,
    vision: bool,
) -> None:
    usual = {"model.embed_tokens.weight": ("BF16", [100, 64])}
    folder = model(tmp_path / name, config=config, tensors={**usual, **tensors})
    found = judged(folder, mlx_vlm)
    assert (found.loadable, found.reason) == (True, None)
    assert (found.engine, found.type, found.capabilities.vision) == (engine, kind, vision)


@pytest.mark.parametrize(
    ("name", "config", "sentence"),
    [
        ("bert", BERT, "It is an embedding model, which needs mlx-vlm. Run `make install-vision`"),
        ("ranks", RANKS, "It is a reranker, which needs mlx-vlm. Run `make install-vision`"),
        (
            "onlyhere",
            {**SEES, "model_type": "onlyhere"},
            "Its images need mlx-vlm. Run `make install-vision`",
        ),
    ],
)
def test_without_mlx_vlm_its_models_are_listed_with_the_reason_and_the_command(
    tmp_path: Path, name: str, config: Mapping[str, Any], sentence: str
) -> None:
    found = judged(model(tmp_path / name, config=config), Package(None))
    assert not found.loadable
    assert found.reason is not None
    assert found.reason.startswith(sentence)


def test_without_mlx_vlm_a_model_that_sees_writes_text_and_says_what_it_lacks(
    tmp_path: Path,
) -> None:
    found = judged(model(tmp_path / "sees", config=SEES, tensors=EYES), Package(None))
    assert (found.engine, found.loadable, found.reason) == (LM, True, None)
    assert found.lacking is not None
    assert found.lacking.startswith("Its images need mlx-vlm. Run `make install-vision`")
    assert found.to_dict()["lacking"] == found.lacking


def test_a_text_model_lacks_nothing_without_mlx_vlm(tmp_path: Path) -> None:
    found = judged(model(tmp_path / "text"), Package(None))
    assert (found.engine, found.loadable, found.lacking) == (LM, True, None)


def test_the_second_engine_does_not_read_what_the_first_one_serves(tmp_path: Path) -> None:
    class Unused(Inspector):
        def __call__(self, folder: Folder) -> Model:
            raise AssertionError(f"{folder.id} is read twice")

    folder = model(tmp_path / "text")
    sizes = {it.name: it.stat().st_size for it in folder.iterdir()}
    inspect = Inspectors([TextInspector(TextPackage()), Unused(Package(None))])
    assert inspect(Folder(str(folder), "a/text", sizes, 0)).engine == LM


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {**RANKS, "id2label": {"0": "bad", "1": "good"}},
            "It is a classifier of several labels; a reranker has a single score.",
        ),
        (
            {**RANKS, "model_type": "deberta"},
            "The installed mlx-vlm does not support rerankers of the architecture 'deberta'.",
        ),
        (
            {**BERT, "model_type": "nomic_bert"},
            "The installed mlx-vlm does not support embedding models of the architecture "
            "'nomic_bert'.",
        ),
        (
            {**BERT, "model_type": "../bert"},
            "The installed mlx-vlm does not support embedding models of the architecture "
            "'../bert'.",
        ),
        (
            {**SEES, "model_file": "own.py"},
            "It comes with its own Python code (model_file), which mlxproxy does not run.",
        ),
    ],
)
def test_what_mlx_vlm_cannot_load_or_must_not_is_refused(
    mlx_vlm: Package, tmp_path: Path, config: Mapping[str, Any], sentence: str
) -> None:
    found = judged(model(tmp_path / "a", config=config, tensors=EYES), mlx_vlm)
    assert (found.loadable, found.reason) == (False, sentence)


@pytest.mark.parametrize(
    ("pooling", "reason"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, None),
        (
            {"pooling_mode_weightedmean_tokens": True},
            "The installed mlx-vlm does not support its pooling (weightedmean_tokens).",
        ),
        (
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            "The installed mlx-vlm does not support its pooling (cls_token, mean_tokens).",
        ),
    ],
)
def test_a_pooling_that_mlx_vlm_lacks_is_refused(
    mlx_vlm: Package, tmp_path: Path, pooling: Mapping[str, bool], reason: str | None
) -> None:
    folder = tiny_vision.build_encoder(tmp_path / "encoder")
    write(folder / "1_Pooling" / "config.json", pooling)
    assert judged(folder, mlx_vlm).reason == reason


@pytest.mark.parametrize(
    ("positions", "tokenizer", "kind", "most"),
    [
        (512, 512, "bert", 512),
        (512, None, "bert", 512),
        (512, 256, "bert", 256),
        (514, 10**30, "xlm-roberta", 512),
        (32768, 32768, "bert", 8192),
    ],
)
def test_a_text_to_embed_may_be_as_long_as_every_part_allows(
    tmp_path: Path,
    mlx_vlm: Package,
    positions: int,
    tokenizer: int | None,
    kind: str,
    most: int,
) -> None:
    folder = tiny_vision.build_encoder(tmp_path / "encoder", model_type=kind, pad_token_id=1)
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", {**config, "max_position_embeddings": positions})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder / "tokenizer_config.json", {**config, "model_max_length": tokenizer})
    assert judged(folder, mlx_vlm).max_context_length == most


def test_models_can_say_otherwise(mlx_vlm: Package, tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text(
        "MODELS = {'*/text': {'engine': 'mlx_vlm'}, '*/se*': {'engine': 'mlx_lm.server'}}"
    )
    settings = load({"INSTANCE_PATH": str(tmp_path)}, {})
    chosen = EngineChoice(settings, [LM, VLM])
    assert judged(model(tmp_path / "text"), mlx_vlm, chosen).engine == VLM
    sees = model(tmp_path / "sees", config=SEES, tensors=EYES)
    assert judged(sees, mlx_vlm, chosen).engine == LM
    assert judged(sees, mlx_vlm).engine == VLM
    (tmp_path / "config.py").write_text("MODELS = {'*/text': {'engine': 'ollama'}}")
    settings = load({"INSTANCE_PATH": str(tmp_path)}, {})
    with pytest.raises(SettingError, match="must be one of mlx_lm, mlx_vlm"):
        Preferences(settings, RULES, [LM, VLM])
    # Whoever only reads folders, as `mlxproxy doctor` does, goes on.
    assert judged(sees, mlx_vlm, EngineChoice(settings, [LM, VLM])).engine == VLM


def test_another_mlx_vlm_or_choice_looks_at_the_models_anew(
    mlx_vlm: Package, tmp_path: Path
) -> None:
    (tmp_path / "config.py").write_text("MODELS = {'*/text': {'engine': 'mlx_vlm'}}")
    chosen = EngineChoice(load({"INSTANCE_PATH": str(tmp_path)}, {}), [LM, VLM])
    inspectors = [
        Inspectors([Inspector(mlx_vlm)]),
        Inspectors([Inspector(Package(None))]),
        Inspectors([Inspector(mlx_vlm)], chosen),
    ]
    assert len({inspector.fingerprint for inspector in inspectors}) == 3
