"""The form between chat and the other dialects: translated requests, and the parts of an answer.

A request of another dialect is translated into a chat request, which the guard checks, and an
:class:`Answer`, which encodes what the backend sends in that dialect. Nothing here reads a socket
or a clock by itself: identifiers and times come from functions that are passed in.
"""

from __future__ import annotations

import abc
import json
import re
import uuid
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final, Literal, NamedTuple, TypeAlias

from mlxproxy import sse
from mlxproxy.errors import InvalidRequest, ProxyError

Json: TypeAlias = dict[str, Any]
MakeId: TypeAlias = Callable[[str], str]
"""Return a new identifier that begins with the given prefix."""
Clock: TypeAlias = Callable[[], float]


def random_id(prefix: str) -> str:
    """Return a unique identifier that cannot be guessed."""
    return prefix + uuid.uuid4().hex


# -- the parts of an answer


class Text(NamedTuple):
    """A piece of what the model says."""

    text: str


class Reasoning(NamedTuple):
    """A piece of what the model thinks before it speaks."""

    text: str


class Call(NamedTuple):
    """A whole call of a tool."""

    id: str
    name: str
    arguments: str
    """The JSON text of an object."""
    value: Json
    """The same, parsed."""


class Finish(NamedTuple):
    """The reason why the model stopped."""

    reason: str


class Usage(NamedTuple):
    """The backend's token counts."""

    prompt: int
    """Tokens of the prompt, those read from the cache among them."""
    completion: int
    cached: int


class Progress(NamedTuple):
    """The part of the prompt that has been read, in tokens."""

    processed: int
    total: int


class Loading(NamedTuple):
    """A model is being loaded for this request."""

    model: str
    fraction: float | None = None
    """How much of it has been loaded, where that is known."""


class Waiting(NamedTuple):
    """Nothing has arrived yet, and the client must not give up."""

    words: str
    """What is waited for; nothing once the backend has begun with the request."""


class Failed(NamedTuple):
    """The answer ends here, for this reason."""

    error: ProxyError


Delta: TypeAlias = Text | Reasoning | Call | Finish | Usage | Progress | Loading | Waiting | Failed


class Timing(NamedTuple):
    """The time that the phases of an answer took, in seconds."""

    waited: float = 0.0
    """For a place, a load among it."""
    prompt: float = 0.0
    """From the place to the first token."""
    generation: float = 0.0
    """From the first token to the last."""


UNTIMED: Final = Timing()


# -- a translated request


class Translated(NamedTuple):
    """A request of another dialect."""

    chat: Json | None
    """The chat request, for the guard. None asks for no answer: the model is only to be loaded (or
    unloaded), and :data:`NOTHING` is the answer."""
    answer: Answer
    stream: bool
    names: Mapping[str, str]
    """Fields of the chat request that the dialect calls otherwise; see :func:`in_their_words`."""
    temperature: float
    """What the dialect promises where neither the request nor the model's files say."""
    optional: frozenset[str] = frozenset()
    """Fields of the chat request to leave out for a model that cannot do it, instead of refusing
    the request."""
    kind: Literal["chat", "text"] = "chat"
    """Which of the backend's endpoints it is for."""


COUNTED: Final[Mapping[str, Any]] = {"stream_options": {"include_usage": True}}
"""What each chat request asks for: the count of tokens at the end."""
NOTHING: Final[Mapping[str, Any]] = {
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant"}}],
    "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
}


def in_their_words(error: InvalidRequest, names: Mapping[str, str]) -> InvalidRequest:
    """Return the guard's error with the field's name as the client wrote it."""
    field = error.param
    name, rest = field or "", ""
    for end, character in enumerate(name):
        if character in ".[":
            name, rest = name[:end], name[end:]
            break
    if name not in names:
        return error
    theirs = names[name] + rest
    message = error.message
    if field is not None and message.startswith(field):
        message = theirs + message[len(field) :]
    return InvalidRequest(message, param=theirs, **error.details)


# -- an answer in the dialect's words


class Answer(abc.ABC):
    """The encoder of one answer, either piece by piece (begin, feed, finish) or as a whole.

    Nothing follows a :class:`Failed` delta, not even :meth:`finish`.

    Attributes:
        model: the model name that the answer states. It is the requested one until the caller that
            knows which model answers sets it, before the first delta of that model.
        loaded: seconds that the answer waited for a load, set by the same caller.
    """

    headers: ClassVar[Mapping[str, str]] = sse.HEADERS
    """Those of a streamed answer."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.loaded = 0.0
        self.usage: Usage | None = None
        self.thoughts = 0
        """Events of reasoning: nearly always one token each, and the backend does not count."""
        self._finish = "stop"
        self._called = False

    def begin(self) -> bytes:
        """Return what can be sent before anything has arrived from the backend."""
        return b""

    def feed(self, delta: Delta) -> bytes:
        """Return what a delta adds to the stream, which may be nothing."""
        if isinstance(delta, Text):
            return self.on_text(delta.text)
        self.note(delta)
        if isinstance(delta, Reasoning):
            return self.on_reasoning(delta.text)
        if isinstance(delta, Call):
            return self.on_call(delta)
        if isinstance(delta, Progress):
            return self.on_progress(delta)
        if isinstance(delta, Loading):
            return self.on_loading(delta)
        if isinstance(delta, Waiting):
            return self.on_waiting(delta.words)
        if isinstance(delta, Failed):
            return self.on_failed(delta.error)
        return b""

    def note(self, delta: Delta) -> None:
        """Remember what the end of the answer states: a whole answer is not fed delta by delta."""
        if isinstance(delta, Reasoning):
            self.thoughts += 1
        elif isinstance(delta, Call):
            self._called = True
        elif isinstance(delta, Finish):
            self._finish = delta.reason
        elif isinstance(delta, Usage):
            self.usage = delta

    @property
    def stopped_by(self) -> Literal["stop", "length", "tool_calls"]:
        """The reason why the model stopped; a call only if the client has received one.

        The backend drops a call that it cannot read, but reports it as the reason nevertheless.
        """
        if self._finish == "length":
            return "length"
        return "tool_calls" if self._called else "stop"

    @abc.abstractmethod
    def on_text(self, text: str) -> bytes: ...

    @abc.abstractmethod
    def on_reasoning(self, text: str) -> bytes: ...

    @abc.abstractmethod
    def on_call(self, call: Call) -> bytes: ...

    def on_progress(self, progress: Progress) -> bytes:
        """Return what tells the client how much of the prompt has been read."""
        return self.on_waiting(f"prompt {progress.processed}/{progress.total}")

    def on_loading(self, loading: Loading) -> bytes:
        """Return what tells the client that a model is being loaded."""
        return self.on_waiting(f"loading {loading.model}")

    def on_waiting(self, words: str) -> bytes:
        """Return what keeps the client waiting."""
        return sse.comment(words)

    @abc.abstractmethod
    def on_failed(self, error: ProxyError) -> bytes:
        """Return the last bytes of an answer that has failed."""

    @abc.abstractmethod
    def finish(self) -> bytes:
        """Return the last bytes of a whole answer."""

    @abc.abstractmethod
    def whole(self, completion: Mapping[str, Any], timing: Timing = UNTIMED) -> bytes:
        """Return the JSON of an answer that was not streamed.

        Args:
            completion: the backend's answer, or :data:`NOTHING`.
            timing: the time that it took; only some dialects state it.
        """


Stretch: TypeAlias = Literal["reasoning", "text"]


class BlockAnswer(Answer):
    """An answer in blocks of one kind each, of which one is open at a time.

    A block is opened by the first piece of its kind that is not white space: the white space that
    models put between their reasoning and a call is not a block of its own.
    """

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self._open: Stretch | None = None
        self._held = ""
        self._held_for: Stretch | None = None

    def on_text(self, text: str) -> bytes:
        if self._open == "text":
            return self.piece(text)
        return self._turn_to("text", text)

    def on_reasoning(self, text: str) -> bytes:
        if self._open == "reasoning":
            return self.piece(text)
        return self._turn_to("reasoning", text)

    def on_call(self, call: Call) -> bytes:
        return self.close_open() + self.one_call(call)

    def close_open(self) -> bytes:
        """Return the end of the open block, if there is one."""
        self._held, self._held_for = "", None
        if self._open is None:
            return b""
        stretch, self._open = self._open, None
        return self.close(stretch)

    def _turn_to(self, stretch: Stretch, text: str) -> bytes:
        if self._held_for != stretch:
            self._held, self._held_for = "", stretch
        self._held += text
        if not text.strip():
            return b""
        text = self._held
        before = self.close_open()
        self._open = stretch
        return before + self.open(stretch) + self.piece(text)

    @abc.abstractmethod
    def open(self, stretch: Stretch) -> bytes:
        """Return the start of a block."""

    @abc.abstractmethod
    def piece(self, text: str) -> bytes:
        """Return a piece of the open block. This is the only method that runs for every token."""

    @abc.abstractmethod
    def close(self, stretch: Stretch) -> bytes:
        """Return the end of a block."""

    @abc.abstractmethod
    def one_call(self, call: Call) -> bytes:
        """Return a call, from its start to its end. No block may be open."""


# -- JSON as it is sent

_encode = json.JSONEncoder(separators=(",", ":")).encode


def json_bytes(value: Any) -> bytes:
    """Return the JSON of a value, on one line and in ASCII."""
    return _encode(value).encode()


_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def client_id(call: Call, prefix: str, make_id: MakeId, taken: set[str]) -> str:
    """Return the id of a call that the client gets, and sends back with the result.

    The backend's id is mostly a UUID, which gets the dialect's prefix. An id in a model's own
    format is kept, since its template may want to see it again. An id that clients reject, or that
    another call of the answer has, is replaced.

    Args:
        taken: the ids given so far; this one is added.
    """
    try:
        given = prefix + uuid.UUID(call.id).hex
    except ValueError:
        given = call.id
    if given in taken or not _ID.fullmatch(given):
        given = make_id(prefix)
    taken.add(given)
    return given


def named_event(data: Json) -> bytes:
    """Return a server-sent event whose name is the `type` in its data."""
    return b"event: %b\ndata: %b\n\n" % (data["type"].encode(), json_bytes(data))
