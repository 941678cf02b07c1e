"""`mlxproxy chat` at a terminal and in a pipe."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.pty import COMMAND, Terminal, environment, run, scripted

DONE = "data: [DONE]\n\n"

NOTHING_LOADED = {"loaded": False, "transition": None}


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


def test_an_unknown_model_ends_it(env: dict[str, str]) -> None:
    done = run("chat", "nobody/knows", "-p", "Hello!", env=env)
    assert done.returncode == 1
    assert "nobody/knows" in done.stderr


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
