"""`mlxproxy chat` with a real model, at a terminal and in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import tiny_models
from tests.support.proxy import Proxy
from tests.support.pty import Terminal, environment, run
from tests.support.waiting import until


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy with a model that ends its answers after five words, and one that is slow."""
    folder = tmp_path_factory.mktemp("chat")
    tiny_models.build(folder / "models" / "tiny" / "brief", says="word", length=5)
    tiny_models.build_slow(folder / "models" / "tiny" / "slow")
    proxy = Proxy(folder / "instance", folder / "models")
    try:
        yield proxy.start()
    finally:
        proxy.clean_up()


ANSWER = "word0 word1 word2 word3 word4"


def test_a_chat_loads_the_model_and_streams_its_answer(
    env: dict[str, str], talk: Callable[..., Terminal]
) -> None:
    screen = talk("brief", env=env)
    screen.expect("tiny/brief")
    screen.expect("> ")
    screen.type("Hello!\n")
    screen.expect(ANSWER)
    screen.expect("> ")
    screen.type("/quit\n")
    assert screen.wait() == 0


def test_thinking_can_be_switched_in_a_chat_and_is_shown_dimmed_and_apart(
    env: dict[str, str], talk: Callable[..., Terminal]
) -> None:
    screen = talk("brief", env=env)
    screen.expect("> ")
    screen.type("/think\n")
    screen.expect("Thinking is on.")
    screen.expect("> ")
    screen.type("Hello!\n")
    screen.expect("Hello!")
    screen.expect("thought7")
    raw_reasoning = screen.expect(ANSWER)
    assert raw_reasoning.endswith("\n\n")
    screen.expect("> ")
    screen.type("/no_think\nAnd now?\n")
    screen.expect("And now?")
    assert "thought" not in screen.expect(ANSWER)
    screen.expect("> ")
    screen.type("\x04")  # Ctrl-D
    assert screen.wait() == 0


def test_ctrl_c_stops_the_answer_and_a_second_ctrl_c_ends_the_chat(
    proxy: Proxy, env: dict[str, str], talk: Callable[..., Terminal]
) -> None:
    screen = talk("slow", env=env)
    screen.expect("> ")
    screen.type("Hello!\n")
    screen.expect("w2 ")
    screen.interrupt()
    screen.expect("(stopped)")
    screen.expect("> ")
    until(lambda: proxy.loaded()["in_flight"] == 0, what="the end of the generation")
    screen.interrupt()
    assert screen.wait() == 0
    assert "Traceback" not in screen.text


def test_a_question_in_a_pipe_gets_the_answer_alone(env: dict[str, str]) -> None:
    assert run("load", "brief", env=env).returncode == 0
    done = run("chat", "-p", "review this", "--thinking", env=env, stdin="some text")
    assert done.returncode == 0
    assert done.stdout.strip() == ANSWER
    assert done.stderr == ""


def test_a_chat_does_not_reload_a_loaded_model(proxy: Proxy, env: dict[str, str]) -> None:
    proxy.load("tiny/brief", enable_thinking=True)
    before = proxy.loaded()["pid"]
    assert run("chat", "BRIEF", "-p", "Hello!", env=env).returncode == 0
    assert proxy.loaded()["pid"] == before


def test_a_chat_command_with_no_model_loaded_says_what_to_do(
    proxy: Proxy, env: dict[str, str]
) -> None:
    proxy.unload()
    done = run("chat", "-p", "Hello!", env=env)
    assert done.returncode == 1
    assert "`mlxproxy load tiny/brief`" in done.stderr


def test_a_newcomers_first_chat(
    start: Callable[..., Proxy], tmp_path: Path, talk: Callable[..., Terminal]
) -> None:
    tiny_models.build(tmp_path / "models" / "tiny" / "only", says="word", length=5)
    proxy = start(tmp_path / "models")
    screen = talk(env=environment(tmp_path, proxy.url))
    screen.expect("Loading tiny/only")
    screen.expect("Loaded tiny/only in ")
    screen.expect("> ")
    screen.type("Hello!\n")
    screen.expect(ANSWER)
    screen.expect(" tokens/s")
    screen.expect("> ")
    screen.type("/unload\n")
    screen.expect("Unloaded tiny/only.")
    screen.expect("> ")
    screen.type("/load only\n")
    screen.expect("Loaded tiny/only in ")
    screen.expect("> ")
    screen.type("/quit\n")
    assert screen.wait() == 0
