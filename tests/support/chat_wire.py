"""What the backend sends for a chat, and the other dialects' version of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from mlxproxy import sse
from mlxproxy.dialects.chat_events import TranslatedStream
from mlxproxy.dialects.form import Answer, MakeId

HEAD = {
    "id": "chatcmpl-1",
    "system_fingerprint": "0.32.2",
    "object": "chat.completion.chunk",
    "model": "/models/nc/alpha",
    "created": 1764000000,
}
UUID = "0a1b2c3d-4e5f-4a6b-8c7d-9e0f1a2b3c4d"
PNG = (  # one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)
TOOL_ID = UUID.replace("-", "")


def chunk(finish: str | None = None, **delta: Any) -> bytes:
    """Return an event of `mlx_lm.server`: absent keys are absent."""
    choice = {"index": 0, "finish_reason": finish, "delta": {"role": "assistant", **delta}}
    return f"data: {json.dumps({**HEAD, 'choices': [choice]})}\n\n".encode()


def text(words: str) -> bytes:
    return chunk(content=words)


def reasoning(words: str) -> bytes:
    return chunk(reasoning=words)


def call(name: str, arguments: Any, index: int = 0, identity: str = UUID) -> dict[str, Any]:
    """Return a whole tool call, as the backend sends it."""
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments)
    function = {"name": name, "arguments": arguments}
    return {"function": function, "type": "function", "id": identity, "index": index}


def calls(*each: dict[str, Any]) -> bytes:
    return chunk(tool_calls=list(each))


def end(reason: str = "stop", prompt: int = 30, completion: int = 7, cached: int = 10) -> bytes:
    """Return the last three events of a stream whose usage was requested."""
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    last = {**HEAD, "object": "chat.completion", "choices": [], "usage": usage}
    return chunk(finish=reason) + f"data: {json.dumps(last)}\n\n".encode() + sse.DONE


def whole(finish: str = "stop", **message: Any) -> dict[str, Any]:
    """Return a whole answer, as the relay returns it."""
    usage = {
        "prompt_tokens": 30,
        "completion_tokens": 7,
        "total_tokens": 37,
        "prompt_tokens_details": {"cached_tokens": 10},
    }
    message = {"role": "assistant", "content": None, **message}
    choice = {"index": 0, "finish_reason": finish, "message": message}
    return {**HEAD, "object": "chat.completion", "choices": [choice], "usage": usage}


def relayed(*items: bytes) -> Generator[bytes, None, None]:
    """Yield a relayed stream: an item that carries the head, then the events."""
    yield sse.comment()
    yield from items


def sent(answer: Answer, *items: bytes) -> bytes:
    """Return the stream that a client gets for the backend's stream."""
    return b"".join(TranslatedStream(relayed(*items), answer))


def in_pieces(data: bytes, cuts: Iterable[int]) -> Iterator[bytes]:
    """Yield the bytes as a socket might deliver them and the relay pass them on: whole events."""
    events = sse.Events()
    places = [0, *sorted(cuts), len(data)]
    for start, stop in itertools.pairwise(places):
        if passed := events.take(data[start:stop]):
            yield passed


def numbered() -> MakeId:
    """Return a function that makes predictable identifiers: `msg_1`, `toolu_2`."""
    numbers = itertools.count(1)
    return lambda prefix: f"{prefix}{next(numbers)}"


def events(data: bytes) -> list[dict[str, Any]]:
    """Return the data of the named events in a stream; each event must contain its own name."""
    found = []
    for block in data.decode().split("\n\n"):
        if not block or block.startswith(":"):
            continue
        name, _, line = block.partition("\n")
        assert line.startswith("data: "), block
        parsed = json.loads(line[6:])
        assert name == f"event: {parsed['type']}"
        found.append(parsed)
    return found
