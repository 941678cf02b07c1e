"""`mlxproxy chat` at a terminal and in a pipe."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Proxy, until
from tests.support import tiny_models
from tests.support.pty import COMMAND, Terminal, environment, run, scripted

pytestmark = pytest.mark.standin

DONE = "data: [DONE]\n\n"
NOTHING_LOADED = {"loaded": False, "transition": None}


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


@pytest.fixture
def talk(terminal: Callable[..., Terminal]) -> Callable[..., Terminal]:
    """Starts chats at a terminal."""
    return partial(terminal, "chat")


def delta(**fields: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


class Script:
    """A scripted server that answers one question after the other, and what it was asked."""

    def __init__(self, *answers: list[Any]) -> None:
        self.asked: list[dict[str, Any]] = []
        self._answers = list(answers)

    def __call__(self, path: str, body: dict[str, Any]) -> Any:
        if path != "/v1/chat/completions":
            return NOTHING_LOADED
        self.asked.append(body)
        return self._answers.pop(0)


# -- with the real backend

ANSWER = "word0 word1 word2 word3 word4"


@pytest.mark.backend
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


@pytest.mark.backend
def test_thinking_is_switched_in_the_middle_and_shown_dimmed_and_apart(
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


@pytest.mark.backend
def test_ctrl_c_stops_the_answer_and_a_second_one_leaves(
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


@pytest.mark.backend
def test_a_question_in_a_pipe_gets_the_answer_alone(env: dict[str, str]) -> None:
    assert run("load", "brief", env=env).returncode == 0
    done = run("chat", "-p", "review this", "--thinking", env=env, stdin="some text")
    assert done.returncode == 0
    assert done.stdout.strip() == ANSWER
    assert done.stderr == ""


@pytest.mark.backend
def test_a_loaded_model_is_not_loaded_anew_for_a_chat(proxy: Proxy, env: dict[str, str]) -> None:
    proxy.load("tiny/brief", enable_thinking=True)
    before = proxy.loaded()["pid"]
    assert run("chat", "BRIEF", "-p", "Hello!", env=env).returncode == 0
    assert proxy.loaded()["pid"] == before


@pytest.mark.backend
def test_with_nothing_loaded_it_says_what_to_do(proxy: Proxy, env: dict[str, str]) -> None:
    proxy.unload()
    done = run("chat", "-p", "Hello!", env=env)
    assert done.returncode == 1
    assert "`mlxproxy load`" in done.stderr


def test_an_unknown_model_ends_it(env: dict[str, str]) -> None:
    done = run("chat", "nobody/knows", "-p", "Hello!", env=env)
    assert done.returncode == 1
    assert "nobody/knows" in done.stderr


# -- with a scripted server


def test_the_conversation_is_kept_until_it_is_cleared(
    tmp_path: Path, talk: Callable[..., Terminal]
) -> None:
    script = Script(*([delta(content=f"answer {n}"), DONE] for n in range(3)))
    with scripted(script) as url:
        screen = talk("--no-thinking", env=environment(tmp_path, url))
        for number in range(2):
            screen.expect("> ")
            screen.type(f"question {number}\n")
            screen.expect(f"answer {number}")
        screen.expect("> ")
        screen.type("/clear\n")
        screen.expect("> ")
        screen.type("question 2\n")
        screen.expect("answer 2")
    told = [[it["content"] for it in body["messages"]] for body in script.asked]
    assert told == [
        ["question 0"],
        ["question 0", "answer 0", "question 1"],
        ["question 2"],
    ]
    assert all(body["enable_thinking"] is False for body in script.asked)


def test_a_prompt_and_a_pipe_are_one_question(tmp_path: Path) -> None:
    script = Script([delta(content="fine"), DONE], [delta(content="fine"), DONE])
    with scripted(script) as url:
        env = environment(tmp_path, url)
        assert run("chat", "-p", "review this", env=env, stdin="+ line\n").stdout == "fine\n"
        assert run("chat", env=env, stdin="just this\n").stdout == "fine\n"
    questions = [body["messages"][0]["content"] for body in script.asked]
    assert questions == ["review this\n\n+ line", "just this"]


def test_a_pipe_may_hold_any_bytes(tmp_path: Path) -> None:
    script = Script([delta(content="fine"), DONE])
    with scripted(script) as url:
        done = subprocess.run(
            [str(COMMAND), "chat"],
            env=environment(tmp_path, url),
            input=b"latin \xe9",
            capture_output=True,
            timeout=30,
        )
    assert done.returncode == 0
    assert script.asked[0]["messages"][0]["content"] == "latin \ufffd"


def test_nothing_to_answer_is_wrong_usage(tmp_path: Path) -> None:
    done = run("chat", env=environment(tmp_path, "localhost:1"), stdin="")
    assert done.returncode == 2
    assert "empty" in done.stderr


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_dim_at_a_terminal(
    name: str, tmp_path: Path, talk: Callable[..., Terminal]
) -> None:
    reasoning, gap, content = delta(**{name: "let me see"}), delta(content="\n\n"), "yes"
    script = Script([reasoning, gap, delta(content=content), DONE])
    with scripted(script) as url:
        screen = talk("-p", "well?", env=environment(tmp_path, url))
        assert screen.wait() == 0
    assert screen.text.endswith("let me see\n\nyes\n")
    before = screen.raw.partition("let me see")[0]
    assert before.rpartition("\x1b[")[2].startswith("2;")


def test_what_a_terminal_would_obey_is_not_passed_on(
    tmp_path: Path, talk: Callable[..., Terminal]
) -> None:
    script = Script([delta(content="\x1b]0;owned\x07 and \x9b2Jred\r"), DONE])
    with scripted(script) as url:
        screen = talk("-p", "well?", env=environment(tmp_path, url))
        assert screen.wait() == 0
    assert "]0;owned and 2Jred" in screen.raw


def test_what_the_server_waits_for_is_shown(tmp_path: Path, talk: Callable[..., Terminal]) -> None:
    waiting = [": loading tiny/brief 3s\n\n", 0.5, ": keepalive 2048/9000\n\n", 0.5]
    with scripted(Script([*waiting, delta(content="yes"), DONE])) as url:
        screen = talk("-p", "well?", env=environment(tmp_path, url))
        screen.expect("loading tiny/brief 3s")
        screen.expect("reading the prompt: 2048 of 9000 tokens")
        screen.expect("yes")
        assert screen.wait() == 0


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ([{"error": {"message": "The backend has ended.", "code": "x"}}], "The backend has ended."),
        ([], "The answer is incomplete"),
    ],
)
def test_an_answer_that_is_not_whole_is_a_failure(
    rest: list[Any], said: str, tmp_path: Path
) -> None:
    with scripted(Script([delta(content="half"), *rest])) as url:
        done = run("chat", "-p", "well?", env=environment(tmp_path, url))
    assert done.stdout == "half\n"
    assert said in done.stderr
    assert done.returncode == 1


def test_a_failure_at_a_terminal_does_not_end_the_chat(
    tmp_path: Path, talk: Callable[..., Terminal]
) -> None:
    failure = [{"error": {"message": "The queue is full.", "code": "too_many_requests"}}]
    script = Script(failure, [delta(content="yes"), DONE])
    with scripted(script) as url:
        screen = talk(env=environment(tmp_path, url))
        screen.expect("> ")
        screen.type("well?\n")
        screen.expect("The queue is full.")
        screen.expect("> ")
        screen.type("again?\n")
        screen.expect("yes")
    assert [it["content"] for it in script.asked[1]["messages"]] == ["again?"]


def test_many_lines_are_one_question(tmp_path: Path, talk: Callable[..., Terminal]) -> None:
    script = Script([delta(content="yes"), DONE])
    with scripted(script) as url:
        screen = talk(env=environment(tmp_path, url))
        screen.expect("> ")
        screen.type('"""one\ntwo\n\nthree"""\n')
        screen.expect("yes")
    assert script.asked[0]["messages"][0]["content"] == "one\ntwo\n\nthree"


def test_an_unknown_word_with_a_slash_is_not_sent(
    tmp_path: Path, talk: Callable[..., Terminal]
) -> None:
    script = Script([delta(content="yes"), DONE])
    with scripted(script) as url:
        screen = talk(env=environment(tmp_path, url))
        screen.expect("> ")
        screen.type("/thnik\n")
        screen.expect("Unknown command: /thnik.")
        screen.expect("/no_think")
        screen.expect("> ")
        screen.type("/usr/bin is what?\n")
        screen.expect("yes")
    assert len(script.asked) == 1
