"""What config.py says about models: options, profiles, aliases, all of it checked at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlxproxy.backend.spec import Tuning
from mlxproxy.engines.mlx_lm.rules import RULES
from mlxproxy.guard.defaults import completed
from mlxproxy.preferences import LOADED, Preferences
from mlxproxy.settings import SettingError, load

HELLO = [{"role": "user", "content": "Hello"}]


def preferences(folder: Path, config: str) -> Preferences:
    """Return what that text of config.py amounts to."""
    (folder / "config.py").write_text(config)
    return Preferences(load({"INSTANCE_PATH": str(folder)}, {}), RULES)


def refusal(folder: Path, config: str) -> str:
    """Return the sentence with which that config.py is refused."""
    with pytest.raises(SettingError) as caught:
        preferences(folder, config)
    return str(caught.value)


# -- MODELS


def test_a_model_gets_the_options_of_each_pattern_that_fits_the_later_ones_first(
    tmp_path: Path,
) -> None:
    found = preferences(
        tmp_path,
        """
MODELS = {
    "*": {"ttl": "30m", "temperature": 0.7},
    "lmstudio-community/qwen3*": {"temperature": 0.6, "kv_bits": 8, "pin": True},
    "other/*": {"temperature": 0.1},
}
""",
    ).of("lmstudio-community/Qwen3-4B-4bit")
    assert found.load == {"ttl": 1800.0, "pin": True}
    assert found.request == {"temperature": 0.6}
    assert found.tuned() == Tuning(kv_bits=8)


def test_its_id_counts_more_than_any_pattern(tmp_path: Path) -> None:
    found = preferences(
        tmp_path, 'MODELS = {"a/b": {"max_tokens": 10}, "a/*": {"max_tokens": 20, "top_k": 5}}'
    )
    assert found.of("a/b").request == {"max_tokens": 10, "top_k": 5}
    assert found.of("a/c").request == {"max_tokens": 20, "top_k": 5}
    assert found.of("x/y").request == {}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperatur": 1}, "MODELS['a']: temperatur is not an option. Did you mean temperature?"),
        ({"temperature": 3}, "MODELS['a']: temperature must be a number from 0 to 2."),
        ({"temperature": "hot"}, "MODELS['a']: temperature must be a number from 0 to 2."),
        ({"kv_bits": 5}, "MODELS['a']: kv_bits = 5 must be 2, 3, 4, 6 or 8."),
        ({"pin": 1}, "MODELS['a']: pin = 1 must be True or False."),
        ({"ttl": "soon"}, "MODELS['a']: ttl = 'soon' must be seconds, or a duration such as"),
        ({"context": 5}, "MODELS['a']: context = 5 must be a whole number from 128 to"),
        ({"prompt_cache_bytes": "lots"}, "prompt_cache_bytes = 'lots' must be a size in bytes"),
        ({"reasoning_effort": "much"}, "MODELS['a']: reasoning_effort must be"),
        ({"system": "\ud800"}, "MODELS['a']: "),
    ],
)
def test_a_wrong_option_is_a_sentence_at_the_start(
    options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    assert sentence in refusal(tmp_path, f"MODELS = {{'a': {options!r}}}")


@pytest.mark.parametrize("value", ["5", "['a']", "{'a': 5}", "{5: {}}", "{'': {}}"])
def test_models_must_be_a_table(value: str, tmp_path: Path) -> None:
    assert "must be a dictionary of dictionaries" in refusal(tmp_path, f"MODELS = {value}")


# -- PROFILES


def test_a_profile_is_a_model_with_options_and_its_thinking_needs_no_process_of_its_own(
    tmp_path: Path,
) -> None:
    found = preferences(
        tmp_path,
        'PROFILES = {"qwen:nothink": {"model": "qwen3-4b", "enable_thinking": False, "ttl": 60}}',
    ).profiles["qwen:nothink"]
    assert found.model == "qwen3-4b"
    assert found.options.request == {"enable_thinking": False}
    assert found.options.load == {"ttl": 60.0}


def test_a_profile_names_a_model(tmp_path: Path) -> None:
    assert "PROFILES['a']: model must be the name" in refusal(tmp_path, 'PROFILES = {"a": {}}')
    chain = 'PROFILES = {"a": {"model": "b"}, "b": {"model": "m"}}'
    assert "PROFILES['a']: its model, 'b', is a profile." in refusal(tmp_path, chain)


# -- ALIASES


def test_an_alias_may_be_a_pattern(tmp_path: Path) -> None:
    found = preferences(tmp_path, 'ALIASES = {"gpt-*": "loaded", "claude-*": "coder"}')
    assert found.meaning("gpt-4o") == LOADED
    assert found.meaning("Claude-Sonnet-5") == "coder"
    assert found.meaning("qwen") is None


def test_an_alias_of_an_alias_is_followed(tmp_path: Path) -> None:
    found = preferences(tmp_path, 'ALIASES = {"a": "b", "b": "c"}')
    assert found.meaning("a") == "c"


@pytest.mark.parametrize(
    ("aliases", "circle"),
    [({"a": "a"}, "a → a"), ({"a": "b", "b": "a"}, "a → b → a"), ({"x": "a", "a": "a"}, "a → a")],
)
def test_aliases_in_a_circle_are_refused_with_their_names(
    aliases: dict[str, str], circle: str, tmp_path: Path
) -> None:
    assert f"in a circle: {circle}." in refusal(tmp_path, f"ALIASES = {aliases!r}")


# -- what a request gets


def test_a_request_keeps_what_it_says_and_gets_what_it_does_not(tmp_path: Path) -> None:
    body = {"messages": HELLO, "temperature": 0, "top_p": None}
    filled = completed(body, {"temperature": 0.7, "top_p": 0.9, "max_tokens": 5}, "chat")
    assert filled == {"messages": HELLO, "temperature": 0, "top_p": 0.9, "max_tokens": 5}
    assert body["top_p"] is None


def test_the_other_name_of_max_tokens_counts_too() -> None:
    body = {"messages": HELLO, "max_completion_tokens": 7}
    assert "max_tokens" not in completed(body, {"max_tokens": 5}, "chat")


def test_a_system_prompt_begins_a_conversation_that_has_none() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert completed({"messages": HELLO}, {"system": "Be brief."}, "chat")["messages"] == [
        system,
        *HELLO,
    ]
    for role in ("system", "developer"):
        own = [{"role": role, "content": "Be long."}, *HELLO]
        assert completed({"messages": own}, {"system": "Be brief."}, "chat")["messages"] == own


@pytest.mark.parametrize("messages", [None, 5, "Hello", [5]])
def test_what_is_no_conversation_is_left_to_the_guard(messages: Any) -> None:
    filled = completed({"messages": messages}, {"system": "Be brief."}, "chat")["messages"]
    assert filled == messages or filled[1:] == messages


def test_a_text_completion_has_no_system_prompt() -> None:
    assert completed({"prompt": "Once"}, {"system": "Be brief."}, "text") == {"prompt": "Once"}
