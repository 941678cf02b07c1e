"""What the backend sends for a chat, read as deltas; and what happens to a translated stream."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

import pytest

from mlxproxy import errors as our_errors
from mlxproxy.dialects import errors
from mlxproxy.dialects.anthropic_answer import AnthropicAnswer
from mlxproxy.dialects.chat_events import ChatEvents, TranslatedStream, deltas_of
from mlxproxy.dialects.form import (
    Call,
    Failed,
    Finish,
    Loading,
    Progress,
    Reasoning,
    Text,
    Usage,
    Waiting,
    client_id,
    in_their_words,
)
from mlxproxy.engines.mlx_lm.rules import RULES
from mlxproxy.errors import (
    BackendFailed,
    InsufficientMemory,
    InvalidRequest,
    ModelNotFound,
    NoModelLoaded,
    ProxyError,
    TooManyRequests,
)
from mlxproxy.guard import check
from mlxproxy.guard.shapes import Limits
from tests.support import chat_wire as wire


def read(*events: bytes) -> list[Any]:
    reader = ChatEvents()
    return [delta for event in events for delta in reader.read(event)]


def piece(index: int, arguments: str, name: str | None = None) -> bytes:
    """A part of a call, as `mlx_vlm.server` sends them."""
    function = {"arguments": arguments} | ({"name": name} if name else {})
    call = {"index": index, "function": function} | ({"id": f"call_{index}"} if name else {})
    return wire.chunk(tool_calls=[call], content=None, reasoning=None, reasoning_content=None)


def test_an_event_with_all_three_kinds_is_read_in_the_order_of_speaking() -> None:
    event = wire.chunk(reasoning="Hm.", content="I look.", tool_calls=[wire.call("ls", {"a": 1})])
    assert read(event) == [
        Reasoning("Hm."),
        Text("I look."),
        Call(wire.UUID, "ls", '{"a": 1}', {"a": 1}),
    ]


def test_the_end_of_an_answer_is_read() -> None:
    assert read(wire.end("length")) == [Finish("length"), Usage(30, 7, 10)]


def test_comments_tell_what_is_waited_for() -> None:
    assert read(
        b": loading nc/my model 3s\n\n: loading beta 3s 40%\n\n: keepalive 1/2\n\n:\n\n: words\n\n"
    ) == [
        Loading("nc/my model"),
        Loading("beta", 0.4),
        Progress(1, 2),
        Waiting(""),
        Waiting("words"),
    ]


def test_a_call_in_pieces_is_one_call_when_the_next_thing_comes() -> None:
    deltas = read(
        piece(0, '{"a"', "ls"),
        piece(0, ": 1}"),
        piece(1, "", "pwd"),
        piece(2, '{"cut"', "rm"),
        wire.chunk("tool_calls"),
    )
    assert deltas == [
        Call("call_0", "ls", '{"a": 1}', {"a": 1}),
        Call("call_1", "pwd", "{}", {}),
        Finish("tool_calls"),  # what is cut off is no call
    ]


def test_a_call_whose_name_comes_alone_waits_for_its_arguments() -> None:
    deltas = read(piece(0, "", "ls"), piece(0, '{"a": 1}'), wire.text("Done."))
    assert deltas == [Call("call_0", "ls", '{"a": 1}', {"a": 1}), Text("Done.")]


@pytest.mark.parametrize("broken", ["{cut", "[1]", '"x"', '{"a": NaN}'])
def test_a_call_that_no_client_could_run_is_none(broken: str) -> None:
    assert read(wire.calls(wire.call("ls", broken)), wire.chunk("tool_calls")) == [
        Finish("tool_calls")
    ]


def test_reasoning_under_either_name_is_read_once() -> None:
    both = wire.chunk(reasoning="Hm.", reasoning_content="Hm.")
    assert read(both, wire.chunk(reasoning_content="So.")) == [Reasoning("Hm."), Reasoning("So.")]


def test_a_whole_answer_is_read_as_its_parts() -> None:
    completion = wire.whole("tool_calls", content="Hi", tool_calls=[wire.call("ls", {})])
    assert deltas_of(completion) == [
        Text("Hi"),
        Call(wire.UUID, "ls", "{}", {}),
        Finish("tool_calls"),
        Usage(30, 7, 10),
    ]


@pytest.mark.parametrize(
    "odd",
    [
        b"data: {no JSON\n\n",
        b'data: {"choices": 5}\n\n',
        b'data: {"choices": [{"delta": {"content": 5}}]}\n\n',
        b'data: {"choices": [{"delta": {"tool_calls": [{}]}}]}\n\n',
        b'data: {"usage": {"total_tokens": 5}}\n\n',
        b"data: {\xff\n\n",
        b'data: {"a": ' + b"[" * 100_000 + b"\n\n",
    ],
)
def test_an_event_of_another_shape_is_the_backends_failure(odd: bytes) -> None:
    with pytest.raises(BackendFailed, match="unknown format"):
        read(odd)


# -- a translated stream


class Source:
    """A relayed stream that knows whether it has been closed."""

    def __init__(self, *items: bytes) -> None:
        self.items = list(items)
        self.closed = False

    def __iter__(self) -> Generator[bytes, None, None]:
        yield from self.items

    def close(self) -> None:
        self.closed = True


def test_a_client_that_leaves_ends_the_relayed_stream_begun_or_not() -> None:
    for begun in (True, False):
        source = Source(wire.text("a"), wire.text("b"))
        stream = TranslatedStream(source, AnthropicAnswer("alpha"))
        if begun:
            next(iter(stream))
        stream.close()
        assert source.closed


def test_what_the_relay_raises_is_raised() -> None:
    def broken() -> Generator[bytes, None, None]:
        raise NoModelLoaded("Load one.")
        yield b""

    with pytest.raises(NoModelLoaded):
        list(TranslatedStream(broken(), AnthropicAnswer("alpha")))


def test_an_event_is_passed_on_when_it_comes() -> None:
    passed: list[bytes] = []

    def source() -> Generator[bytes, None, None]:
        yield wire.text("one ")
        assert b"one " in passed[-1]
        yield wire.text("two ")
        assert b"two " in passed[-1]
        yield wire.end()

    for data in TranslatedStream(source(), AnthropicAnswer("alpha")):
        assert data
        passed.append(data)


def test_nothing_follows_an_error() -> None:
    error = wire.sse.event(NoModelLoaded("Load one.").body())
    data = wire.sent(AnthropicAnswer("alpha"), error + wire.text("late"), wire.end())
    assert [event["type"] for event in wire.events(data)] == ["error"]


# -- ids


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (wire.UUID, f"toolu_{wire.TOOL_ID}"),
        ("a1B2c3D4e", "a1B2c3D4e"),  # nine characters, as Mistral's templates demand
        ("functions.ls:0", "toolu_1"),
        ("", "toolu_1"),
        ("x" * 65, "toolu_1"),
    ],
)
def test_an_id_is_one_that_clients_take_and_give_back(given: str, expected: str) -> None:
    call = Call(given, "ls", "{}", {})
    assert client_id(call, "toolu_", wire.numbered(), set()) == expected


def test_two_calls_of_one_id_get_two() -> None:
    taken: set[str] = set()
    make_id = wire.numbered()
    ids = [client_id(Call("x", "ls", "{}", {}), "call_", make_id, taken) for _ in range(3)]
    assert ids == ["x", "call_1", "call_2"]


# -- errors


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/messages", "anthropic"),
        ("/v1/messages/count_tokens", "anthropic"),
        ("/v1/messagesque", "openai"),
        ("/api/v0/models", "lmstudio"),
        ("/api/v1/chat", "lmstudio"),
        ("/api/chat", "ollama"),
        ("/api/version", "ollama"),
        ("/v1/responses", "openai"),
        ("/nowhere", "openai"),
    ],
)
def test_an_error_has_the_shape_of_its_paths_dialect(path: str, dialect: str) -> None:
    assert errors.dialect_of(path) == dialect


def test_an_error_in_each_dialect() -> None:
    error = ModelNotFound("There is no model 'x'.", param="model")
    message = "There is no model 'x'."
    assert errors.rendered(error, "anthropic", "req_1") == (
        404,
        {
            "type": "error",
            "error": {"type": "not_found_error", "message": message},
            "request_id": "req_1",
        },
        {"request-id": "req_1"},
    )
    assert errors.rendered(error, "ollama", "req_1") == (404, {"error": message}, {})
    told = {"message": message, "code": "model_not_found", "param": "model"}
    lmstudio = {"error": {"type": "model_not_found", **told}}
    assert errors.rendered(error, "lmstudio", "req_1") == (404, lmstudio, {})
    openai = {"error": {"type": "invalid_request_error", **told}}
    assert errors.rendered(error, "openai", "req_1") == (404, openai, {})


def _all_errors() -> list[type[ProxyError]]:
    found = [kind for kind in vars(our_errors).values() if isinstance(kind, type)]
    each = {kind for kind in found if issubclass(kind, ProxyError) and "code" in vars(kind)}
    return sorted(each - {ProxyError}, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", _all_errors())
def test_every_error_survives_a_stream_and_has_a_type_that_the_sdk_knows(
    kind: type[ProxyError],
) -> None:
    error = kind("A sentence.", param="model")
    again = errors.from_body(error.body()["error"])
    assert (type(again), again.message, again.param) == (kind, "A sentence.", "model")
    body = errors.anthropic(again)
    assert body["error"]["type"] in {
        "invalid_request_error", "authentication_error", "permission_error", "not_found_error",
        "conflict_error", "request_too_large", "rate_limit_error", "api_error", "overloaded_error",
        "timeout_error",
    }  # fmt: skip


def test_an_error_that_the_backend_words_itself_is_one_all_the_same() -> None:
    (failed,) = read(wire.sse.event({"error": "[metal] Out of memory at /private/path"}))
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, BackendFailed)
    assert "/private" not in failed.error.message


def test_clients_do_not_try_again_what_cannot_succeed() -> None:
    hopeless = errors.rendered(InsufficientMemory("Too large."), "anthropic", "req_1")
    assert hopeless.headers["x-should-retry"] == "false"
    assert "x-should-retry" not in errors.rendered(TooManyRequests("Wait."), "openai", "r").headers


@pytest.mark.parametrize(
    "message",
    [
        "The prompt has 5000 tokens, and the model's context is 4096. Send less.",
        "The prompt has about 5000 tokens, and the model's context is 4096. Send less.",
        "This model's maximum context length is 4096 tokens, but the prompt has 5000 tokens.",
        "This model's maximum context length is 4096 tokens, but the prompt has 20000 characters.",
    ],
)
def test_a_prompt_that_does_not_fit_makes_agents_shorten_the_conversation(message: str) -> None:
    told = errors.anthropic(InvalidRequest(message))["error"]["message"]
    assert told == "prompt is too long: 5000 tokens > 4096 maximum"
    assert errors.responses(InvalidRequest(message))["code"] == "context_length_exceeded"


def test_the_guards_own_estimate_makes_it_shorten_the_conversation_too() -> None:
    body = {"messages": [{"role": "user", "content": "x" * 2000}]}
    limits = Limits(template_kwargs=frozenset(), max_context=100)
    with pytest.raises(InvalidRequest) as refusal:
        check.check(body, RULES["chat"], limits)
    message = errors.anthropic(refusal.value)["error"]["message"]
    assert message == "prompt is too long: 503 tokens > 100 maximum"  # with its keys


def test_a_field_that_the_dialect_calls_otherwise_is_named_as_the_client_wrote_it() -> None:
    error = InvalidRequest("stop[0] must be a string.", param="stop[0]")
    named = in_their_words(error, {"stop": "stop_sequences"})
    assert named.message == "stop_sequences[0] must be a string."
    assert named.param == "stop_sequences[0]"
    assert in_their_words(error, {}) is error


def test_a_line_of_json_has_no_line_in_it() -> None:
    assert b"\n" not in errors.ollama_line(NoModelLoaded("a\nb"))[:-1]
    assert json.loads(errors.ollama_line(NoModelLoaded("a\nb")))["error"] == "a\nb"
