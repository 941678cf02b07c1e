"""An answer's way through the relay: wait, open, pump; and what becomes of its bytes."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, SupportsIndex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxproxy import sse
from mlxproxy.backend.protocol import Address, Fields
from mlxproxy.engines.mlx_lm.completion import Completion
from mlxproxy.engines.mlx_lm.wire import MlxLmWire
from mlxproxy.errors import BackendFailed, InvalidRequest, ModelSwapped, ProxyError
from mlxproxy.relay import pump
from mlxproxy.relay.pump import HEARTBEAT
from mlxproxy.relay.relay import OPENING, Relay, Stream
from mlxproxy.relay.statistics import AnswerStats
from mlxproxy.sse import BLANK, DONE, EVENT_LIMIT
from tests.support.fake_connection import SILENCE, FakeConnection, Scene, after

HEAD = {"id": "x", "system_fingerprint": "f", "model": "m", "created": 1}


def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": finish, "delta": {"role": "assistant", **delta}}
    return {**HEAD, "object": "chat.completion.chunk", "choices": [choice]}


def usage(**counts: Any) -> dict[str, Any]:
    return {**HEAD, "object": "chat.completion", "choices": [], "usage": counts}


def assemble(events: list[Any], together: bool = False) -> dict[str, Any]:
    """The answer of these events, which come one by one or all in one piece."""
    pieces = [*map(event_of, events), DONE]
    assembly = Completion()
    for piece in [b"".join(pieces)] if together else pieces:
        assembly.add(piece)
    answer: dict[str, Any] = json.loads(assembly.answer())
    return answer


def event_of(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


# -- the three steps


def begun(scene: Scene) -> tuple[Iterator[bytes], Stream, AnswerStats]:
    """A stream whose status is decided."""
    stats = AnswerStats()
    stream = scene.relay.stream(scene.lease, scene.request, stats)
    return iter(stream), stream, stats


def events_of(scene: Scene) -> tuple[list[bytes], AnswerStats]:
    """All that a client gets of a stream, to its end."""
    body, stream, stats = begun(scene)
    items = list(body)
    stream.close()
    assert scene.controller.released == 1
    return items, stats


def whole_of(scene: Scene) -> tuple[Any, AnswerStats]:
    stats = AnswerStats()
    try:
        return json.loads(scene.relay.whole(scene.lease, scene.request, stats)), stats
    finally:
        assert scene.controller.released == 1


def error_in(event: bytes) -> str:
    """The code of the error that an event carries."""
    return str(json.loads(event.removeprefix(b"data: "))["error"]["code"])


def refuses(scene: Scene, answer: Callable[[Scene], object] | None = None) -> tuple[str, str]:
    """The code of the error that an answer is, and its outcome; its place is given back."""
    stats = AnswerStats()
    answers = scene.relay.stream if answer is None else scene.relay.whole
    with pytest.raises(ProxyError) as raised:
        answers(scene.lease, scene.request, stats)
    assert scene.controller.released == 1
    assert stats.ended is not None
    return raised.value.code, stats.outcome


ANSWERS = [pytest.param(None, id="stream"), pytest.param(whole_of, id="whole")]
HELLO = [chunk({"content": "Hello"}), chunk({}, "stop")]


def sent(*values: Any) -> list[bytes]:
    """The pieces of a stream that the backend sends: an event each."""
    return [*map(event_of, values), DONE]


LONG = "the prompt has 9 tokens, and the model's context is 8"
COUNTED = usage(prompt_tokens=7, completion_tokens=1)


def test_the_speed_is_told_from_the_end_of_the_prompt_on() -> None:
    """A tool call's tokens come all at once: from its first byte on, they came in no time."""

    def speed(prompt_read: float | None, unmeasured: int = 0) -> object:
        stats = AnswerStats(started=0.0, prompt_read=prompt_read, first_byte=13.999, ended=14.0)
        stats.tokens_out, stats.tokens_unmeasured = 40, unmeasured
        return stats.figures()["tokens_per_second"]

    assert speed(10.0) == 10.0
    assert speed(10.0, unmeasured=4) == 9.0
    assert speed(13.999, unmeasured=40) is None
    assert speed(None) is None
    assert speed(14.0) is None


@pytest.mark.parametrize("answer", [events_of, whole_of], ids=["stream", "whole"])
def test_the_last_keepalive_before_the_first_token_ends_the_prompt(
    answer: Callable[[Scene], tuple[object, AnswerStats]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = map(float, range(100))
    monkeypatch.setattr(pump, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    first, *others = (event_of(value) for value in (*HELLO, COUNTED))
    half, end = b": keepalive 1/2\n\n", b": keepalive 2/2\n\n"

    def noted(*opening: bytes) -> AnswerStats:
        return answer(Scene(FakeConnection([*opening, *others, DONE])).grant())[1]

    before = next(ticks)
    stats = noted(half, end, first)
    assert stats.prompt_read is not None
    assert stats.first_byte is not None
    assert stats.first_byte > stats.prompt_read > before + 1, "not the first keepalive"
    stats = noted(half, end + first)
    assert stats.prompt_read is not None
    assert stats.tokens_unmeasured == 1, "nobody knows when it was sent"


def test_a_place_that_is_free_costs_no_comment() -> None:
    items, stats = events_of(Scene(FakeConnection(sent(*HELLO, COUNTED))).grant())
    assert items == [OPENING, *map(event_of, HELLO), DONE]
    assert stats.outcome == "done"
    assert stats.model == "org/name"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody wait longer than a moment for a place."""
    monkeypatch.setattr("mlxproxy.relay.relay.SILENT_WAIT_SECONDS", 0.001)
    monkeypatch.setattr("mlxproxy.relay.relay.INTERVAL_SECONDS", 0.001)


@pytest.mark.usefixtures("impatient")
def test_a_stream_tells_what_it_waits_for_until_it_has_its_place() -> None:
    scene = Scene(FakeConnection(sent(*HELLO)))
    body, _, stats = begun(scene)
    assert [next(body), next(body)] == [b": loading it\n\n"] * 2
    assert not scene.opened
    scene.grant()
    assert list(body) == [OPENING, *map(event_of, HELLO), DONE]
    assert stats.granted is not None


@pytest.mark.usefixtures("impatient")
def test_a_client_that_leaves_the_queue_leaves_no_trace() -> None:
    scene = Scene(FakeConnection())
    _, stream, stats = begun(scene)
    stream.close()  # nobody has begun to read it
    stream.close()
    assert (scene.controller.released, scene.opened, stats.outcome) == (1, 0, "client_gone")


@pytest.mark.usefixtures("impatient")
def test_a_place_that_is_refused_late_is_the_streams_last_event() -> None:
    scene = Scene(FakeConnection())
    body, _, stats = begun(scene)
    assert next(body).startswith(b": ")
    scene.end(ModelSwapped("swapped"))
    assert [error_in(item) for item in body] == ["model_swapped"]
    assert (scene.controller.released, stats.outcome) == (1, "model_swapped")


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_place_that_is_refused_at_once_is_the_status(answer: Any) -> None:
    scene = Scene(FakeConnection())
    scene.end(ModelSwapped("swapped"))
    assert refuses(scene, answer) == ("model_swapped", "model_swapped")


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_the_model_refuses_costs_the_backend_nothing(answer: Any) -> None:
    scene = Scene(FakeConnection(), refused=InvalidRequest("no")).grant()
    assert refuses(scene, answer) == ("invalid_request", "invalid_request")
    assert not scene.opened


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_backend_that_does_not_accept_is_the_status(answer: Any) -> None:
    scene = Scene(BackendFailed("does not accept")).grant()
    assert refuses(scene, answer) == ("backend_failed", "backend_failed")


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_lease_that_ends_while_the_connection_is_opened_closes_it(answer: Any) -> None:
    connection = FakeConnection()
    scene = Scene(connection).grant()

    def connect(*_: object) -> Any:
        scene.end(ModelSwapped("swapped"))
        return connection

    scene.relay = Relay(1, connect)
    assert refuses(scene, answer) == ("model_swapped", "model_swapped")
    assert connection.calls == ["close"]
    assert not connection.sent


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize(
    ("status", "text", "code"),
    [
        (404, "the prompt has no tokens", "invalid_request"),
        (404, LONG, "context_length_exceeded"),
        (404, LONG.replace("9", "about 9"), "context_length_exceeded"),
        (400, "max_tokens must be an int", "invalid_request"),
        (404, "/secret/path", "internal_error"),
        (404, "generation thread died", "backend_failed"),
        (500, "?", "backend_failed"),
        (200 + 1, None, "backend_failed"),
    ],
)
def test_the_backends_refusal_is_the_status(
    answer: Any, status: int, text: str | None, code: str
) -> None:
    body = b"what?" if text is None else json.dumps({"error": text}).encode()
    assert refuses(Scene(FakeConnection([body], status)).grant(), answer) == (code, code)


@pytest.mark.parametrize("answer", ANSWERS)
def test_why_a_lease_was_ended_comes_before_what_the_backend_says_of_it(answer: Any) -> None:
    connection = FakeConnection(status=404)
    scene = Scene(connection).grant()
    ends = after(
        lambda: scene.end(ModelSwapped("swapped")), b'{"error": "the prompt has no tokens"}'
    )
    connection.pieces = iter([ends])
    assert refuses(scene, answer) == ("model_swapped", "model_swapped")


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_backend_that_dies_before_its_head_is_the_status(answer: Any) -> None:
    scene = Scene(FakeConnection(head=[BackendFailed("closed the connection")])).grant()
    assert refuses(scene, answer) == ("backend_failed", "backend_failed")


def test_silence_before_the_head_is_told_in_comments() -> None:
    connection = FakeConnection(sent(*HELLO), head=[SILENCE, SILENCE])
    items, _ = events_of(Scene(connection).grant())
    assert items[:3] == [HEARTBEAT, HEARTBEAT, OPENING]


@pytest.mark.parametrize("head", [[SILENCE, BackendFailed("closed")], [SILENCE]])
def test_after_a_comment_an_error_is_the_last_event(head: list[Any]) -> None:
    """The status has been sent by then, whether the head never comes or is a refusal."""
    connection = FakeConnection([b"?"], status=500, head=head)
    items, stats = events_of(Scene(connection).grant())
    assert items[0] == HEARTBEAT
    assert [error_in(item) for item in items[1:]] == ["backend_failed"]
    assert stats.outcome == "backend_failed"


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_client_that_leaves_before_the_head_is_known_as_gone(answer: Any) -> None:
    connection = FakeConnection()
    scene = Scene(connection).grant()
    connection.head = iter([after(scene.leave, BackendFailed("closed"))])
    assert refuses(scene, answer)[1] == "client_gone"
    assert connection.calls == ["abort", "abort", "wait_released", "close"]


def test_silence_within_an_answer_is_told_in_comments() -> None:
    first, last = map(event_of, HELLO)
    items, _ = events_of(Scene(FakeConnection([SILENCE, first, SILENCE, last, DONE])).grant())
    assert items == [OPENING, HEARTBEAT, first, HEARTBEAT, last, DONE]


@pytest.mark.parametrize("head", [[], [SILENCE]])
def test_a_stall_ends_an_answer(head: list[Any]) -> None:
    """Before the status is sent, and after."""
    connection = FakeConnection([event_of(HELLO[0]), SILENCE], head=head)
    scene = Scene(connection, stall_timeout=-1.0).grant()
    if head:
        assert refuses(scene) == ("backend_timeout", "backend_timeout")
    else:
        items, stats = events_of(scene)
        assert error_in(items[-1]) == stats.outcome == "backend_timeout"
    assert scene.backend.hung


def test_a_stall_ends_a_whole_answer() -> None:
    scene = Scene(FakeConnection([SILENCE]), stall_timeout=-1.0).grant()
    assert refuses(scene, whole_of) == ("backend_timeout", "backend_timeout")


def test_half_an_event_is_not_passed_on_before_the_error() -> None:
    first, last = map(event_of, HELLO)
    items, stats = events_of(Scene(FakeConnection([first, last[:-1]])).grant())
    assert items[:2] == [OPENING, first]
    assert [error_in(item) for item in items[2:]] == ["backend_failed"]
    assert stats.tokens_out == 1  # an answer that is cut off has no last chunk without a token


def test_done_counts_even_when_cut_by_a_read() -> None:
    pieces = [*map(event_of, HELLO), DONE[:8], DONE[8:-1], DONE[-1:], b"never read"]
    items, stats = events_of(Scene(FakeConnection(pieces)).grant())
    assert b"".join(items) == b"".join([OPENING, *map(event_of, HELLO), DONE])
    assert stats.outcome == "done"


def test_a_client_that_leaves_in_mid_answer_ends_it_in_the_backend() -> None:
    connection = FakeConnection(sent(*[HELLO[0]] * 9))
    scene = Scene(connection).grant()
    body, stream, stats = begun(scene)
    for _ in range(4):
        next(body)
    stream.close()
    assert connection.calls == ["abort", "wait_released", "close"]
    assert scene.controller.released == 1
    assert (stats.outcome, stats.tokens_out) == ("client_gone", 2)  # the third was not taken
    assert list(body) == []


def test_a_client_that_leaves_while_a_whole_answer_is_made_ends_it() -> None:
    connection = FakeConnection()
    scene = Scene(connection).grant()
    connection.pieces = iter([event_of(HELLO[0]), after(scene.leave)])
    assert refuses(scene, whole_of)[1] == "client_gone"
    assert connection.calls[-1] == "close"


@pytest.mark.parametrize("answer", [events_of, whole_of])
@pytest.mark.parametrize("before_the_head", [True, False])
def test_an_error_of_our_own_gives_the_place_back(
    answer: Callable[[Scene], object], before_the_head: bool
) -> None:
    fault = [RuntimeError()]
    connection = FakeConnection(head=fault) if before_the_head else FakeConnection(fault)
    scene = Scene(connection).grant()
    with pytest.raises(RuntimeError):
        answer(scene)
    assert scene.controller.released == 1
    assert connection.calls[-1] == "close"


def test_a_finished_answer_aborts_nothing() -> None:
    connection = FakeConnection(sent(*HELLO, COUNTED))
    events_of(Scene(connection).grant())
    assert connection.calls == ["close"]


# -- what is asked for, and what is told of it


def asked(scene: Scene) -> Any:
    assert isinstance(scene.connection, FakeConnection)
    ((path, body),) = scene.connection.sent
    assert path == "/v1/x"
    return json.loads(body)


@pytest.mark.parametrize("wants", [None, False, True])
def test_every_stream_is_counted_and_only_those_who_ask_are_told(wants: bool | None) -> None:
    fields = {} if wants is None else {"stream_options": {"include_usage": wants}}
    counted = usage(
        prompt_tokens=30_733, completion_tokens=12, prompt_tokens_details={"cached_tokens": 30_000}
    )
    scene = Scene(FakeConnection(sent(*HELLO, counted)), **fields).grant()
    items, stats = events_of(scene)
    assert asked(scene)["stream_options"] == {"include_usage": True}
    assert (event_of(counted) in items) == (wants is True)
    assert items[-1] == DONE
    assert (stats.tokens_in, stats.cached_tokens, stats.tokens_out) == (30_733, 30_000, 12)


def test_without_a_count_the_events_are_counted_but_for_the_last() -> None:
    """It carries the reason of the end alone."""
    _, stats = events_of(Scene(FakeConnection(sent(*HELLO))).grant())
    assert (stats.tokens_in, stats.cached_tokens, stats.tokens_out) == (None, None, 1)


@given(st.data())
def test_the_count_is_taken_out_however_the_stream_is_cut(data: st.DataObject) -> None:
    stream = b"".join(sent(*HELLO, COUNTED))
    pieces = cut(stream, data.draw(places))
    items, stats = events_of(Scene(FakeConnection(pieces)).grant())
    assert b"".join(items[1:]) == b"".join(sent(*HELLO))
    assert stats.tokens_in == 7


@pytest.mark.parametrize(
    "kept",
    [
        b'data: {"usage" no JSON\n\n',
        event_of({"choices": [], "usage": None}),
        event_of({**HELLO[0], "usage": {"completion_tokens": 1}}),
        event_of({**HELLO[0], "choices": [{"delta": {"usage": {}}}]}),
        b': "usage"\n\n',
        event_of(chunk({"content": '"usage": {}'})),
    ],
)
def test_nothing_but_the_count_is_taken_out(kept: bytes) -> None:
    items, stats = events_of(Scene(FakeConnection([kept, DONE])).grant())
    assert items == [OPENING, kept, DONE]
    assert stats.outcome == "done"


def test_the_models_path_is_in_no_event_and_its_words_are_left_alone() -> None:
    path = "/models/org/name"
    said = chunk({"content": f'"model": "{path}" {path}'})
    events = [{**event, "model": path} for event in (said, said, chunk({}, "stop"))]
    counted = {**COUNTED, "model": path}
    shown = [{**event, "model": "org/name"} for event in (*events, counted)]
    stream = b"".join(sent(*events, counted))
    ask = {"stream_options": {"include_usage": True}}
    for pieces in (sent(*events, counted), [stream], [stream[:333], stream[333:]]):
        items, _ = events_of(Scene(FakeConnection(pieces), **ask).grant())
        assert b"".join(items[1:]) == b"".join(sent(*shown))
    answer, _ = whole_of(Scene(FakeConnection([stream])).grant())
    assert answer["model"] == "org/name"
    assert answer["choices"][0]["message"]["content"] == f'"model": "{path}" {path}' * 2


def test_an_answer_can_be_given_another_name() -> None:
    events = [{**event, "model": "/models/org/name"} for event in HELLO]
    scene = Scene(FakeConnection(sent(*events))).grant()
    scene.request = dataclasses.replace(scene.request, called=lambda spec: 'a "profile"')
    items, _ = events_of(scene)
    assert json.loads(items[1][6:])["model"] == 'a "profile"'


def test_log_probabilities_come_with_the_backends_own_whole_answer() -> None:
    own = json.dumps(
        {
            "model": "/models/org/name",
            "choices": [{"logprobs": {}}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        }
    ).encode()
    for fields in ({"logprobs": True}, {"top_logprobs": 2}):
        scene = Scene(FakeConnection([own[:50], own[50:]]), **fields).grant()
        answer, stats = whole_of(scene)
        assert answer == {**json.loads(own), "model": "org/name"}
        assert asked(scene)["stream"] is False
        assert "stream_options" not in asked(scene)
        assert (stats.tokens_in, stats.tokens_out) == (3, 2)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"choices": []}', b"{"])
def test_what_is_no_whole_answer_is_the_backends_failure(body: bytes) -> None:
    scene = Scene(FakeConnection([body]), logprobs=True).grant()
    assert refuses(scene, whole_of)[0] == "backend_failed"


def test_a_whole_answer_shorter_than_announced_is_the_backends_failure() -> None:
    connection = FakeConnection([b'{"choices": [{"a": 1}], "usage": {"prompt_tokens": 1}}'])
    connection.whole = False
    assert refuses(Scene(connection, logprobs=True).grant(), whole_of)[0] == "backend_failed"


def test_the_prompts_length_is_known_before_the_end_where_keepalives_tell_it() -> None:
    pieces = [b": keepalive 30/34\n\n", event_of(HELLO[0])]
    for tells, tokens in ((True, 34), (False, None)):
        scene = Scene(FakeConnection(pieces)).grant()
        scene.backend.wire = MlxLmWire({"progress"}.__contains__ if tells else lambda _: False)
        items, stats = events_of(scene)  # which is cut off
        assert items[1] == pieces[0]
        assert (stats.tokens_in, stats.outcome) == (tokens, "backend_failed")


class OtherWire(MlxLmWire):
    """An engine that writes JSON without spaces, in another order, and gives whole answers."""

    chunk_end: Any = b"}}\n\n"

    def encode(self, fields: Fields, model: str, streamed: bool) -> bytes:
        return json.dumps({**fields, "path": model, "live": streamed}).encode()

    def streams_all(self, fields: Fields) -> bool:
        return False

    def model_field(self, name: str) -> bytes:
        return b'"model":' + json.dumps(name).encode()


def test_an_engine_with_another_wire_is_relayed_all_the_same() -> None:
    def compact(model: str) -> list[bytes]:
        values = (
            {"choices": [{"delta": {"content": "a"}}], "model": model, "x": {}},
            {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 1}, "model": model},
        )
        lines = (json.dumps(value, separators=(",", ":")).encode() for value in values)
        return [b"data: " + line + b"\n\n" for line in lines]

    scene = Scene(FakeConnection([*compact("/models/org/name"), DONE])).grant()
    scene.backend.wire = OtherWire(lambda _: False)
    items, stats = events_of(scene)
    assert items == [OPENING, compact("org/name")[0], DONE]
    assert (stats.tokens_in, stats.tokens_out) == (5, 1)
    assert asked(scene) == {"path": "/models/org/name", "live": True}

    own = b'{"choices":[{"text":"a"}],"usage":{"prompt_tokens":5},"model":"/models/org/name"}'
    scene = Scene(FakeConnection([own])).grant()
    scene.backend.wire = OtherWire(lambda _: False)
    answer, _ = whole_of(scene)
    assert answer["model"] == "org/name"
    assert asked(scene)["live"] is False


def test_an_engine_that_speaks_http_1_1_in_chunks_is_relayed() -> None:
    """Over a socket: no chunk begins or ends where an event does."""
    events = [{**event, "model": "/models/org/name"} for event in (*HELLO, COUNTED)]
    for event in events:
        del event["system_fingerprint"]
    data = b"".join(sent(*events))
    wire = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    for piece in cut(data, range(50, len(data), 70)):
        wire += b"%x\r\n%b\r\n" % (len(piece), piece)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        scene = Scene(FakeConnection()).grant()
        scene.backend.address = Address("127.0.0.1", listener.getsockname()[1])
        scene.relay = Relay(300)
        engine = threading.Thread(target=_answer_one, args=(listener, wire + b"0\r\n\r\n"))
        engine.start()
        items, stats = events_of(scene)
        engine.join()
    shown = sent(*({**event, "model": "org/name"} for event in events[:2]))
    assert b"".join(items) == b"".join([OPENING, *shown])
    assert (stats.outcome, stats.tokens_in) == ("done", 7)


def _answer_one(listener: socket.socket, answer: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(answer)
        connection.recv(1)  # until the other side closes


# -- whole events


def streamed(pieces: Iterable[bytes]) -> tuple[bytes, str]:
    """What a client gets of a stream that comes in these pieces, and how it ended."""
    ask = {"stream_options": {"include_usage": True}}
    items, stats = events_of(Scene(FakeConnection(pieces), **ask).grant())
    assert items[0] == OPENING
    return b"".join(items[1:]), stats.outcome


def whole(pieces: Iterable[bytes]) -> Any:
    return whole_of(Scene(FakeConnection(pieces)).grant())[0]


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """The bytes in pieces, which end at these places."""
    edges = [0, *sorted({place % len(data) for place in places} - {0}), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


places = st.lists(st.integers(0, 1 << 16))
# Of such parts is all that could be taken for an event's end, or for an answer's.
parts = st.sampled_from(
    [b"data: {}", b": 1", b"data: [DONE]", b"data: [DO", b"NE]", b"\n", BLANK, b"\r", DONE]
)


@given(st.lists(parts, min_size=1).map(b"".join), places)
def test_a_stream_is_the_same_however_it_is_cut_into_pieces(data: bytes, places: list[int]) -> None:
    """All its whole events: an error that came after half an event could be read by no client."""
    done = (BLANK + data).find(BLANK + DONE)
    if done >= 0:
        assert streamed(cut(data, places)) == (data[: done + len(DONE)], "done")
        return
    events = data[: (BLANK + data).rfind(BLANK)]
    got, outcome = streamed(cut(data, places))
    assert got.startswith(events)
    assert json.loads(got[len(events) :].removeprefix(b"data: "))["error"]["code"] == outcome
    assert outcome == "backend_failed"


SOUND: list[Any] = [
    chunk({"reasoning": "data: [DONE]"}),
    chunk({"content": "\n\ndata: [DONE]\n\n"}),
    chunk({}, "stop"),
    usage(prompt_tokens=1, completion_tokens=2),
]


@given(places)
def test_words_of_a_model_never_end_its_answer(places: list[int]) -> None:
    data = b"".join(map(event_of, SOUND)) + DONE
    message = whole(cut(data, places))["choices"][0]["message"]
    assert message["reasoning"] == "data: [DONE]"
    assert message["content"] == "\n\ndata: [DONE]\n\n"
    assert streamed(cut(data, places)) == (data, "done")


def test_an_event_that_never_ends_ends_the_answer() -> None:
    asked = 0

    def endless() -> Iterator[bytes]:
        nonlocal asked
        yield BLANK
        while True:
            asked += 1
            yield b"x" * 16384

    got, outcome = streamed(endless())
    assert outcome == "backend_failed"
    assert "16 MiB" in json.loads(got.removeprefix(BLANK + b"data: "))["error"]["message"]
    with pytest.raises(BackendFailed):
        whole(endless())
    assert asked <= 2 * (EVENT_LIMIT // 16384 + 1)


class Counted(bytes):
    """Bytes that count how many of them are looked at or copied, those made of them included."""

    work = 0

    def _seen(self, data: bytes) -> Counted:
        Counted.work += len(data)
        return Counted(data)

    def __add__(self, other: Any) -> Counted:
        return self._seen(bytes(self) + bytes(other))

    def __radd__(self, other: Any) -> Counted:
        return self._seen(bytes(other) + bytes(self))

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        return self._seen(found) if isinstance(found, bytes) else found

    def __contains__(self, key: Any) -> bool:
        return super(Counted, self._seen(self)).__contains__(key)

    def find(self, *args: Any) -> int:
        return super(Counted, self._seen(self)).find(*args)

    def rfind(self, *args: Any) -> int:
        return super(Counted, self._seen(self)).rfind(*args)

    def count(self, *args: Any) -> int:
        return super(Counted, self._seen(self)).count(*args)

    def split(self, *args: Any) -> Any:
        return super(Counted, self._seen(self)).split(*args)


class CountedArray(bytearray):
    """The same of bytes that are collected."""

    def __iadd__(self, other: Any) -> CountedArray:
        Counted.work += len(other)
        super().__iadd__(other)
        return self

    def __bytes__(self) -> bytes:
        Counted.work += len(self)
        return b"".join([memoryview(self)])

    def __getitem__(self, key: Any) -> Any:
        return Counted(bytes(self))[key]

    def __contains__(self, key: SupportsIndex | bytes) -> bool:
        return key in Counted(bytes(self))

    def find(self, *args: Any) -> int:
        return Counted(bytes(self)).find(*args)

    def rfind(self, *args: Any) -> int:
        return Counted(bytes(self)).rfind(*args)


def answer_of(events: int, size: int) -> bytes:
    text = [chunk({"content": "x" * size}) for _ in range(events)]
    return b"".join(map(event_of, [*text, chunk({}, "stop"), usage(prompt_tokens=1)])) + DONE


@pytest.mark.parametrize("read", [streamed, whole])
@pytest.mark.parametrize(
    ("once", "twice", "piece"),
    [
        ((1, 40_000), (1, 80_000), 16),
        ((1, 400_000), (1, 800_000), 4096),
        ((100, 10), (200, 10), 1),
        ((200, 400), (400, 400), 64),
        ((1000, 10), (2000, 10), 16384),
    ],
)
def test_twice_the_bytes_are_twice_the_work(
    read: Callable[[list[bytes]], object],
    once: tuple[int, int],
    twice: tuple[int, int],
    piece: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One huge event or many, in pieces of any size: each byte is looked at a few times."""
    monkeypatch.setattr(sse, "bytearray", CountedArray, raising=False)
    work = []
    for events, size in (once, twice):
        data = answer_of(events, size)
        Counted.work = 0
        read([Counted(data[at : at + piece]) for at in range(0, len(data), piece)])
        work.append(Counted.work / len(data))
    assert 1 < work[0] < 12
    assert work[1] < 1.1 * work[0]


# -- whole answers


def test_a_whole_answer_has_the_text_the_thoughts_and_the_calls_of_all_events() -> None:
    call = {"function": {"name": "f", "arguments": "{}"}, "type": "function", "id": "c"}
    events = [
        chunk({"reasoning": "hm"}),
        chunk({"content": "a"}),
        chunk({"content": "b", "tool_calls": [{**call, "index": 0}]}),
        chunk({}, "tool_calls"),
        usage(prompt_tokens=1, completion_tokens=2, total_tokens=3),
    ]
    answer = assemble(events)
    assert answer == assemble(events, together=True)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    message = answer["choices"][0]["message"]
    assert message["content"] == "ab"
    assert message["reasoning"] == "hm"
    assert message["tool_calls"] == [call]
    assert answer["usage"]["total_tokens"] == 3


@pytest.mark.parametrize(
    "events",
    [
        [],
        [usage(total_tokens=1)],
        [chunk({"content": "a"}, "stop")],
        [chunk({"content": 5}, "stop"), usage(total_tokens=1)],
        [chunk({"tool_calls": "abc"}, "stop"), usage(total_tokens=1)],
        [{**HEAD, "object": "text_completion", "choices": [{"text": None}]}, usage(total_tokens=1)],
        [{"error": "no event"}],
        ["no event"],
    ],
)
def test_events_that_amount_to_no_answer_are_the_backends_failure(events: list[Any]) -> None:
    with pytest.raises(BackendFailed):
        assemble(events)


def test_an_answer_without_text_has_null_for_content() -> None:
    answer = assemble([chunk({}, "length"), usage(prompt_tokens=1)])
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
    }
    assert answer["choices"][0]["logprobs"] is None
