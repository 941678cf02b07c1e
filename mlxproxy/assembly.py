"""A whole answer out of a stream's events, as `mlx_lm.server` itself would have sent it."""

from __future__ import annotations

import json
from typing import Any

from mlxproxy.errors import BackendFailed

DONE = b"data: [DONE]\n\n"
_COMMON = ("id", "system_fingerprint", "object", "model", "created")  # in the backend's order


class Assembly:
    """What has come of a stream so far, each event taken when it comes: parsed all at the end, a
    long answer's events would hold up every other stream.

    Attributes:
        complete: whether the stream has come to its end.
        usage: the backend's count of tokens, once it has come.
    """

    def __init__(self) -> None:
        self.complete = False
        self.usage: dict[str, Any] = {}
        self._first: dict[str, Any] = {}
        self._finish: str | None = None
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def add(self, data: bytes) -> None:
        """Takes one or several whole events.

        Raises:
            BackendFailed: they are none of the backend's.
        """
        if data.endswith(DONE):
            self.complete = True
            data = data[: -len(DONE)]
        events = b",".join(line[6:] for line in data.split(b"\n") if line.startswith(b"data: "))
        try:
            for event in json.loads(b"[%b]" % events):  # one call for all is four times as quick
                self._take(event)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise BackendFailed("The backend sent events of a shape that is not known.") from None

    def _take(self, event: dict[str, Any]) -> None:
        self._first = self._first or event
        if not event["choices"]:
            self.usage = event["usage"]
            return
        chunk = event["choices"][0]
        self._finish = chunk["finish_reason"]
        if "text" in chunk:
            self._content.append(chunk["text"])
            return
        delta = chunk["delta"]
        if content := delta.get("content"):
            self._content.append(content)
        if reasoning := delta.get("reasoning"):
            self._reasoning.append(reasoning)
        self._calls += delta.get("tool_calls") or ()

    def answer(self) -> bytes:
        """The JSON of the whole answer.

        Raises:
            BackendFailed: there was no event at all.
        """
        first, content = self._first, "".join(self._content)
        choice: dict[str, Any] = {"index": 0, "finish_reason": self._finish}
        try:
            answer = {key: first[key] for key in _COMMON}
        except KeyError:
            raise BackendFailed("The backend sent events of a shape that is not known.") from None
        if answer["object"] == "text_completion":
            choice["text"] = content
        else:
            answer["object"] = "chat.completion"
            message: dict[str, Any] = {"role": "assistant", "content": content or None}
            if self._reasoning:
                message["reasoning"] = "".join(self._reasoning)
            if self._calls:  # a stream numbers its calls, a whole answer does not
                message["tool_calls"] = [
                    {key: value for key, value in call.items() if key != "index"}
                    for call in self._calls
                ]
            choice["message"] = message
        return json.dumps({**answer, "choices": [choice], "usage": self.usage}).encode()
