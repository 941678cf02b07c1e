"""OpenAI's Responses: an answer, streamed or whole.

Codex reads a stream by `output_item.added` and `.done` and gives up without `completed`; OpenAI's
SDK compares the ids of an item wherever it occurs. So each item is made once, and is the same in
its own events and in the answer at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from mlxproxy.dialects import errors
from mlxproxy.dialects.chat_events import deltas_of, reasoning_tokens
from mlxproxy.dialects.form import (
    NOTHING,
    UNTIMED,
    BlockAnswer,
    Call,
    Clock,
    Json,
    MakeId,
    Stretch,
    Timing,
    client_id,
    json_bytes,
    named_event,
)
from mlxproxy.dialects.responses_tools import Tools
from mlxproxy.errors import ProxyError


class ResponsesAnswer(BlockAnswer):
    """The encoder of one response.

    Args:
        model: the model name that it states.
        echo: the fields of the request that it repeats.
        tools: the tools of the request.
        make_id: makes the ids of the response, of its items, and of calls whose own ids cannot be
            used.
        now: returns seconds since 1970.
        replayable: whether thoughts carry what a client that stores them sends back.
        remember: stores the whole response.
    """

    def __init__(
        self,
        model: str,
        *,
        echo: Json,
        tools: Tools,
        make_id: MakeId,
        now: Clock,
        replayable: bool = False,
        remember: Callable[[Json], None] | None = None,
    ) -> None:
        super().__init__(model)
        self._echo = echo
        self._tools = tools
        self._make_id = make_id
        self._now = now
        self._replayable = replayable
        self._remember = remember
        self._id = make_id("resp_")
        self._created = int(now())
        self._sequence = 0
        self._output: list[Json] = []
        self._item_id = ""
        self._place: Json = {}  # of the open part
        self._pieces: list[str] = []
        self._before = self._after = b""  # a delta's event around its number
        self._waiting: tuple[bytes, bytes] | None = None
        self._call_ids: set[str] = set()

    # -- streamed

    def begin(self) -> bytes:
        created = self._event("response.created", response=self._response("in_progress"))
        return created + self.on_waiting("")

    def on_waiting(self, words: str) -> bytes:
        """Return an event, since Codex does not accept comments as a sign of life.

        It repeats less of the request than the other events, in which the tools alone may be
        100 kB.
        """
        if self._waiting is None:
            shorter = {**self._response("in_progress"), "instructions": None, "tools": []}
            self._waiting = _template("response.in_progress", {"response": shorter})
        before, after = self._waiting
        return b"%b%d%b" % (before, self._next(), after)

    def open(self, stretch: Stretch) -> bytes:
        self._pieces = []
        place: Json = {"output_index": len(self._output)}
        if stretch == "text":
            self._item_id = self._make_id("msg_")
            item = _message(self._item_id, "in_progress", [])
            self._place = {"item_id": self._item_id, **place, "content_index": 0}
            part_added, part = "response.content_part.added", _output_text("")
            template = _template("response.output_text.delta", {**self._place, "logprobs": []})
        else:
            self._item_id = self._make_id("rs_")
            item = {"type": "reasoning", "id": self._item_id, "summary": []}
            self._place = {"item_id": self._item_id, **place, "summary_index": 0}
            part_added, part = "response.reasoning_summary_part.added", _summary("")
            template = _template("response.reasoning_summary_text.delta", self._place)
        self._before, self._after = template[0], template[1].removesuffix(_END)
        added = self._event("response.output_item.added", **place, item=item)
        return added + self._event(part_added, **self._place, part=part)

    def piece(self, text: str) -> bytes:
        self._pieces.append(text)
        before, after = self._before, self._after
        return b'%b%d%b,"delta":%b}\n\n' % (before, self._next(), after, json_bytes(text))

    def close(self, stretch: Stretch) -> bytes:
        text, place = "".join(self._pieces), self._place
        if stretch == "text":
            # Only the end can be cut off, and nothing follows it: all items before it are whole.
            status = "incomplete" if self.stopped_by == "length" else "completed"
            part = _output_text(text)
            item = _message(self._item_id, status, [part])
            done = self._event("response.output_text.done", **place, text=text, logprobs=[])
            done += self._event("response.content_part.done", **place, part=part)
        else:
            part = _summary(text)
            item = {"type": "reasoning", "id": self._item_id, "summary": [part]}
            if self._replayable:
                item["encrypted_content"] = text
            done = self._event("response.reasoning_summary_text.done", **place, text=text)
            done += self._event("response.reasoning_summary_part.done", **place, part=part)
        return done + self._done(item)

    def one_call(self, call: Call) -> bytes:
        origin = self._tools.origin(call.name)
        custom = origin.kind == "custom"
        field = "input" if custom else "arguments"
        given = _free_text(call) if custom else call.arguments
        item: Json = {
            "type": "custom_tool_call" if custom else "function_call",
            "id": self._make_id("ctc_" if custom else "fc_"),
            "call_id": client_id(call, "call_", self._make_id, self._call_ids),
            "name": origin.name,
            field: given,
            "status": "completed",
        }
        if origin.namespace is not None:
            item["namespace"] = origin.namespace
        index = len(self._output)
        place: Json = {"item_id": item["id"], "output_index": index}
        kind = f"response.{'custom_tool_call_input' if custom else 'function_call_arguments'}"
        begun = {**item, field: "", "status": "in_progress"}
        return b"".join(
            (
                self._event("response.output_item.added", output_index=index, item=begun),
                self._event(f"{kind}.delta", **place, delta=given),
                self._event(f"{kind}.done", **place, name=origin.name, **{field: given}),
                self._done(item),
            )
        )

    def on_failed(self, error: ProxyError) -> bytes:
        response = {**self._response("failed"), "error": errors.responses(error)}
        return self._event("response.failed", response=response)

    def finish(self) -> bytes:
        closed = self.close_open()
        response = self._end()
        return closed + self._event(f"response.{response['status']}", response=response)

    # -- whole

    def whole(self, completion: Mapping[str, Any] = NOTHING, timing: Timing = UNTIMED) -> bytes:
        deltas = deltas_of(completion)
        for delta in deltas:
            self.feed(delta)
        self.close_open()
        self.thoughts = reasoning_tokens(deltas)
        return json_bytes(self._end())

    # -- both

    def _end(self) -> Json:
        """Return the whole response, and store it before anybody can refer to it."""
        if self.stopped_by == "length":
            response = self._response("incomplete")
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response = self._response("completed")
            response["completed_at"] = int(self._now())
        if self._remember is not None:
            self._remember(response)
        return response

    def _response(self, status: str) -> Json:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.model,
            "output": list(self._output),
            **self._echo,
            "usage": self._usage(),
        }

    def _usage(self) -> Json | None:
        usage = self.usage
        if usage is None:
            return None
        return {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": min(self.thoughts, usage.completion)},
            "total_tokens": usage.prompt + usage.completion,
        }

    def _done(self, item: Json) -> bytes:
        index = len(self._output)
        self._output.append(item)
        return self._event("response.output_item.done", output_index=index, item=item)

    def _event(self, kind: str, **rest: Any) -> bytes:
        return named_event({"type": kind, "sequence_number": self._next(), **rest})

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence - 1


_END: Final = b"}\n\n"


def _template(kind: str, rest: Json) -> tuple[bytes, bytes]:
    """Return the bytes before and after the sequence number of an event."""
    before, _, after = named_event({"type": kind, "sequence_number": 0, **rest}).partition(b":0,")
    return before + b":", b"," + after


def _message(identity: str, status: str, content: list[Json]) -> Json:
    kind = {"type": "message", "id": identity, "status": status}
    return {**kind, "role": "assistant", "content": content}


def _output_text(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _summary(text: str) -> Json:
    return {"type": "summary_text", "text": text}


def _free_text(call: Call) -> str:
    """Return the text for a tool that takes text, whether or not the model followed the schema."""
    values = list(call.value.values())
    given = call.value.get("input", values[0] if len(values) == 1 else None)
    return given if isinstance(given, str) else call.arguments
