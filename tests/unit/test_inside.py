"""What runs inside the backend's process, each feature by itself; and that it is started so."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxproxy.engines.mlx_lm import engine
from mlxproxy.engines.mlx_lm.inside import (
    detokenizer,
    logprobs,
    pace,
    progress,
    prompt_cache,
    prompts,
    quiet,
    run,
    sampling,
    stop,
    tool_calls,
)
from mlxproxy.engines.mlx_lm.inside.gate import (
    Unexpected,
    require,
    require_attributes,
    require_uses,
)
from mlxproxy.engines.mlx_lm.inside.report import Pulse, Reporter
from mlxproxy.engines.mlx_lm.link import Link
from mlxproxy.engines.mlx_lm.program import INSIDE, program_command
from tests.support.server_process import SERVER_BIN
from tests.support.waiting import until

PIP = "import sys\nfrom mlx_lm.server import main\nsys.exit(main())\n"

SHELL = "#!/bin/sh\n'''exec' %s \"$0\" \"$@\"\n' '''\n"


@pytest.mark.parametrize(
    ("head", "python"),
    [
        ("#!/venv/bin/python3\n", "/venv/bin/python3"),
        ("#!/my models/bin/python3.12\n", "/my models/bin/python3.12"),
        (SHELL % '"/my models/bin/python3.12"', "/my models/bin/python3.12"),
        (SHELL % "/very/long/bin/python", "/very/long/bin/python"),
        (SHELL % "'/my models/bin/python3.13t'", "/my models/bin/python3.13t"),
        ("#! /venv/bin/pypy3\n", "/venv/bin/pypy3"),
    ],
)
def test_the_script_of_pip_is_run_by_its_own_python(tmp_path: Path, head: str, python: str) -> None:
    program = tmp_path / "mlx_lm.server"
    program.write_text(head + PIP)
    assert program_command(program) == [python, str(INSIDE), str(program)]


@pytest.mark.parametrize(
    "script",
    [
        "#!/bin/sh\nexec mlx_lm.server --log-level DEBUG $@\n",
        "#!/usr/bin/env python3\n" + PIP,
        "#!/venv/bin/python3 -E\n" + PIP,
        "#!/venv/bin/python3\nprint('something else')\n",
        "\x7fELF",
    ],
)
def test_any_other_program_is_run_as_it_is(tmp_path: Path, script: str) -> None:
    program = tmp_path / "mlx_lm.server"
    program.write_text(script)
    assert program_command(program) == [str(program)]


def test_a_program_that_cannot_be_read_is_run_as_it_is(tmp_path: Path) -> None:
    assert program_command(tmp_path / "missing") == [str(tmp_path / "missing")]


class Module(SimpleNamespace):
    """Stands for a module of mlx-lm, as far as a feature touches it."""

    __name__ = "mlx_lm.somewhere"


# -- the gate


def test_a_feature_whose_names_have_changed_stays_off() -> None:
    def renamed(this: object, prompt: str) -> None: ...

    with pytest.raises(Unexpected, match="has no stream"):
        require(Module(), {"stream": ()})
    with pytest.raises(Unexpected, match=r"takes \(this, prompt\)"):
        require(Module(call=renamed), {"call": ("self", "tokens")})
    with pytest.raises(Unexpected, match="is not a function"):
        require(Module(call=5), {"call": ("self",)})
    require(Module(call=renamed), {"call": ("this",)})


def test_attributes_that_a_constructor_no_longer_sets_are_missed() -> None:
    class Batch:
        def __init__(self) -> None:
            self.waiting: list[int] = []

    require_attributes(Module(Batch=Batch), "Batch", ("waiting",))
    with pytest.raises(Unexpected, match="Batch has no queue"):
        require_attributes(Module(Batch=Batch), "Batch", ("waiting", "queue"))


def test_a_function_that_goes_another_way_is_missed() -> None:
    class Handler:
        def answer(self, machine: Any) -> None:
            machine.split()

    require_uses(Module(Handler=Handler), "Handler.answer", ("split",))
    with pytest.raises(Unexpected, match=r"Handler\.answer does not use flush"):
        require_uses(Module(Handler=Handler), "Handler.answer", ("split", "flush"))
    with pytest.raises(Unexpected, match=r"has no Handler\.reply"):
        require_uses(Module(Handler=Handler), "Handler.reply", ())


def test_the_options_have_one_name_on_both_sides() -> None:
    assert engine.INSIDE_OPTIONS == run.OPTIONS


@pytest.mark.parametrize(
    "feature", [prompt_cache, detokenizer, prompts, sampling, pace, stop, logprobs]
)
def test_an_mlx_lm_of_another_layout_is_left_as_it_is(feature: ModuleType) -> None:
    other = Module()
    arguments: dict[ModuleType, tuple[Any, ...]] = {
        prompts: (other, None),
        sampling: (other, other, None),
        pace: (other, other),
        logprobs: (other, other),
    }
    with pytest.raises(Unexpected):
        feature.arm(*arguments.get(feature, (other,)))
    assert vars(other) == {}


# -- prompts


@pytest.mark.parametrize(
    ("tokens", "refused"),
    [(0, "no tokens"), (8, None), (9, "9 tokens, and the model's context is 8")],
)
def test_a_prompt_that_the_model_cannot_take_is_one_requests_error(
    tokens: int, refused: str | None
) -> None:
    class ResponseGenerator:
        def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> tuple[list[int]]:
            return ([1] * tokens,)

        def generate(self, request: Any, generation_args: Any) -> None: ...

    prompts.arm(Module(ResponseGenerator=ResponseGenerator), context=8)
    if refused is None:
        assert ResponseGenerator()._tokenize(None, None, None) == ([1] * tokens,)
        return
    with pytest.raises(ValueError, match=refused):
        ResponseGenerator()._tokenize(None, None, None)


@pytest.mark.parametrize("whole", [34, 0])
def test_what_is_cached_of_a_prompt_counts_as_read(whole: int) -> None:
    class GenerationContext:
        def __init__(self, prompt: list[int]) -> None:
            self.prompt = prompt

    class ResponseGenerator:
        def generate(
            self, request: Any, generation_args: Any, progress_callback: Any = None
        ) -> tuple[GenerationContext, Iterator[str]]:
            def answer() -> Iterator[str]:
                for processed in (1, 3):  # of the three that are not cached
                    progress_callback(processed, 3)
                yield "text"

            return GenerationContext([1] * (whole or 3)), answer()

    progress.arm(Module(ResponseGenerator=ResponseGenerator, GenerationContext=GenerationContext))
    told: list[tuple[int, int]] = []
    generator = ResponseGenerator()
    _, answer = generator.generate(None, None, progress_callback=lambda *now: told.append(now))
    assert list(answer) == ["text"]
    assert told == ([(32, 34), (34, 34)] if whole else [(1, 3), (3, 3)])
    assert list(generator.generate(None, None)[1]) == ["text"]


class Tokenizer:
    """One of a token for each character, as the tokenizers package has it."""

    def __init__(self) -> None:
        self.backend_tokenizer = self
        self._tokenizer = self
        self.read: list[int] = []

    def to_str(self) -> str:
        return ""

    def from_str(self, text: str) -> Tokenizer:
        return self

    def no_truncation(self) -> None: ...

    def no_padding(self) -> None: ...

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[Any]:
        self.read.append(len(texts[0]))
        return [SimpleNamespace(ids=[1] * len(texts[0]))]


def test_a_text_far_too_long_is_counted_no_further_than_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = Tokenizer()
    monkeypatch.setattr(Tokenizer, "from_str", staticmethod(lambda text: tokenizer))
    counter = prompts.Counter()
    assert not counter.beyond(tokenizer, ["x" * 200_000], context=100_000), "may be short tokens"
    assert tokenizer.read == []
    tokens = counter.beyond(tokenizer, ["x" * 4_000_000], context=100_000)
    assert sum(tokenizer.read) < 3 * prompts.PIECE_CHARACTERS
    assert tokens == pytest.approx(4_000_000, rel=0.01), "the rest is estimated"
    assert not counter.beyond(None, ["x" * 4_000_000], context=100_000), "cannot be told"


def test_all_texts_of_a_request_are_counted() -> None:
    parts = [{"type": "text", "text": "b"}, {"type": "image_url"}]
    messages = [{"content": "a"}, {"content": parts}, {"content": None}, {}]
    assert list(prompts.texts_of(SimpleNamespace(prompt=None, messages=messages))) == ["a", "b"]
    assert list(prompts.texts_of(SimpleNamespace(prompt="p", messages=None))) == ["p"]


# -- tool calls


def calls_of(parsed: Any, *, client_left: bool = False) -> list[Any]:
    """What becomes of a model's call that a parser reads as this."""

    class ToolCallFormatter:
        def __init__(self, tool_parser: Any, tools: Any, streaming: bool = False) -> None:
            self.parser = tool_parser

        def __call__(self, tool_calls: list[str]) -> list[Any]:
            call = self.parser(tool_calls[0], None)
            return [{"name": call["name"], "arguments": call["arguments"]}]

    def parser(text: str, tools: Any) -> Any:
        if isinstance(parsed, Exception):
            raise parsed
        return parsed

    def check_client() -> None:
        if client_left:
            raise ConnectionError

    tool_calls.arm(Module(ToolCallFormatter=ToolCallFormatter), check_client)
    return ToolCallFormatter(parser, None)(["one call"])


@pytest.mark.parametrize(
    "parsed",
    ["hello", 55, [1, 2], None, {}, {"name": 5}, KeyError("x"), RecursionError(), OverflowError()],
)
def test_a_call_that_cannot_be_read_costs_that_call_alone(parsed: Any) -> None:
    assert calls_of(parsed) == []


def test_a_call_without_arguments_has_none() -> None:
    assert calls_of({"name": "f"}) == [{"name": "f", "arguments": {}}]
    assert calls_of({"name": "f", "parameters": {"a": 1}}) == [{"name": "f", "arguments": {"a": 1}}]


def test_no_call_is_read_for_a_client_that_has_left() -> None:
    with pytest.raises(ConnectionError):
        calls_of({"name": "f"}, client_left=True)


# -- stop words

LETTERS = st.text("ab ", max_size=12)
STOPS = st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=4)


def in_pieces(words: list[str], pieces: list[str]) -> tuple[str, bool]:
    """What is left of a text that comes in these pieces, and whether a word was found."""
    search, certain = stop.StopWords(words), ""
    for piece in pieces:
        text, behind = search.take(piece)
        certain += text
        if behind is not None:
            return certain, True
    return certain + search.release(), False


@given(words=STOPS, pieces=st.lists(LETTERS, max_size=6))
def test_a_text_ends_alike_however_it_is_cut(words: list[str], pieces: list[str]) -> None:
    whole = "".join(pieces)
    text, found = in_pieces(words, pieces)
    assert (text, found) == in_pieces(words, list(whole)) == in_pieces(words, [whole])
    assert found is any(word in whole for word in words)
    assert not any(word in text for word in words)
    assert whole.startswith(text)
    assert found or text == whole


@given(words=STOPS, pieces=st.lists(LETTERS, max_size=6))
def test_only_what_may_be_a_stop_word_is_held(words: list[str], pieces: list[str]) -> None:
    search, so_far, certain = stop.StopWords(words), "", ""
    for piece in pieces:
        text, behind = search.take(piece)
        if behind is not None:
            break
        so_far, certain = so_far + piece, certain + text
        held = so_far[len(certain) :]
        assert not held or any(word.startswith(held) for word in words)
        longer = (so_far[start:] for start in range(len(certain)))
        assert not any(word.startswith(rest) for rest in longer for word in words)


def test_the_generation_ends_at_the_token_after_a_stop_word() -> None:
    """So its prompt cache is kept, as it is not for a client that has left."""

    class Sequences:
        def matcher(self) -> Sequences:
            return self

        def advance(self, token: int) -> bool:
            return token == 0

    class Machine:
        def make_state(self, initial: str) -> str:
            return initial

        def split(self, state: str, text: str) -> Any:
            return state, [(state, text)]

        def flush(self, state: str) -> Any:
            return state, "", state

    answer = stop.Answer(["b"], Machine(), Sequences(), drops=False).make_state("normal")
    matcher = answer.matcher()
    given = [SimpleNamespace(text=text, finish_reason=None) for text in ("a", "xby", "c")]
    sent = []
    for response in answer.responses(iter(given)):
        assert not matcher.advance(7)
        sent += answer.split(response.text)[1]
    assert sent == [("normal", "a"), ("normal", "x")]
    assert matcher.advance(7)
    assert answer.surplus == len("by")
    assert stop.Answer(["b"], Machine(), Sequences(), drops=False).matcher().advance(0)


# -- log probabilities


def kept_of(*tokens: tuple[int, float, list[tuple[int, float]], str], surplus: int = 0) -> Any:
    """The log probabilities of these tokens, whose bytes are their ids."""
    kept = logprobs.Kept(lambda token: bytes([token]), lambda: surplus)
    responses = [
        SimpleNamespace(
            token=token,
            logprob=logprob,
            top_tokens=tuple({"id": id, "logprob": number} for id, number in tops),
            text=text,
            finish_reason=None,
        )
        for token, logprob, tops, text in tokens
    ]
    assert list(kept.each(iter(responses))) == responses
    return kept


def test_the_token_that_was_chosen_is_told_and_not_the_likeliest() -> None:
    entry = kept_of((66, -2.0, [(65, -3.0), (67, -0.1)], "B")).take(texts=False)["content"][0]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("B", -2.0, [66])
    assert [top["token"] for top in entry["top_logprobs"]] == ["C", "A"]


def test_numbers_that_json_has_not_are_not_sent() -> None:
    tops = [(65, float("-inf")), (67, float("nan"))]
    (entry,) = kept_of((66, float("-inf"), tops, "B")).take(texts=False)["content"]
    numbers = [entry["logprob"], *(top["logprob"] for top in entry["top_logprobs"])]
    assert numbers == [logprobs.LEAST] * 3


def test_the_tokens_of_a_stop_word_are_not_told() -> None:
    tokens: list[Any] = [
        (65, 0.0, [], "A"),
        (66, 0.0, [], "B"),
        (0xF0, 0.0, [], ""),
        (67, 0.0, [], "C"),
    ]

    def told(surplus: int) -> list[str]:
        found = kept_of(*tokens, surplus=surplus).take(texts=True)
        return found["tokens"] if found else []

    assert told(0) == ["A", "B", "\ufffd", "C"]
    assert told(1) == ["A", "B", "\ufffd"]
    assert told(2) == ["A"]
    assert told(3) == []


@pytest.mark.backend
@pytest.mark.parametrize(
    ("kind", "names", "texts"),
    [
        (
            "BPEStreamingDetokenizer",
            ["\u0120a", "\u00f0", "<\uff5cx\uff5c>", None],
            [b" a", b"\xf0", "<\uff5cx\uff5c>".encode(), b"", b""],
        ),
        (
            "SPMStreamingDetokenizer",
            ["\u2581a".encode(), b"\xf0", None],
            [b" a", b"\xf0", b"", b""],
        ),
    ],
)
def test_the_bytes_of_a_token_are_those_that_it_adds(
    kind: str, names: list[Any], texts: list[bytes]
) -> None:
    utils = pytest.importorskip("mlx_lm.tokenizer_utils")
    made = getattr(utils, kind).__new__(getattr(utils, kind))
    made.tokenmap = names
    to_bytes = logprobs.bytes_of(SimpleNamespace(detokenizer=made), utils)
    assert [to_bytes(number) for number in range(len(texts))] == texts


@pytest.mark.backend
def test_where_no_text_of_a_tokens_own_is_known_its_bytes_are_not() -> None:
    utils = pytest.importorskip("mlx_lm.tokenizer_utils")
    tokenizer = SimpleNamespace(
        detokenizer=object(),
        convert_ids_to_tokens=["<0xF0>", "half", "whole"].__getitem__,
        decode=lambda ids: {1: "\ufffd", 2: "wh\u00f6le"}[ids[0]],
    )
    to_bytes = logprobs.bytes_of(tokenizer, utils)
    assert [to_bytes(number) for number in range(3)] == [b"\xf0", None, "wh\u00f6le".encode()]


# -- the pace of reading prompts


def test_a_slow_machine_reads_in_small_pieces_and_a_fast_one_in_large_ones() -> None:
    for rate, piece in ((20, 20), (300, 300), (50_000, 2048), (1, pace.LEAST)):
        measured = pace.Pace()
        for _ in range(12):
            count = measured.piece(2048, 1)
            measured.read(count, count / rate)
        assert measured.piece(2048, 1) == pytest.approx(piece, rel=0.05)


def test_prompts_that_are_read_together_share_the_second() -> None:
    measured = pace.Pace()
    for _ in range(4):
        measured.read(800, 1.0)
    assert measured.piece(2048, 8) == 100


def test_one_lucky_measurement_does_not_lead_to_a_long_piece() -> None:
    measured = pace.Pace()
    measured.read(10, 0.0001)
    assert measured.piece(2048, 1) <= pace.FIRST_PIECE * pace.GROWTH


# -- what may be written


@contextlib.contextmanager
def armed_quiet() -> Iterator[None]:
    """What is written while the feature is armed and clients are served."""
    kept = logging.getLogRecordFactory(), socketserver.BaseServer.handle_error
    hook = threading.excepthook
    quiet.arm(lambda: True)
    try:
        yield
    finally:
        logging.setLogRecordFactory(kept[0])
        socketserver.BaseServer.handle_error = kept[1]  # type: ignore[method-assign]
        threading.excepthook = hook


def withheld(message: str, error: BaseException | None = None) -> str:
    """What the log shows of a message of the server's."""
    information = (type(error), error, error.__traceback__) if error else None
    with armed_quiet():
        record = logging.getLogRecordFactory()(
            "root", logging.WARNING, "/x/mlx_lm/server.py", 7, message, None, information
        )
        return logging.Formatter().format(record)


@pytest.mark.parametrize(
    "message",
    [
        "Failed to parse tool call (ValueError: could not convert 'SECRET') — truncated.",
        "JSONDecodeError: Expecting value - Raw body: SECRET",
        'Invalid Request Body: [\n\t"SECRET"]',
        "Prompt processing progress: 1/2 SECRET",
        "SECRET",
    ],
)
def test_what_anybody_said_is_not_in_the_backends_log(message: str) -> None:
    assert "SECRET" not in withheld(message)


def test_the_end_of_a_thread_leaves_no_words_either(capsys: pytest.CaptureFixture[str]) -> None:
    """In mlx-lm 0.31 the generation thread ends with a traceback."""
    said = "SEC" + "RET"
    with armed_quiet():
        thread = threading.Thread(target=int, args=(said,), name="Thread-1 (_generate)")
        thread.start()
        thread.join()
    shown = capsys.readouterr().err
    assert shown.startswith("Exception in thread Thread-1 (_generate): ValueError")
    assert said not in shown


def test_figures_are_in_the_backends_log() -> None:
    for message in (
        "Prompt processing progress: 2048/6017",
        "Prompt Cache: 4 sequences, 0.01 GB",
        "Starting httpd at 127.0.0.1 on port 18080...",
    ):
        assert withheld(message) == message


def test_an_error_leaves_its_kind_and_its_places_but_not_its_words() -> None:
    said = "SEC" + "RET"  # not in this file's text, which a traceback shows
    with pytest.raises(ValueError, match=said) as caught:
        int(said)
    error, line = caught.value, caught.tb.tb_lineno
    shown = withheld(f"mlx_lm.server generation thread died: {error}", error)
    assert shown.startswith("mlx_lm.server generation thread died: ValueError\n")
    assert "test_inside.py" in shown
    assert said not in shown
    assert quiet.reason(error, serving=True) == f"ValueError at test_inside.py:{line}"
    assert said in quiet.reason(error, serving=False)
    memory = RuntimeError("[metal::malloc] Attempting to allocate 9 bytes")
    assert quiet.reason(memory, serving=True) == str(memory)


# -- the channel


def test_a_death_comes_over_the_channel() -> None:
    told: queue.Queue[str] = queue.Queue()
    link = Link(told.put)
    reporter = Reporter(os.dup(link.theirs.fileno()))
    link.open()
    reporter.send(features=["departures", "heartbeat"], off={}, device="cpu")
    reporter.send(nonsense=True)
    reporter.send(beat="nonsense")
    reporter.send(beat=Pulse().beat(queued=0))
    reporter.send(died="out of memory")
    assert told.get(timeout=5) == "out of memory"
    assert link.has("departures")
    assert not link.has("seeds")
    assert link.hang(time.monotonic(), 300, 600) is None
    assert not reporter.serving()
    link.let_clients_in()
    until(reporter.serving, what="the word that clients are let in")
    reporter.close()


def test_a_feature_that_does_not_suit_the_model_is_taken_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told: queue.Queue[str] = queue.Queue()
    link = Link(told.put)
    reporter = Reporter(os.dup(link.theirs.fileno()))
    link.open()
    reporter.send(features=["departures", "prompt_cache_disk"], off={}, device="cpu")
    reporter.send(off={"prompt_cache_disk": "its architecture has a cache of its own (Odd)"})
    reporter.send(died="to be sure that all was read")
    told.get(timeout=5)
    assert link.features == {"departures"}
    assert "prompt_cache_disk is off for this model: its architecture" in caplog.text
    reporter.close()


def test_nobody_waits_for_a_proxy_that_does_not_listen() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        reporter = Reporter(theirs.detach())
        for _ in range(10_000):
            reporter.send(died="x" * 1000)
        reporter.close()
    Reporter(None).send(died="nobody is there")


def test_the_backends_script_of_this_machine_is_of_that_kind() -> None:
    assert program_command(SERVER_BIN)[1:] == [str(INSIDE), str(SERVER_BIN)]
