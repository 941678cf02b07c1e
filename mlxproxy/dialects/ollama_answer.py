"""Ollama's chat and generate: an answer, streamed or whole.

A stream consists of lines of JSON and nothing else: clients parse every line, and there are no
comments.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, ClassVar, Final, Literal, TypeAlias

from mlxproxy import sse
from mlxproxy.dialects import errors
from mlxproxy.dialects.chat_events import deltas_of
from mlxproxy.dialects.form import (
    NOTHING,
    UNTIMED,
    Answer,
    Call,
    Clock,
    Json,
    MakeId,
    Progress,
    Reasoning,
    Text,
    Timing,
    Usage,
    client_id,
    json_bytes,
)
from mlxproxy.dialects.stopwatch import Stopwatch
from mlxproxy.errors import ProxyError

Only: TypeAlias = Literal["load", "unload"] | None
"""What a request without a question asks for; None for one with a question."""
Kind: TypeAlias = Literal["chat", "generate"]

_MEDIA_TYPE: Final = "application/x-ndjson"
_NANOSECONDS: Final = 1_000_000_000


class OllamaAnswer(Answer):
    """The encoder of one answer.

    Args:
        model: the model name that it states.
        kind: the endpoint's kind.
        make_id: makes the ids of calls whose own ids cannot be used.
        now: returns seconds since 1970.
        clock: returns seconds, to time the answer.
        only: the load or unload that was requested instead of an answer, if any.
    """

    headers: ClassVar[Mapping[str, str]] = {**sse.HEADERS, "Content-Type": _MEDIA_TYPE}

    def __init__(
        self,
        model: str,
        kind: Kind,
        make_id: MakeId,
        now: Clock,
        clock: Clock,
        only: Only = None,
    ) -> None:
        super().__init__(model)
        self._kind = kind
        self._make_id = make_id
        self._created = timestamp(now())
        self._watch = Stopwatch(clock)
        self._only = only
        self._call_ids: set[str] = set()
        self._before: tuple[str, bytes] | None = None  # model, and the start of a line for it

    # -- streamed

    def on_text(self, text: str) -> bytes:
        self._watch.token()
        if self._before is None or self._before[0] != self.model:
            line = json_bytes(self._line("")).rpartition(b'""')[0]
            self._before = self.model, line
        after = b'},"done":false}\n' if self._kind == "chat" else b',"done":false}\n'
        return b"%b%b%b" % (self._before[1], json_bytes(text), after)

    def on_reasoning(self, text: str) -> bytes:
        self._watch.token()
        return self._encoded(self._line("", thinking=text))

    def on_call(self, call: Call) -> bytes:
        self._watch.token()
        return self._encoded(self._line("", tool_calls=[self._call(call)]))

    def on_progress(self, progress: Progress) -> bytes:
        self._watch.begun()
        return self.on_waiting("prompt")

    def on_waiting(self, words: str) -> bytes:
        """Return a line of the answer with no text in it."""
        if not words:
            self._watch.begun()
        return self._encoded(self._line(""))

    def on_failed(self, error: ProxyError) -> bytes:
        return errors.ollama_line(error)

    def finish(self) -> bytes:
        if self._only is not None:
            return self._nothing() + b"\n"
        return json_bytes({**self._line(""), **self._end(self._watch.timing())}) + b"\n"

    # -- whole

    def whole(self, completion: Mapping[str, Any] = NOTHING, timing: Timing = UNTIMED) -> bytes:
        if self._only is not None:
            return self._nothing()
        text, thinking = "", ""
        calls = []
        for delta in deltas_of(completion):
            self.note(delta)
            if isinstance(delta, Text):
                text += delta.text
            elif isinstance(delta, Reasoning):
                thinking += delta.text
            elif isinstance(delta, Call):
                calls.append(self._call(delta))
        line = self._line(text, thinking, calls)
        return json_bytes({**line, **self._end(timing)})

    # -- both

    def _nothing(self) -> bytes:
        """Return the answer to a request for a load or an unload."""
        return json_bytes({**self._line(""), "done": True, "done_reason": self._only})

    def _line(self, text: str, thinking: str = "", tool_calls: list[Json] | None = None) -> Json:
        line: Json = {"model": self.model, "created_at": self._created}
        said = {"thinking": thinking} if thinking else {}
        if self._kind == "generate":
            return {**line, **said, "response": text}
        message: Json = {"role": "assistant", **said}
        if tool_calls:
            message["tool_calls"] = tool_calls
        return {**line, "message": {**message, "content": text}}

    def _encoded(self, line: Json) -> bytes:
        return json_bytes({**line, "done": False}) + b"\n"

    def _call(self, call: Call) -> Json:
        identity = client_id(call, "call_", self._make_id, self._call_ids)
        function = {"index": len(self._call_ids) - 1, "name": call.name, "arguments": call.value}
        return {"id": identity, "function": function}

    def _end(self, timing: Timing) -> Json:
        """Return the fields of the last line. Ollama has no reason of its own for tool calls."""
        usage = self.usage or Usage(0, 0, 0)
        reason = "length" if self.stopped_by == "length" else "stop"
        return {
            "done": True,
            "done_reason": reason,
            "total_duration": _nanoseconds(sum(timing)),
            "load_duration": _nanoseconds(self.loaded),
            "prompt_eval_count": usage.prompt,
            "prompt_eval_duration": _nanoseconds(timing.prompt),
            "eval_count": usage.completion,
            "eval_duration": _nanoseconds(timing.generation),
        }


def timestamp(seconds: float) -> str:
    """Return a time as Go formats it."""
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _nanoseconds(seconds: float) -> int:
    """Return whole nanoseconds, at least one: clients divide by them."""
    return max(1, round(seconds * _NANOSECONDS))
