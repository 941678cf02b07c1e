"""The backend's answer to a chat, as deltas.

Each event is parsed only once: an answer has thousands of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from mlxproxy.dialects import errors
from mlxproxy.dialects.form import (
    Answer,
    Call,
    Delta,
    Failed,
    Finish,
    Loading,
    Progress,
    Reasoning,
    Text,
    Usage,
    Waiting,
)
from mlxproxy.errors import BackendFailed


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_decode = json.JSONDecoder().raw_decode
_arguments = json.JSONDecoder(parse_constant=_no_constant).decode  # clients reject NaN

_PROMPT = re.compile(r": [a-z]+ (\d{1,18})/(\d{1,18})")  # how much has been read, of how much
_LOADING = re.compile(r": loading (.+) \d+s(?: (\d{1,3})%)?")
_UNKNOWN = (
    "The backend sent an answer in an unknown format. Try again; if the same request fails again, "
    "see the backend's log."
)
# The exceptions that reading a value of an unexpected shape raises.
_WRONG_SHAPE = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)


class Relayed(Protocol):
    """A stream of whole events and comments. An error is its last event."""

    def __iter__(self) -> Iterator[bytes]: ...

    def close(self) -> None:
        """End the answer, however far it has come."""


class TranslatedStream:
    """A relayed stream in the words of another dialect.

    Args:
        stream: the relayed stream; closing this one closes it, too.
        answer: encodes it.
    """

    def __init__(self, stream: Relayed, answer: Answer) -> None:
        self._stream = stream
        self._body = _translated(stream, answer)

    def __iter__(self) -> Iterator[bytes]:
        return self._body

    def close(self) -> None:
        """End the answer, however far it has come, even if it has not begun."""
        self._body.close()
        self._stream.close()


def _translated(stream: Relayed, answer: Answer) -> Generator[bytes, None, None]:
    read, feed = ChatEvents().read, answer.feed
    sent = answer.begin()
    for data in stream:
        try:
            deltas = read(data)
        except BackendFailed as error:
            deltas = [Failed(error)]
        for delta in deltas:
            sent += feed(delta)
            if isinstance(delta, Failed):
                yield sent
                return
        if sent:
            yield sent
        sent = b""
    yield sent + answer.finish()


def deltas_of(completion: Mapping[str, Any]) -> list[Delta]:
    """Return the deltas of a whole answer.

    Raises:
        BackendFailed: it is not an answer.
    """
    events = ChatEvents()
    deltas: list[Delta] = []
    try:
        events.take(completion, deltas)
    except _WRONG_SHAPE:
        raise BackendFailed(_UNKNOWN) from None
    return deltas


def reasoning_tokens(deltas: Sequence[Delta]) -> int:
    """Return about how many tokens of a whole answer were reasoning.

    The backend does not tell, so their share of the characters is used.
    """
    reasoning = sum(len(delta.text) for delta in deltas if isinstance(delta, Reasoning))
    rest = sum(len(delta.text) for delta in deltas if isinstance(delta, Text))
    rest += sum(len(delta.arguments) for delta in deltas if isinstance(delta, Call))
    tokens = sum(delta.completion for delta in deltas if isinstance(delta, Usage))
    return round(tokens * reasoning / ((reasoning + rest) or 1))


class ChatEvents:
    """The part of one answer that has arrived so far."""

    def __init__(self) -> None:
        self._call: Mapping[str, Any] | None = None  # the call that arrives in pieces
        self._pieces: list[str] = []  # of its arguments

    def read(self, data: bytes) -> list[Delta]:
        """Return the deltas in one or several whole events.

        Raises:
            BackendFailed: they are not events of the backend.
        """
        deltas: list[Delta] = []
        try:
            for event in data.decode().split("\n\n"):
                if event.startswith("data: {"):
                    self.take(_decode(event, 6)[0], deltas)
                elif event.startswith(":"):
                    deltas.append(_comment(event))
        except _WRONG_SHAPE:
            raise BackendFailed(_UNKNOWN) from None
        return deltas

    def take(self, event: Mapping[str, Any], deltas: list[Delta]) -> None:
        """Append the deltas of one event to a list. A whole answer is taken as one event."""
        if choices := event.get("choices"):
            choice = choices[0]
            delta = choice.get("delta") or choice.get("message") or {}
            reasoning = delta.get("reasoning") or delta.get("reasoning_content")
            text = delta.get("content") or choice.get("text")
            if reasoning or text:
                self._end_call(deltas)
                # The order in which a model produces them, even if all are in one event.
                if reasoning:
                    deltas.append(Reasoning(_string(reasoning)))
                if text:
                    deltas.append(Text(_string(text)))
            for piece in delta.get("tool_calls") or ():
                self._take_call(piece, deltas)
            if reason := choice.get("finish_reason"):
                self._end_call(deltas)
                deltas.append(Finish(_string(reason)))
        if usage := event.get("usage"):
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
            deltas.append(Usage(_count(prompt), _count(completion), _count(cached)))
        if error := event.get("error"):
            deltas.append(Failed(errors.from_body(error)))

    def _take_call(self, piece: Mapping[str, Any], deltas: list[Delta]) -> None:
        """Take a call: whole from `mlx_lm.server`; from others in pieces, a name and then text."""
        function = piece["function"]
        arguments = function.get("arguments") or ""
        if name := function.get("name"):
            self._end_call(deltas)
            whole = _call(piece.get("id"), name, arguments)
            if whole is not None and arguments:
                deltas.append(whole)
                return
            self._call, self._pieces = piece, []
        if self._call is not None:
            self._pieces.append(_string(arguments))

    def _end_call(self, deltas: list[Delta]) -> None:
        """End the call that arrives in pieces.

        An incomplete call is dropped: no client could run it.
        """
        if self._call is not None:
            first, self._call = self._call, None
            name = first["function"]["name"]
            whole = _call(first.get("id"), name, "".join(self._pieces))
            if whole is not None:
                deltas.append(whole)


def _call(call_id: Any, name: Any, arguments: Any) -> Call | None:
    """Return the call if its arguments are an object, else None."""
    try:
        value = _arguments(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    return Call(str(call_id or ""), _string(name), arguments if value else "{}", value)


def _comment(line: str) -> Delta:
    if found := _PROMPT.fullmatch(line):
        return Progress(int(found[1]), int(found[2]))
    if found := _LOADING.fullmatch(line):
        return Loading(found[1], None if found[2] is None else int(found[2]) / 100)
    return Waiting(line[1:].strip())


def _string(value: Any) -> str:
    if type(value) is not str:
        raise TypeError
    return value


def _count(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0
