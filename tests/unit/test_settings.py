"""Settings: where they come from, and what a wrong one says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlxproxy import settings
from mlxproxy.controller.state import Limits
from mlxproxy.settings import SettingError

ROOT = Path(__file__).parents[2]


def load(tmp_path: Path, config: str = "", env: dict[str, str] | None = None, **flags: str):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.py").write_text(config)
    environment = {"MLXPROXY_INSTANCE_PATH": str(tmp_path), **(env or {})}
    return settings.load(flags, environment)


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(
    tmp_path: Path,
) -> None:
    config = "PROXY_PORT = 1001\nMAX_QUEUE = 11\nMAX_CONCURRENT = 21"
    env = {"MLXPROXY_PROXY_PORT": "1002", "MLXPROXY_MAX_QUEUE": "12"}
    found = load(tmp_path, config, env, PROXY_PORT="1003")
    assert (found.proxy_port, found.max_queue, found.max_concurrent) == (1003, 12, 21)
    assert found.mlx_backend_port == 18080


def test_the_original_tools_assignments_work_when_pasted_into_the_file(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        'MODELS_ROOT = Path("/path/to/your/LM_Studio_Models") # required\n'
        'MLX_SERVER_BIN = Path.home() / "mlx-server/bin/mlx_lm.server"\n'
        "MLX_BACKEND_PORT = 18080 # Internal port (no change needed)\n"
        "PROXY_PORT = 8080\n"
        'PROXY_HOST = "0.0.0.0"\n',
    )
    assert found.models_root == (Path("/path/to/your/LM_Studio_Models"),)
    assert found.mlx_server_bin == Path.home() / "mlx-server/bin/mlx_lm.server"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("'/a'", (Path("/a"),)),
        ("'/a:/b'", (Path("/a"), Path("/b"))),
        ("['/a', Path('/b')]", (Path("/a"), Path("/b"))),
        ("'~/models'", (Path.home() / "models",)),
    ],
)
def test_models_root_takes_one_or_several_folders(
    tmp_path: Path, given: str, expected: tuple[Path, ...]
) -> None:
    assert load(tmp_path, f"MODELS_ROOT = {given}").models_root == expected


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("PROXY_PORT", "http", "a port number from 1 to 65535"),
        ("PROXY_PORT", "70000", "a port number from 1 to 65535"),
        ("IDLE_TTL", "soon", "seconds"),
        ("IDLE_TTL", "-1", "seconds"),
        ("LOAD_TIMEOUT", "nan", "seconds"),
        ("MAX_BODY", "big", "a size in bytes"),
        ("MAX_CONCURRENT", "0", "a whole number from 1"),
        ("MAX_LOADED", "0", "a whole number from 1 to 8, or auto"),
        ("MAX_LOADED", "many", "a whole number from 1 to 8, or auto"),
        ("MEMORY_BUDGET", "0%", "a size such as 24GB, or a percentage"),
        ("MEMORY_BUDGET", "101%", "a size such as 24GB, or a percentage"),
        ("MEMORY_BUDGET", "much", "a size such as 24GB, or a percentage"),
        ("ENABLE_THINKING", "maybe", "true or false"),
        ("MODEL_SELECTION", "any", "requested or loaded"),
        ("LOG_LEVEL", "LOUD", "DEBUG or INFO"),
        ("PROXY_HOST", "no such host", "an address of this machine"),
        ("API_KEY", "with\nnewline", "one value or several"),
    ],
)
def test_a_wrong_value_names_the_setting_the_value_and_what_is_allowed(
    tmp_path: Path, name: str, value: str, allowed: str
) -> None:
    with pytest.raises(SettingError) as caught:
        load(tmp_path, env={f"MLXPROXY_{name}": value})
    message = str(caught.value)
    assert name in message
    assert allowed in message
    assert "the environment" in message
    assert value in message or name == "API_KEY"


def test_a_misspelled_setting_is_answered_with_the_right_name(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="Did you mean MODELS_ROOT"):
        load(tmp_path, "MODEL_ROOT = '/models'")
    with pytest.raises(SettingError, match="Did you mean PROXY_PORT"):
        load(tmp_path, env={"MLXPROXY_PROXYPORT": "1"})
    with pytest.raises(SettingError, match=r"DIRECT_SEND \(from .*config\.py\) is not a setting"):
        load(tmp_path, "DIRECT_SEND = False")


def test_a_config_file_that_does_not_run_is_reported_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"config\.py failed to run: NameError"):
        load(tmp_path, "PROXY_PORT = port")
    with pytest.raises(SettingError, match=r"config\.py failed to run: SyntaxError"):
        load(tmp_path, "PROXY_PORT = = 1")


def test_the_config_file_cannot_set_its_own_instance_folder(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="MLXPROXY_INSTANCE_PATH"):
        load(tmp_path, "INSTANCE_PATH = '/elsewhere'")


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90), ("90s", 90), ("30m", 1800), ("2h", 7200), ("1.5", 1.5)]
)
def test_durations_may_have_a_unit(tmp_path: Path, text: str, expected: float) -> None:
    assert load(tmp_path, IDLE_TTL=text).idle_ttl == expected


def test_keys_come_from_a_file_that_only_its_owner_may_read(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first\nsecond\n")
    file.chmod(0o600)
    found = load(tmp_path, API_KEY_FILE=str(file), API_KEY="third")
    assert found.keys == ("third", "first", "second")
    file.chmod(0o644)
    with pytest.raises(SettingError, match="chmod 600"):
        _ = found.keys


def test_a_key_is_a_whole_line_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(
        "# of the family\n\n  correct horse, battery #1 \n\t\n\t# and\nschl\u00fcssel\r\n"
    )
    file.chmod(0o600)
    assert load(tmp_path, API_KEY_FILE=str(file)).keys == (
        "correct horse, battery #1",
        "schl\u00fcssel",
    )
    file.write_text("# nothing but a remark\n")
    with pytest.raises(SettingError, match="it contains no key"):
        _ = load(tmp_path, API_KEY_FILE=str(file)).keys


@pytest.mark.parametrize(
    "key", ["\u9375", "a\tb", "a\x1bb", "a\x00b", "a\x85b", "a\u2028b", "\ufeffa"]
)
def test_a_key_that_no_header_can_carry_is_rejected_without_being_shown(
    tmp_path: Path, key: str
) -> None:
    file = tmp_path / "keys"
    file.write_bytes(f"fine\n{key}\n".encode())
    file.chmod(0o600)
    with pytest.raises(SettingError, match="line 2 cannot be sent") as caught:
        _ = load(tmp_path, API_KEY_FILE=str(file)).keys
    assert key not in str(caught.value)
    if key.isprintable():
        with pytest.raises(SettingError, match="API_KEY: a key cannot be sent"):
            _ = load(tmp_path, API_KEY=key).keys


def test_a_wrong_key_is_not_shown_in_the_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingError) as caught:
        load(tmp_path, env={"MLXPROXY_API_KEY": "secret\tkey"})
    assert "secret" not in str(caught.value)


def test_every_setting_is_in_the_example_configuration() -> None:
    example = (ROOT / "instance" / "config.example.py").read_text()
    for name, _, _ in settings.describe():
        assert f"# {name} = " in example or name == "INSTANCE_PATH"


def test_the_example_configuration_is_one_that_loads(tmp_path: Path) -> None:
    example = (ROOT / "instance" / "config.example.py").read_text()
    active = "\n".join(
        line.removeprefix("# ") if re.match("# [A-Z_]+ = ", line) else line
        for line in example.splitlines()
    )
    assert load(tmp_path, active).proxy_port == 8080


@pytest.mark.parametrize("text", [f"1{' ' * 100}s", "9" * 100, " " * 100 + "1", [1] * 100])
def test_an_overlong_duration_is_rejected_before_it_is_parsed(text: object) -> None:
    assert settings.seconds("  90 s ") == 90
    with pytest.raises(ValueError, match="not a duration"):
        settings.seconds(text)


def test_one_port_for_both_proxy_and_backend_is_rejected(tmp_path: Path) -> None:
    environment = {"MLXPROXY_INSTANCE_PATH": str(tmp_path), "MLXPROXY_PROXY_PORT": "18080"}
    with pytest.raises(SettingError, match="both 18080"):
        settings.load({}, environment)


def test_each_model_that_may_be_loaded_has_a_port_from_the_first_up(tmp_path: Path) -> None:
    assert list(load(tmp_path).backend_ports) == [18080]
    assert list(load(tmp_path, MAX_LOADED="3").backend_ports) == [18080, 18081, 18082]
    assert len(load(tmp_path, "MAX_LOADED = 'auto'").backend_ports) == settings.MOST_LOADED


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"PROXY_PORT": "18082", "MAX_LOADED": "3"}, "PROXY_PORT = 18082.* 18080 to 18082"),
        ({"OLLAMA_PORT": "18082", "MAX_LOADED": "3"}, "OLLAMA_PORT = 18082.* 18080 to 18082"),
        ({"OLLAMA_PORT": "8080"}, "PROXY_PORT and OLLAMA_PORT are both 8080"),
        ({"MLX_BACKEND_PORT": "65534", "MAX_LOADED": "3"}, "65534 to 65536"),
    ],
)
def test_each_port_is_a_real_one_and_serves_one_purpose(
    tmp_path: Path, flags: dict[str, str], told: str
) -> None:
    with pytest.raises(SettingError, match=told):
        load(tmp_path, **flags)


def test_there_is_no_port_for_ollama_unless_it_is_set(tmp_path: Path) -> None:
    assert load(tmp_path).ollama_port is None
    assert load(tmp_path, OLLAMA_PORT="none").ollama_port is None
    assert load(tmp_path, OLLAMA_PORT="11434").ollama_port == 11434


@pytest.mark.parametrize(
    ("text", "budget"), [("24GB", 24 << 30), ("1000", 1000), ("60%", 0.6), (" 12.5 % ", 0.125)]
)
def test_a_memory_budget_is_bytes_or_a_share(
    tmp_path: Path, text: str, budget: int | float
) -> None:
    found = load(tmp_path, MEMORY_BUDGET=text).memory_budget
    assert found == budget
    assert type(found) is type(budget)
    assert load(tmp_path).memory_budget is None


def test_a_part_gets_the_settings_that_it_names_and_has_the_same_defaults(tmp_path: Path) -> None:
    chosen = load(tmp_path, MAX_QUEUE="7", DRAIN_TIMEOUT="9")
    limits = chosen.part(Limits, swap_on_request=True)
    assert (limits.max_queue, limits.drain_timeout, limits.swap_on_request) == (7, 9.0, True)
    assert load(tmp_path).part(Limits, max_loaded=Limits.max_loaded) == Limits()
