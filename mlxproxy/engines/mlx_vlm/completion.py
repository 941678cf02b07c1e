"""A whole answer, built from a stream's events."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from mlxproxy.backend.connection import parsed
from mlxproxy.errors import BackendFailed, ProxyError

_COMMON: Final = ("id", "created", "model")


class Completion:
    """The part of a stream that has arrived so far.

    Args:
        failure: returns the error in an event, if there is one.

    Attributes:
        usage: the backend's token counts, once they have arrived.
    """

    def __init__(self, failure: Callable[[bytes], ProxyError | None]) -> None:
        self.usage: dict[str, Any] = {}
        self._failure = failure
        self._first: dict[str, Any] = {}
        self._finish: str | None = None
        self._texts: dict[str, list[str]] = {"content": [], "reasoning": []}
        self._calls: dict[int, dict[str, Any]] = {}
        self._logprobs: list[Any] = []

    def add(self, data: bytes) -> None:
        """Take one or several whole events.

        Raises:
            ProxyError: the backend tells that it has failed, or these are not its events.
        """
        for line in data.split(b"\n"):
            if not line.startswith(b"data: {"):
                continue
            if (error := self._failure(line)) is not None:
                raise error
            try:
                self._take(parsed(line[6:]))
            except (ValueError, KeyError, IndexError, TypeError, AttributeError):
                raise _unknown() from None

    def _take(self, event: dict[str, Any]) -> None:
        self._first = self._first or event
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            self._finish = choice.get("finish_reason") or self._finish
            delta = choice["delta"]
            for name, texts in self._texts.items():
                texts.append(delta.get(name) or "")
            for piece in delta.get("tool_calls") or ():
                self._add_call(piece)
            self._logprobs += (choice.get("logprobs") or {}).get("content") or ()

    def _add_call(self, piece: dict[str, Any]) -> None:
        """Take a piece of a tool call: the first has its name, the others go on with its arguments.

        A stream numbers its calls, a whole answer does not.
        """
        call = self._calls.setdefault(
            piece["index"], {"type": "function", "function": {"name": "", "arguments": ""}}
        )
        if piece.get("id"):
            call["id"] = piece["id"]
        function = piece.get("function") or {}
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""

    def answer(self) -> bytes:
        """Return the JSON of the whole answer.

        Raises:
            BackendFailed: the events do not form an answer.
        """
        if not self._first or not self.usage or self._finish is None:
            raise _unknown()
        content = "".join(self._texts["content"])
        message: dict[str, Any] = {"role": "assistant", "content": content or None, "refusal": None}
        if reasoning := "".join(self._texts["reasoning"]):
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if self._calls:
            message["tool_calls"] = [call for _, call in sorted(self._calls.items())]
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": self._finish,
            "message": message,
            "logprobs": {"content": self._logprobs} if self._logprobs else None,
        }
        answer = {
            **{name: self._first.get(name) for name in _COMMON},
            "object": "chat.completion",
            "choices": [choice],
            "usage": self.usage,
        }
        return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()


def _unknown() -> BackendFailed:
    return BackendFailed(
        "The backend sent an answer in an unknown format. Try again; if the same request fails "
        "again, see the backend's log."
    )
