"""Which model a request means by its name, and what it is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlxproxy.backend.spec import ModelSpec
from mlxproxy.controller import History
from mlxproxy.engines.mlx_lm.engine import MlxLm
from mlxproxy.engines.mlx_lm.rules import RULES
from mlxproxy.preferences import Preferences
from mlxproxy.selection import Selection
from mlxproxy.settings import load
from tests.support.model_folders import catalog_of, model

HELLO = [{"role": "user", "content": "Hello"}]


class House:
    """A selection over a models folder, with nothing loaded."""

    def __init__(self, folder: Path, config: str = "", names: tuple[str, ...] = ("a/one",)) -> None:
        for name in names:
            model(folder / "models" / name)
        (folder / "config.py").write_text(config)
        settings = load({"INSTANCE_PATH": str(folder), "MODELS_ROOT": str(folder / "models")}, {})
        self.residents: list[ModelSpec] = []
        controller: Any = SimpleNamespace(
            residents=lambda: self.residents,
            current=lambda: self.residents[-1] if self.residents else None,
        )
        engine: Any = SimpleNamespace(rules=RULES)
        self.history = History(folder / "history.json")
        self.selection = Selection(
            settings,
            {MlxLm.name: engine},
            catalog_of([folder / "models"], patience=10),
            controller,
            self.history,
            Preferences(settings, RULES),
        )

    def named(self, name: object) -> str | None:
        """Return the id of the model that a name means."""
        spec = self.selection.named_spec(name)
        return spec.model_id if spec else None


# -- names


def test_a_request_gets_the_model_it_names(tmp_path: Path) -> None:
    house = House(tmp_path, names=("a/one", "a/two"))
    assert house.named("a/one") == "a/one"
    assert house.named("two") == "a/two"
    assert house.named("gpt-4o") is house.named(None) is house.named("") is None


def test_a_profile_is_its_model_with_its_options(tmp_path: Path) -> None:
    config = 'PROFILES = {"coder": {"model": "one", "ttl": 60, "kv_bits": 8}}'
    spec = House(tmp_path, config).selection.named_spec("coder")
    assert spec is not None
    assert (spec.model_id, spec.ttl, spec.tuning.kv_bits) == ("a/one", 60.0, 8)


def test_a_models_own_name_counts_more_than_an_alias(tmp_path: Path) -> None:
    config = """
PROFILES = {"coder": {"model": "two", "temperature": 0.1}}
ALIASES = {"*one": "coder", "one*": "coder"}
"""
    house = House(tmp_path, config, names=("a/one", "a/two"))
    for name in ("one", "a/one"):
        assert house.named(name) == "a/one"
        assert house.selection.profile(name) is None, "answered by a/one as if it were the profile"
    assert house.named("one-latest") == "a/two"


def test_a_profile_with_the_name_of_a_model_means_the_same_whatever_is_loaded(
    tmp_path: Path,
) -> None:
    house = House(tmp_path, 'PROFILES = {"a/one": {"model": "a/two"}}', names=("a/one", "a/two"))
    selection = house.selection
    house.residents.append(ModelSpec(selection.catalog.find("a/one")))
    assert house.named("a/one") == "a/two"
    assert selection.path_of("a/one") == str(selection.catalog.find("a/two").path)


def test_aliases_that_lead_to_each_other_by_their_patterns_end_all_the_same(tmp_path: Path) -> None:
    house = House(tmp_path, 'ALIASES = {"ab*": "ax", "a*": "abc"}')
    assert house.named("abx") is house.named("ay") is None
    assert house.selection.profile("ab") is None


def test_a_load_an_unload_and_a_listing_take_each_name_that_a_chat_takes(tmp_path: Path) -> None:
    config = """
PROFILES = {"coder": {"model": "one", "kv_bits": 8}}
ALIASES = {"gpt-*": "coder", "o1": "two"}
"""
    selection = House(tmp_path, config, names=("a/one", "a/two")).selection
    for name, wanted, bits in (("coder", "a/one", 8), ("gpt-4", "a/one", 8), ("o1", "a/two", None)):
        spec = selection.named_spec(name)
        assert spec is not None
        assert (spec.model_id, spec.tuning.kv_bits) == (wanted, bits)
        assert selection.spec_for(name) == spec
        assert selection.path_of(name) == spec.path
        assert selection.find(name)[0].id == wanted


def test_a_draft_model_counts_in_the_memory_that_its_model_needs(tmp_path: Path) -> None:
    config = 'MODELS = {"a/one": {"draft_model": "two"}, "a/two": {"draft_model": "gone"}}'
    house = House(tmp_path, config, names=("a/one", "a/two"))
    one, two = (house.selection.catalog.find(name) for name in ("a/one", "a/two"))
    spec = house.selection.spec_for("a/one")
    assert spec.tuning.draft_model == str(two.path)
    assert one.needed_bytes > 0 < two.needed_bytes
    assert spec.needed_bytes == house.selection.needed_bytes(one)
    assert spec.needed_bytes == one.needed_bytes + two.needed_bytes
    assert house.selection.needed_bytes(two) == two.needed_bytes


def test_an_alias_stands_for_a_model_a_profile_or_what_is_loaded(tmp_path: Path) -> None:
    config = """
PROFILES = {"coder": {"model": "one"}}
ALIASES = {"gpt-*": "loaded", "claude-*": "coder", "small": "two", "gone": "nothing"}
"""
    house = House(tmp_path, config, names=("a/one", "a/two"))
    assert house.named("gpt-4o") is None
    assert house.named("claude-x") == "a/one"
    assert house.named("small") == "a/two"
    assert house.named("gone") is None
    profile = house.selection.profile("claude-x")
    assert profile is not None
    assert profile.name == "coder"


def test_a_model_on_disk_comes_before_an_alias_of_its_name(tmp_path: Path) -> None:
    house = House(tmp_path, 'ALIASES = {"gpt-*": "one"}', names=("a/one", "a/gpt-oss"))
    assert house.named("gpt-oss") == "a/gpt-oss"
    assert house.named("gpt-5") == "a/one"


def test_a_name_that_is_no_models_costs_no_look_at_the_disk_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(tmp_path)
    looks: list[float] = []
    catalog, fresh = house.selection.catalog, house.selection.catalog._fresh

    def counted() -> Any:
        looks.append(1)
        return fresh()

    monkeypatch.setattr(catalog, "_fresh", counted)
    assert [house.named("gpt-4o") for _ in range(50)] == [None] * 50
    assert len(looks) <= 2
    model(tmp_path / "models" / "a" / "new")
    monkeypatch.setattr(catalog, "_looked_at", -10.0)
    assert house.named("new") == "a/new"


# -- with nothing loaded


def test_the_only_model_is_loaded_for_a_name_that_is_no_models(tmp_path: Path) -> None:
    spec, advice = House(tmp_path).selection.fallback()
    assert spec is not None
    assert spec.model_id == "a/one"
    assert advice == ""


def test_the_model_that_was_loaded_last_is_loaded_again(tmp_path: Path) -> None:
    house = House(tmp_path, names=("a/one", "a/two", "a/three"))
    house.history.loaded(house.selection.spec_for("two"), 1.0)
    spec, _ = house.selection.fallback()
    assert spec is not None
    assert spec.model_id == "a/two"


def test_of_several_none_is_chosen_and_the_error_names_three_and_the_command(
    tmp_path: Path,
) -> None:
    names = ("a/four", "a/one", "a/three", "a/two")
    spec, advice = House(tmp_path, names=names).selection.fallback()
    assert spec is None
    assert advice == (
        "Name one as the model (a/four, a/one, a/three, …), load one with POST /v1/models/load, or "
        "run `mlxproxy load a/four`."
    )


def test_after_an_unload_that_somebody_asked_for_nothing_is_loaded_by_itself(
    tmp_path: Path,
) -> None:
    house = House(tmp_path)
    house.history.loaded(house.selection.spec_for("one"), 1.0)
    house.history.unloaded()
    assert house.selection.fallback().spec is None


def test_by_the_originals_rule_only_a_model_that_is_named_is_loaded(tmp_path: Path) -> None:
    assert House(tmp_path, 'MODEL_SELECTION = "loaded"').selection.fallback() == (None, "")


# -- what a request is given


def given(house: House, name: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return what the backend gets of a request that names a model or a profile."""
    selection = house.selection
    spec = selection.named_spec(name)
    assert spec is not None
    spec = replace(spec, model=replace(spec.model, sampling={"temperature": 0.6, "top_k": 20}))
    terms = selection.terms(spec, selection.profile(name))
    return terms.check({"messages": HELLO, **body}, "chat")


def test_a_request_without_sampling_gets_the_models_own(tmp_path: Path) -> None:
    house = House(tmp_path)
    assert given(house, "one", {}) == {"messages": HELLO, "temperature": 0.6, "top_k": 20}
    assert given(house, "one", {"temperature": 0})["temperature"] == 0


def test_what_the_person_has_set_counts_more_and_the_request_most(tmp_path: Path) -> None:
    config = """
MODELS = {"a/*": {"temperature": 0.3, "max_tokens": 100}}
PROFILES = {"coder": {"model": "one", "temperature": 0.1, "enable_thinking": False}}
"""
    house = House(tmp_path, config)
    assert given(house, "one", {})["temperature"] == 0.3
    coder = given(house, "coder", {"max_tokens": 7})
    assert (coder["temperature"], coder["top_k"], coder["max_tokens"]) == (0.1, 20, 7)
    assert coder["chat_template_kwargs"] == {"enable_thinking": False}


def test_greedy_leaves_the_models_own_sampling_out(tmp_path: Path) -> None:
    house = House(tmp_path, 'SAMPLING_DEFAULTS = "greedy"')
    assert given(house, "one", {}) == {"messages": HELLO}


@pytest.mark.parametrize("limit", [64, None])
def test_a_context_that_is_set_bounds_the_prompt(limit: int | None, tmp_path: Path) -> None:
    config = f'MODELS = {{"a/one": {{"context": {limit or 4096}}}}}'
    spec = House(tmp_path, config if limit is None else "").selection.spec_for("one")
    expected = 4096 if limit is None else None
    if expected is not None:
        assert spec.max_context == min(expected, spec.model.max_context_length or expected)
    else:
        assert spec.max_context == spec.model.max_context_length


def test_what_is_in_force_is_shown(tmp_path: Path) -> None:
    config = 'MODELS = {"a/*": {"ttl": 60, "kv_bits": 8, "temperature": 0.3}}'
    selection = House(tmp_path, config).selection
    shown = selection.in_force(selection.spec_for("one").model)
    assert shown["load"] == {"enable_thinking": False, "ttl": 60.0, "kv_bits": 8}
    assert shown["requests"] == {"temperature": 0.3}


def test_a_name_in_the_settings_that_no_model_has_is_told(tmp_path: Path) -> None:
    config = """
PROFILES = {"coder": {"model": "gone"}, "fine": {"model": "one"}}
ALIASES = {"gpt-*": "loaded", "claude-*": "fine", "o1": "o2", "o2": "lost"}
MODELS = {"a/*": {"draft_model": "small"}, "a/one": {"draft_model": "one"}}
"""
    selection = House(tmp_path, config).selection
    assert selection.strangers() == [
        "PROFILES['coder'] names 'gone', which is not on disk (yet).",
        "ALIASES['o1'] names 'lost', which is not on disk (yet).",
        "ALIASES['o2'] names 'lost', which is not on disk (yet).",
        "MODELS['a/*']: draft_model names 'small', which is not on disk (yet).",
    ]
    assert [(profile.name, found.id) for profile, found in selection.profiles()] == [
        ("fine", "a/one")
    ]
