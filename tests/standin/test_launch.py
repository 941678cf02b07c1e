"""`mlxproxy launch`: agents get the server and the model, and nothing of theirs is touched."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mlxproxy.cli import main
from mlxproxy.commands.launch import AGENTS, Target
from tests.support import scripted_server
from tests.support.ports import free_port
from tests.support.proxy import Proxy
from tests.support.pty import COMMAND, environment, run

KEY = "a secret"
# What says to which server and model an agent talks.
OF_AGENTS = ("ANTHROPIC_", "OPENAI_", "CLAUDE_CODE_", "OPENCODE_", "API_TIMEOUT", "MLXPROXY_API")


@pytest.fixture(scope="module")
def proxy(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("launch")
    program = scripted_server.install(folder / "standin")
    proxy = Proxy(folder / "instance", models, MLX_SERVER_BIN=program, API_KEY=KEY)
    try:
        yield proxy.start()
    finally:
        proxy.clean_up()


@pytest.fixture
def env(proxy: Proxy, tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has all agents: each only says how it was started."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name in AGENTS:
        agent = bin_ / name
        agent.write_text(
            f"#!{sys.executable} -IS\nimport json, os, sys\n"
            "print(json.dumps([os.getpid(), sys.argv[1:], dict(os.environ)]))\n"
        )
        agent.chmod(0o755)
    return environment(
        tmp_path, proxy.url, MLXPROXY_API_KEY=KEY, PATH=f"{bin_}:/usr/bin:/bin", OWN="the user's"
    )


def told(output: str) -> tuple[int, list[str], dict[str, str]]:
    pid, arguments, variables = json.loads(output)
    return pid, arguments, variables


def settings_of(variables: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name.startswith(OF_AGENTS)}


@pytest.mark.parametrize("agent", AGENTS)
def test_an_agent_gets_this_server_and_the_loaded_model(
    agent: str, proxy: Proxy, env: dict[str, str]
) -> None:
    done = run("launch", agent, "-m", "alpha", "--", "-x", "two words", env=env)
    _, arguments, variables = told(done.stdout)
    assert arguments[-2:] == ["-x", "two words"]
    said = " ".join([*arguments, *settings_of(variables).values()])
    assert proxy.url in said
    assert "tiny/alpha" in said
    assert KEY in settings_of(variables).values() or KEY in variables["OPENCODE_CONFIG_CONTENT"]
    assert KEY not in " ".join(arguments), "other users of the machine can read arguments"
    assert variables["OWN"] == "the user's"
    headers = {"Authorization": f"Bearer {KEY}"}
    assert proxy.get("/v1/models/loaded", headers=headers).json()["id"] == "tiny/alpha"


@pytest.mark.parametrize("agent", AGENTS)
def test_the_printed_lines_do_the_same_in_a_shell(agent: str, env: dict[str, str]) -> None:
    arguments = ["launch", agent, "-m", "tiny/beta", "--", "it's", "$HOME"]
    _, started_with, variables = told(run(*arguments, env=env).stdout)
    lines = run(*arguments[:2], "--print", *arguments[2:], env=env).stdout
    shell = subprocess.run(["sh"], input=lines, env=env, capture_output=True, text=True, timeout=30)
    _, printed_with, others = told(shell.stdout)
    assert printed_with == started_with
    assert settings_of(others) == settings_of(variables)


def test_the_agent_takes_the_place_of_the_command(env: dict[str, str]) -> None:
    command = [str(COMMAND), "launch", "claude", "-m", "alpha"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        output, _ = process.communicate(timeout=60)
    assert told(output)[0] == process.pid


def test_the_agents_offered_are_those_there_are() -> None:
    offered = next(param for param in main.commands["launch"].params if param.name == "agent")
    assert isinstance(offered.type, click.Choice)
    assert list(offered.type.choices) == list(AGENTS)


def test_without_a_name_the_agent_gets_what_is_loaded(env: dict[str, str]) -> None:
    run("load", "beta", env=env)
    _, _, variables = told(run("launch", "claude", env=env).stdout)
    roles = {value for name, value in variables.items() if name.endswith("_MODEL")}
    assert roles == {"tiny/beta"}
    assert variables["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "32768"


def test_printing_loads_nothing(proxy: Proxy, env: dict[str, str]) -> None:
    run("unload", env=env)
    assert run("launch", "aider", "--print", "-m", "alpha", env=env).returncode == 0
    headers = {"Authorization": f"Bearer {KEY}"}
    assert not proxy.get("/v1/models/loaded", headers=headers).json()["loaded"]


def test_with_a_choice_of_models_none_is_guessed(env: dict[str, str]) -> None:
    run("unload", env=env)
    done = run("launch", "claude", env=env)
    assert done.returncode == 1
    assert "Choose one with --model" in done.stderr


@pytest.mark.parametrize("agent", AGENTS)
def test_an_agent_that_is_not_there_is_named_with_its_installation(
    agent: str, env: dict[str, str]
) -> None:
    done = run("launch", agent, env={**env, "PATH": "/usr/bin:/bin"})
    assert done.returncode == 1
    assert AGENTS[agent].install in done.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"MLXPROXY_URL": "127.0.0.1:PORT"}, "mlxproxy is not running"),
        ({"MLXPROXY_API_KEY": "wrong"}, "--key"),
    ],
)
def test_no_agent_starts_without_its_server(
    change: dict[str, str], sentence: str, env: dict[str, str]
) -> None:
    change = {name: value.replace("PORT", str(free_port())) for name, value in change.items()}
    done = run("launch", "claude", "-m", "alpha", env={**env, **change})
    assert (done.returncode, done.stdout) == (1, "")
    assert sentence in done.stderr.replace("\n", " ")


def test_no_agent_starts_with_a_model_that_is_not_there(env: dict[str, str]) -> None:
    done = run("launch", "codex", "-m", "gamma", env=env)
    assert (done.returncode, done.stdout) == (1, "")
    assert "gamma" in done.stderr


@pytest.mark.parametrize(("agent", "variable"), [("claude", "ANTHROPIC"), ("aider", "OPENAI")])
def test_a_server_without_a_key_is_not_sent_the_users_own(agent: str, variable: str) -> None:
    start = AGENTS[agent].start(Target("http://localhost:8080", None, "tiny/alpha"))
    assert start.environment[f"{variable}_API_KEY"] in ("", "none")
