"""`mlxproxy chat` at a terminal and in a pipe."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.pty import COMMAND, Terminal, environment, run, scripted

DONE = "data: [DONE]\n\n"

NOTHING_LOADED = {"loaded": False, "transition": None}
LOADED = {"loaded": True, "id": "a/b", "model_id": "/models/a/b"}


def delta(**fields: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def model(id_: str, thinking: bool = False) -> dict[str, Any]:
    abilities = {"tools": False, "vision": False, "thinking": thinking}
    facts = {"size_bytes": 2_000_000_000, "quantization": None, "max_context_length": 4096}
    return {"id": id_, "loadable": True, "loaded": False, "state": "not-loaded", **facts} | {
        "capabilities": abilities
    }


class Script:
    """A scripted server that answers one question after the other, and what it was asked.

    Args:
        models: the ids of those on disk.
        loaded: what is loaded at first.
    """

    def __init__(
        self,
        *answers: list[Any],
        models: Sequence[str] = (),
        loaded: Mapping[str, Any] = LOADED,
    ) -> None:
        self.asked: list[dict[str, Any]] = []
        self.loads: list[dict[str, Any]] = []
        self._answers = list(answers)
        self._models = [model(id_) for id_ in models]
        self._loaded = loaded

    def __call__(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/chat/completions":
            self.asked.append(body)
            return self._answers.pop(0)
        if path == "/v1/models/load":
            return self._load(body)
        if path == "/v1/models/unload":
            return {"status": "unloaded"}
        if path == "/v1/models":
            return {"data": self._models}
        if path == "/v1/models/loaded":
            return self._loaded
        return next(found for found in self._models if path == f"/v1/models/{found['id']}")

    def _load(self, body: dict[str, Any]) -> Any:
        self.loads.append(body)
        found = [known["id"] for known in self._models if known["id"].endswith(body["model_id"])]
        if len(found) != 1:
            return [{"error": {"message": f"No model {body['model_id']!r}.", "code": "x"}}]
        thinking = body.get("enable_thinking", False)
        return [{"status": "loaded", "id": found[0], "enable_thinking": thinking, "changed": True}]


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


# -- which model


def test_with_nothing_loaded_the_only_model_is_loaded(
    tmp_path: Path, talk: Callable[..., Terminal]
) -> None:
    script = Script([delta(content="yes"), DONE], models=["tiny/one"], loaded=NOTHING_LOADED)
    with scripted(script) as url:
        screen = talk(env=environment(tmp_path, url))
        screen.expect("Loaded tiny/one in ")
        screen.expect("tiny/one   /help")
        screen.expect("> ")
        screen.type("well?\n")
        screen.expect("yes")
    assert [body["model_id"] for body in script.loads] == ["tiny/one"]
    assert script.asked[0]["model"] == "tiny/one"


@pytest.mark.parametrize(("answer", "loaded"), [("2", "tiny/two"), ("one", "tiny/one")])
def test_with_nothing_loaded_the_user_chooses_from_a_numbered_list(
    answer: str, loaded: str, tmp_path: Path, talk: Callable[..., Terminal]
) -> None:
    script = Script(models=["tiny/one", "tiny/two"], loaded=NOTHING_LOADED)
    with scripted(script) as url:
        screen = talk("--thinking", env=environment(tmp_path, url))
        screen.expect("1  tiny/one")
        screen.expect("2  tiny/two")
        screen.expect("Load which model?")
        screen.type("three\n")
        screen.expect("No model 'three'.")
        screen.expect("Load which model?")
        screen.type(f"{answer}\n")
        screen.expect(f"Loaded {loaded} in ")
        screen.expect("> ")
    assert script.loads[-1]["enable_thinking"] is True


@pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_the_choice_of_a_model_can_be_left(
    key: str, tmp_path: Path, talk: Callable[..., Terminal]
) -> None:
    script = Script(models=["tiny/one", "tiny/two"], loaded=NOTHING_LOADED)
    with scripted(script) as url:
        screen = talk(env=environment(tmp_path, url))
        screen.expect("Load which model?")
        assert screen.leave(key) == 0
    assert "Traceback" not in screen.text
    assert not script.loads


def test_without_any_model_the_chat_says_what_to_do(
    tmp_path: Path, talk: Callable[..., Terminal]
) -> None:
    with scripted(Script(loaded=NOTHING_LOADED)) as url:
        screen = talk(env=environment(tmp_path, url))
        assert screen.wait() == 1
    assert "No model can be loaded. `mlxproxy ls --all` says why." in screen.text


def test_a_load_in_progress_is_not_followed_by_another(
    tmp_path: Path, talk: Callable[..., Terminal]
) -> None:
    coming = {"loaded": False, "transition": {"id": "tiny/two", "phase": "loading"}}
    script = Script(models=["tiny/one"], loaded=coming)
    with scripted(script) as url:
        screen = talk(env=environment(tmp_path, url))
        screen.expect("tiny/two is being loaded.")
        screen.expect("> ")
    assert not script.loads


# -- the commands in the chat


def test_models_are_listed_loaded_and_unloaded_in_the_chat(
    tmp_path: Path, talk: Callable[..., Terminal]
) -> None:
    refusal = [{"error": {"message": "No model is loaded.", "code": "no_model_loaded"}}]
    script = Script([delta(content="yes"), DONE], refusal, models=["tiny/one", "tiny/two"])
    with scripted(script) as url:
        screen = talk(env=environment(tmp_path, url))
        screen.expect("a/b   /help")
        for typed, said in (
            ("/models", "2  tiny/two"),
            ("/load 2", "Loaded tiny/two in "),
            ("well?", "yes"),
            ("/load", "1  tiny/one"),
            ("/load nobody", "No model 'nobody'."),
            ("/unload", "Unloaded tiny/two."),
            ("well?", "/load NAME loads one"),
        ):
            screen.expect("> ")
            screen.type(typed + "\n")
            screen.expect(said)
    assert [body["model_id"] for body in script.loads] == ["tiny/two", "nobody"]
    assert [body.get("model") for body in script.asked] == ["tiny/two", None]


def test_instructions_are_given_kept_and_removed(
    tmp_path: Path, talk: Callable[..., Terminal]
) -> None:
    script = Script(*([delta(content=f"answer {n}"), DONE] for n in range(4)))
    with scripted(script) as url:
        screen = talk("--system", "Be kind.", env=environment(tmp_path, url))
        for number, command in enumerate(("", "/system Be brief.", "/clear", "/system")):
            screen.expect("> ")
            if command:
                screen.type(command + "\n")
                screen.expect("> ")
            screen.type(f"question {number}\n")
            screen.expect(f"answer {number}")
    firsts = [body["messages"][0] for body in script.asked]
    given = [first["content"] for first in firsts if first["role"] == "system"]
    assert given == ["Be kind.", "Be brief.", "Be brief."]
    assert firsts[3] == {"role": "user", "content": "question 2"}


def test_thinking_that_a_model_cannot_do_is_said(
    tmp_path: Path, talk: Callable[..., Terminal]
) -> None:
    loaded = {**LOADED, "id": "tiny/one"}
    with scripted(Script(models=["tiny/one"], loaded=loaded)) as url:
        screen = talk(env=environment(tmp_path, url))
        screen.expect("> ")
        screen.type("/think\n")
        screen.expect("tiny/one has no thinking mode")
        done = run("load", "one", "--thinking", env=environment(tmp_path, url))
    assert done.stdout.endswith(", but it has no thinking mode.\n")


# -- how an answer looks


def test_the_speed_of_an_answer_is_shown_at_the_end_but_not_in_a_pipe(
    tmp_path: Path, talk: Callable[..., Terminal]
) -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 21}}
    answer = [delta(content="yes"), 0.5, delta(content=" sir"), usage, DONE]
    script = Script(answer, answer)
    with scripted(script) as url:
        screen = talk(env=environment(tmp_path, url))
        screen.expect("> ")
        screen.type("well?\n")
        screen.expect("yes sir\n21 tokens, ")
        speed = float(screen.expect(" tokens/s"))
        assert run("chat", "-p", "x", env=environment(tmp_path, url)).stdout == "yes sir\n"
    assert speed > 0


def test_an_answers_lines_end_between_words(tmp_path: Path, talk: Callable[..., Terminal]) -> None:
    words = [f"extraordinary{number}" for number in range(30)]
    with scripted(Script([delta(content=" ".join(words)), DONE])) as url:
        screen = talk("-p", "well?", env=environment(tmp_path, url))
        assert screen.wait() == 0
    answer = screen.text[screen.text.index(words[0]) :].splitlines()
    assert max(map(len, answer)) < 80
    assert " ".join(answer).split() == words


def test_a_word_that_does_not_fit_moves_to_the_next_line(
    tmp_path: Path, talk: Callable[..., Terminal]
) -> None:
    pieces = [delta(content="x" * 70), delta(content=" extra"), delta(content="ordinary")]
    with scripted(Script([*pieces, DONE])) as url:
        screen = talk("-p", "well?", env=environment(tmp_path, url))
        assert screen.wait() == 0
    assert screen.raw.replace("\r\n", "\n").endswith(" extra\x1b[5D\x1b[0K\nextraordinary\n")
