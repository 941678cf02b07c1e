"""What the relay makes of bytes: whole events, and whole answers out of a stream's events."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, SupportsIndex
from unittest.mock import MagicMock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxproxy import sse
from mlxproxy.engines.mlx_lm.completion import Completion
from mlxproxy.errors import BackendFailed
from mlxproxy.relay import relay
from mlxproxy.sse import BLANK, DONE, EVENT_LIMIT

HEAD = {"id": "x", "system_fingerprint": "f", "model": "m", "created": 1}


def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": finish, "delta": {"role": "assistant", **delta}}
    return {**HEAD, "object": "chat.completion.chunk", "choices": [choice]}


def usage(**counts: int) -> dict[str, Any]:
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


# -- whole events


def lease_on(pieces: Iterable[bytes]) -> Any:
    """A lease of a backend from whose connection these pieces come; then it closes."""
    received = iter(pieces)
    lease = MagicMock()
    lease.connect.return_value.status = 200
    lease.connect.return_value.read = lambda: next(received, b"")
    lease.fault.side_effect = lambda error: error
    lease.disconnect.gone = False
    return lease


def streamed(pieces: Iterable[bytes]) -> tuple[bytes, str]:
    """What a client gets of a stream that comes in these pieces, and how it ended."""
    stats = relay.AnswerStats()
    items = list(relay.stream(lease_on(pieces), "/", lambda lease: b"", stats))
    assert items[:2] == [b"", relay.OPENING]
    return b"".join(items[2:]), stats.outcome


def whole(pieces: Iterable[bytes]) -> Any:
    return json.loads(
        relay.whole(lease_on(pieces), "/", lambda lease: b"", relay.AnswerStats(), False)
    )


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
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": None}
