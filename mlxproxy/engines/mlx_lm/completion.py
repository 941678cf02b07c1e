"""A whole answer, built from a stream's events as `mlx_lm.server` itself would have sent it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from mlxproxy.backend.connection import parsed
from mlxproxy.errors import BackendFailed
from mlxproxy.sse import DONE

_DONE_LINE = DONE.rstrip()
_COMMON = ("id", "system_fingerprint", "object", "model", "created")  # in the backend's order


class Completion:
    """The part of a stream that has arrived so far.

    Each event is parsed when it arrives: parsing all events of a long answer at its end would hold
    up every other stream.

    Attributes:
        usage: the backend's token counts, once they have arrived.
    """

    def __init__(self) -> None:
        self.usage: dict[str, Any] = {}
        self._first: dict[str, Any] = {}
        self._last: dict[str, Any] = {}  # choice
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def add(self, data: bytes) -> None:
        """Take one or several whole events.

        Raises:
            BackendFailed: they are not events of the backend.
        """
        lines = data.split(b"\n")
        events = b",".join(
            [line[6:] for line in lines if line.startswith(b"data: ") and line != _DONE_LINE]
        )
        with _known_shape():
            for event in parsed(b"[%b]" % events):  # one call for all is four times as fast
                self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        self._first = self._first or event
        if "usage" in event:
            self.usage = event["usage"]
        for choice in event["choices"]:
            self._last = choice
            if "text" in choice:
                self._content.append(choice["text"])
                continue
            delta = choice["delta"]
            self._content.append(delta.get("content") or "")
            self._reasoning.append(delta.get("reasoning") or "")
            self._calls += delta.get("tool_calls") or ()

    def answer(self) -> bytes:
        """Return the JSON of the whole answer.

        Raises:
            BackendFailed: the events do not form an answer.
        """
        with _known_shape():
            answer = {key: self._first[key] for key in _COMMON}
            choice = {"index": 0, "finish_reason": self._last["finish_reason"]}
            if answer["object"] == "text_completion":
                choice["text"] = "".join(self._content)
            else:
                answer["object"] = "chat.completion"
                choice |= {"message": self._message(), "logprobs": None}
            (usage,) = _objects(self.usage)
            return json.dumps({**answer, "choices": [choice], "usage": usage}).encode()

    def _message(self) -> dict[str, Any]:
        content, reasoning = "".join(self._content), "".join(self._reasoning)
        # The schema of a chat has `refusal` in each message, and `logprobs` beside it.
        message: dict[str, Any] = {"role": "assistant", "content": content or None, "refusal": None}
        if reasoning:
            message["reasoning"] = reasoning
        if self._calls:  # a stream numbers its calls, a whole answer does not
            message["tool_calls"] = [
                {key: value for key, value in call.items() if key != "index"}
                for call in self._calls
            ]
        return message


def usage_of(answer: bytes) -> dict[str, Any]:
    """Return the token counts in a whole answer of the backend.

    Raises:
        BackendFailed: it is not an answer.
    """
    with _known_shape():
        value = parsed(answer)
        return _objects(value["choices"][0], value["usage"])[1]


def _objects(*values: Any) -> tuple[dict[str, Any], ...]:
    """Return the values if each is an object that is not empty."""
    if not all(isinstance(value, dict) and value for value in values):
        raise TypeError
    return values


@contextlib.contextmanager
def _known_shape() -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise BackendFailed(
            "The backend sent an answer in an unknown format. Try again; if the same request "
            "fails again, see the backend's log."
        ) from None
