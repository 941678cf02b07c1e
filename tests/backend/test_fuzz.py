"""Whatever passes the guard, the real backend survives, and answers in full or with an error.

Requests are made from what the guard accepts, with odd values mixed in, and sent some at a time, so
that they meet in one batch. ``FUZZ_CASES=1000`` (`make fuzz`) tries that many at random; a plain
test run tries a few, always the same.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from mlxproxy.engines.mlx_lm.program import program_command
from mlxproxy.engines.mlx_lm.rules import RULES
from mlxproxy.errors import InvalidRequest
from mlxproxy.guard.check import Kind, check
from mlxproxy.guard.shapes import Limits
from tests.support import tiny_models
from tests.support.ports import free_port
from tests.support.server_process import SERVER_BIN
from tests.support.waiting import until

CASES = int(os.environ.get("FUZZ_CASES", "0"))
MAX_TOKENS = 12  # long answers would add nothing but time
TOGETHER = 3  # requests of one case at most, sent at once
PATHS: dict[Kind, str] = {"chat": "/v1/chat/completions", "text": "/v1/completions"}
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


class Backend:
    """An `mlx_lm.server` of our own, with nothing in front of it."""

    def __init__(self, model: Path, log: Path) -> None:
        self.model, self.log = model, log
        self.port = free_port()
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        self.limits = Limits(
            template_kwargs=frozenset({"enable_thinking", "reasoning_effort", "thinking_budget"}),
            max_tokens=MAX_TOKENS,
            vocab_size=vocabulary,
            max_context=4096,
            images=False,
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [*program_command(SERVER_BIN), "--model", str(self.model)]
        command += ["--port", str(self.port)]
        command += ["--max-tokens", str(MAX_TOKENS)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        until(self.answers, 60, "the backend's first answer")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def post(self, kind: Kind, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and all bytes up to the connection's end."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            sent = json.dumps({**body, "model": str(self.model)}).encode()
            connection.request("POST", PATHS[kind], sent, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            headers = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, headers, answer.read()

    def answers(self) -> bool:
        """Whether it still generates for everybody: one token of a chat."""
        try:
            return self.post("chat", {**HELLO, "max_tokens": 1})[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def lives(self) -> bool:
        """Whether the process is there, its generation thread says so, and it does generate."""
        if self.process is None or self.process.poll() is not None:
            return False
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200 and self.answers()
        return False

    def survives(self, requests: list[tuple[Kind, dict[str, Any]]]) -> None:
        """Sends these at once; fails if one is not answered properly or it dies of them."""
        if not self.lives():  # of the case before
            self.stop()
            self.start()
        with ThreadPoolExecutor(TOGETHER) as pool:
            replies = list(pool.map(lambda request: self._reply(*request), requests))
        shown = "\n".join(f"{kind}: {body!r}" for kind, body in requests)
        assert self.lives(), f"the backend died of\n{shown}\n{self.last_words()}"
        for reply, (kind, body) in zip(replies, requests, strict=True):
            assert proper(reply), f"{reply!r} is no proper answer to\n{kind}: {body!r}"

    def _reply(self, kind: Kind, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        try:
            return self.post(kind, body)
        except (OSError, http.client.HTTPException) as error:
            return 0, {}, repr(error).encode()

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


def proper(reply: tuple[int, dict[str, str], bytes]) -> bool:
    """Whether it is a whole answer, or an error that says what is wrong."""
    status, headers, body = reply
    try:
        if status != 200:
            return status >= 400 and isinstance(plain_json(body)["error"], str)
        if "text/event-stream" in headers["content-type"]:
            *events, done, rest = body.split(b"\n\n")
            for event in events:
                if not event.startswith(b":"):
                    plain_json(event.removeprefix(b"data: "))["choices"]
            return (done, rest) == (b"data: [DONE]", b"")
        return len(body) == int(headers["content-length"]) and bool(plain_json(body)["choices"])
    except (ValueError, KeyError, TypeError):
        return False


def plain_json(text: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    folder = tmp_path_factory.mktemp("fuzz")
    backend = Backend(tiny_models.build(folder / "tiny"), folder / "backend.log")
    try:
        backend.start()
        yield backend
    finally:
        backend.stop()


# -- the requests


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = {"a": [value]}
    return value


NESTED = nested(200)
ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(None, True, False, "", "x", "\x00", "\ud800", "9" * 20, "🙂", "x" * 5000, [], {}),
        *(0, 1, -1, 2, 12, 0.0, 0.5, 1.0, 1.5, 1e-320, 1e-9, 1e39, 1e300),
        *(float("nan"), float("inf"), float("-inf")),
        *(299, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400, -(2**63)),
        *([None], [5], [""], ["a"], [["x"]], ["a", "b"], [1, 2, 3], [[1, 2]], [{}], NESTED),
        *({"a": 1}, {"type": "text"}, {"type": "x"}, {"1": 1}, {"1": None}, {"-1": 1}),
        *({"999999999": 1}, {"99999": 1}, {"1": float("nan")}, {"include_usage": 1}),
        *({"chat_template": "{% for i in range(10**9) %}{% endfor %}"}, {"tools": []}),
        *({"truncation": True, "max_length": 0}, {"enable_thinking": NESTED}),
    ]
)
WORDS = st.text(max_size=40) | st.sampled_from(
    ["Hello", "<think>", "</think>", "<tool_call>", "<|im_start|>", "<|im_end|>", " ", "\n", "\x00"]
)
SOME = st.text(min_size=1, max_size=40)
CONTEXT_SIZES = st.sampled_from([0, 1, 20, 5000, 1 << 20])
PENALTIES = st.sampled_from([-2, -0.5, 0, 0.5, 2])

TEXT_PART = st.builds(lambda text: {"type": "text", "text": text}, WORDS)
CALL = st.builds(
    lambda name, arguments: {"function": {"name": name, "arguments": arguments}},
    WORDS,
    st.sampled_from(["", "{}", '{"a": 1}', '{"a": {"b": [null]}}', {"a": 1}, "null", None]),
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "user", "system", "developer", "assistant", "tool"]),
        "content": WORDS | st.lists(TEXT_PART, max_size=3),
    },
    optional={
        "name": WORDS,
        "reasoning_content": WORDS,
        "tool_call_id": WORDS,
        "tool_calls": st.lists(CALL, max_size=2),
    },
)
ODD_MESSAGE = st.builds(
    lambda message, name, value: {**message, name: value},
    MESSAGE,
    st.sampled_from(["role", "content", "tool_calls", "name", "anything"]),
    ODD,
)
TOOL = st.builds(
    lambda name, properties: {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {"type": "object", "properties": properties},
        },
    },
    WORDS,
    st.dictionaries(WORDS, st.sampled_from([{}, {"type": "string"}, {"type": ["null"]}, {"a": 1}])),
)
# New values of the numbers that are compiled into kernels take a second each: there are only a few.
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "model": WORDS,
    "adapters": ODD,
    "draft_model": ODD,
    "num_draft_tokens": st.integers(0, 64),
    "stream": st.booleans(),
    "stream_options": st.sampled_from([{}, {"include_usage": True}, {"include_usage": None}]),
    "max_tokens": st.integers(1, 20) | st.just(-1),
    "max_completion_tokens": st.integers(1, 20),
    "temperature": st.sampled_from([0, 0, 1, 1, 2, 1e-320]),
    "top_p": st.sampled_from([0, 0.9, 1, 1e-320]),
    "top_k": st.sampled_from([0, 1, 40, -1, 299, 100_000]),
    "min_p": st.sampled_from([0, 0.1, 1]),
    "xtc_probability": st.sampled_from([0, 1]),
    "xtc_threshold": st.sampled_from([0, 0.1, 0.5]),
    "repetition_penalty": st.sampled_from([0, 0.01, 1, 1.1, 10]),
    "repetition_context_size": CONTEXT_SIZES,
    "presence_penalty": PENALTIES,
    "presence_context_size": CONTEXT_SIZES,
    "frequency_penalty": PENALTIES,
    "frequency_context_size": CONTEXT_SIZES,
    "logit_bias": st.dictionaries(
        st.integers(0, 1400).map(str), st.sampled_from([-100, 1, 100]), max_size=5
    ),
    "seed": st.integers(-(2**63), 2**64 - 1),
    "stop": WORDS | st.lists(WORDS, max_size=4) | st.sampled_from([" w1", ["1 w", "w2"]]),
    "logprobs": st.booleans() | st.integers(0, 5),
    "top_logprobs": st.integers(0, 20),
    "n": st.just(1),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
    "chat_template_kwargs": st.dictionaries(
        st.sampled_from(["enable_thinking", "reasoning_effort", "thinking_budget"]),
        st.booleans() | st.none(),
    ),
    "enable_thinking": st.booleans(),
    "reasoning_effort": st.sampled_from(["none", "low", "high"]),
    "messages": st.lists(MESSAGE, min_size=1, max_size=4),
    "tools": st.lists(TOOL, max_size=2),
    "tool_choice": st.sampled_from(["none", "auto", "required", {"type": "function"}]),
    "functions": st.lists(TOOL, max_size=1),
    "function_call": st.sampled_from(["none", "auto"]),
    "modalities": st.just(["text"]),
    "audio": st.just({}),
    "web_search_options": st.just({}),
    "role_mapping": st.dictionaries(st.sampled_from(["user", "assistant", "stop"]), WORDS),
    "prompt": SOME | WORDS | SOME.map(lambda text: [text]),
    "best_of": st.just(1),
    "echo": st.just(False),
    "suffix": st.just(""),
    "unknown": ODD,
}


@st.composite
def requests(draw: st.DrawFn) -> tuple[Kind, dict[str, Any]]:
    """A request with some of the fields it may have, a third of them with an odd value."""
    kind: Kind = draw(st.sampled_from(["chat", "chat", "text"]))
    required = RULES[kind].required
    optional = [*RULES[kind].fields, "unknown"] + ["temperature"] * 8  # others depend on it
    chosen = draw(st.lists(st.sampled_from(optional), unique=True, min_size=6, max_size=16))
    body = {required: draw(FIELDS[required])}
    if draw(st.integers(0, 9)) == 0:
        body[required] = draw(ODD | st.lists(MESSAGE | ODD_MESSAGE, max_size=3))
    for name in set(chosen) - {required}:
        body[name] = draw(draw(st.sampled_from([FIELDS[name], FIELDS[name], ODD])))
    return kind, body


def checked(backend: Backend, kind: Kind, body: dict[str, Any]) -> dict[str, Any] | None:
    """What the guard lets through, without the fields that it refuses; None if nothing is left."""
    said = dict(body)
    while True:
        try:
            return check(said, RULES[kind], backend.limits)
        except InvalidRequest as error:
            field = re.split(r"\W", error.param or "")[0]
            if field == RULES[kind].required:
                return None
            del said[field]


@pytest.mark.timeout(600 + 2 * CASES)  # a failing case is shrunk, with a new backend each time
@settings(
    max_examples=CASES or 60,
    derandomize=not CASES,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(requests(), min_size=1, max_size=TOGETHER))
def test_the_backend_survives_every_generated_request_that_the_guard_lets_through(
    backend: Backend, case: list[tuple[Kind, dict[str, Any]]]
) -> None:
    passed = [(kind, body) for kind, said in case if (body := checked(backend, kind, said))]
    assume(passed)
    backend.survives(passed)


# -- what is known to hurt, by name

HURTS: list[tuple[Kind, dict[str, Any]]] = [
    *[("chat", {"stop": value}) for value in (5, [5], [None], [["x"]], True, "\ud800")],
    *[("text", {"prompt": value}) for value in ("", ["a"], [], [1, 2], "x" * 10_000_000)],
    ("chat", {"temperature": 1, "top_k": 100_000}),
    ("chat", {"temperature": 1, "top_k": 2**70}),
    ("chat", {"temperature": 1, "min_p": float("nan")}),
    ("chat", {"temperature": 1, "xtc_probability": 1, "xtc_threshold": 0.9}),
    ("chat", {"temperature": 10**400}),
    ("chat", {"repetition_penalty": 10**400}),
    ("chat", {"presence_penalty": 1, "presence_context_size": 2**63}),
    ("chat", {"logit_bias": {"999999999": 1}}),
    ("chat", {"logit_bias": {"1": None}}),
    ("chat", {"logprobs": True, "top_logprobs": True}),
    (
        "chat",
        {"chat_template_kwargs": {"chat_template": "{% for i in range(10**12) %}.{% endfor %}"}},
    ),
    ("chat", {"chat_template_kwargs": {"truncation": True, "max_length": 0}}),
    ("chat", {"max_tokens": 2**31}),
    ("chat", {"max_tokens": 2**70}),
    ("chat", {"seed": -1, "temperature": 1}),
    ("chat", {"draft_model": "org/none"}),
    ("chat", {"adapters": "/none"}),
    ("chat", {"stream": True, "stream_options": {}}),
    ("chat", {"stream": None, "temperature": None, "max_tokens": None, "xtc_probability": 1}),
    ("chat", {"unknown": nested(400)}),
    (
        "chat",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/"}}],
                }
            ]
        },
    ),
]


@pytest.mark.parametrize(("kind", "hurt"), HURTS, ids=lambda it: ascii(it)[:60])
def test_known_harmful_requests_are_rejected_or_survived(
    backend: Backend, kind: Kind, hurt: dict[str, Any]
) -> None:
    required = HELLO if kind == "chat" else {"prompt": "Hello"}
    with contextlib.suppress(InvalidRequest):
        backend.survives([(kind, check({**required, **hurt}, RULES[kind], backend.limits))])


def test_without_the_guard_a_harmful_request_crashes_the_backend(backend: Backend) -> None:
    """The other tests here would notice a death."""
    with pytest.raises(AssertionError, match="the backend died of"):
        backend.survives([("text", {"prompt": ["a"]})])
