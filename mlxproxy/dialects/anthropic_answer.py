"""Anthropic's Messages: an answer, streamed or whole.

Its readers are strict: each block is started, filled with its own kind of delta and stopped before
the next one starts; the token counts at the end are the true ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mlxproxy.dialects import errors
from mlxproxy.dialects.chat_events import deltas_of, reasoning_tokens
from mlxproxy.dialects.form import (
    NOTHING,
    UNTIMED,
    BlockAnswer,
    Call,
    Json,
    MakeId,
    Progress,
    Reasoning,
    Stretch,
    Text,
    Timing,
    Usage,
    client_id,
    json_bytes,
    named_event,
    random_id,
)
from mlxproxy.errors import ProxyError

_STOP_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_EMPTY: Final[Mapping[Stretch, Json]] = {
    "text": {"type": "text", "text": ""},
    # Thoughts are not signed here, but the field must be a string.
    "reasoning": {"type": "thinking", "thinking": "", "signature": ""},
}
# What belongs to Anthropic's own service. Its schema has these fields in every whole message.
_NOT_HERE: Final[Json] = {
    "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
    "inference_geo": None,
    "server_tool_use": None,
    "service_tier": "standard",
}
_PIECE: Final[Mapping[Stretch, bytes]] = {
    "text": b'{"type":"text_delta","text":',
    "reasoning": b'{"type":"thinking_delta","thinking":',
}


class AnthropicAnswer(BlockAnswer):
    """The encoder of one message.

    Args:
        model: the model name that the answer states.
        make_id: makes the ids of the message, and of calls whose own ids cannot be used.
        estimate: tokens of the prompt, estimated from the request.

    Attributes:
        request_id: the request's id, for an error in the stream.
    """

    def __init__(self, model: str, make_id: MakeId = random_id, estimate: int = 1) -> None:
        super().__init__(model)
        self.request_id: str | None = None
        self._make_id = make_id
        self._estimate = estimate
        self._started = False
        self._index = -1
        self._before = b""  # the bytes that precede the text in a delta of the open block
        self._call_ids: set[str] = set()

    # -- streamed. Nothing is sent at the beginning: the first event states the prompt's length.

    def on_progress(self, progress: Progress) -> bytes:
        return self._start(progress.total) + super().on_progress(progress)

    def open(self, stretch: Stretch) -> bytes:
        before = self._start(self._estimate) + self._block(_EMPTY[stretch])
        self._before = (
            b"event: content_block_delta\ndata: "
            b'{"type":"content_block_delta","index":%d,"delta":%b' % (self._index, _PIECE[stretch])
        )
        return before

    def piece(self, text: str) -> bytes:
        return b"%b%b}}\n\n" % (self._before, json_bytes(text))

    def close(self, stretch: Stretch) -> bytes:
        signed = b""
        if stretch == "reasoning":
            signed = self._delta({"type": "signature_delta", "signature": ""})
        return signed + named_event({"type": "content_block_stop", "index": self._index})

    def one_call(self, call: Call) -> bytes:
        block = {"type": "tool_use", "id": self._call_id(call), "name": call.name, "input": {}}
        return b"".join(
            (
                self._start(self._estimate),
                self._block(block),
                self._delta({"type": "input_json_delta", "partial_json": call.arguments}),
                named_event({"type": "content_block_stop", "index": self._index}),
            )
        )

    def on_failed(self, error: ProxyError) -> bytes:
        return errors.anthropic_event(error, self.request_id)

    def finish(self) -> bytes:
        delta = {"stop_reason": _STOP_REASONS[self.stopped_by], "stop_sequence": None}
        usage = _usage(self.usage or Usage(self._estimate, 0, 0))
        return b"".join(
            (
                self._start(self._estimate),
                self.close_open(),
                named_event({"type": "message_delta", "delta": delta, "usage": usage}),
                named_event({"type": "message_stop"}),
            )
        )

    def _start(self, prompt: int) -> bytes:
        """Return the start of the message, once."""
        if self._started:
            return b""
        self._started = True
        return named_event({"type": "message_start", "message": self._message(Usage(prompt, 0, 0))})

    def _block(self, block: Json) -> bytes:
        self._index += 1
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return named_event(start)

    def _delta(self, delta: Json) -> bytes:
        return named_event({"type": "content_block_delta", "index": self._index, "delta": delta})

    # -- whole

    def whole(self, completion: Mapping[str, Any] = NOTHING, timing: Timing = UNTIMED) -> bytes:
        content: list[Json] = []
        deltas = deltas_of(completion)
        for delta in deltas:
            self.note(delta)
            if isinstance(delta, Text) and delta.text.strip():
                content.append({**_EMPTY["text"], "text": delta.text, "citations": None})
            elif isinstance(delta, Reasoning) and delta.text.strip():
                content.append({**_EMPTY["reasoning"], "thinking": delta.text})
            elif isinstance(delta, Call):
                used = {"id": self._call_id(delta), "name": delta.name, "input": delta.value}
                content.append({"type": "tool_use", **used, "caller": {"type": "direct"}})
        message = self._message(self.usage or Usage(self._estimate, 0, 0))
        thinking = {"thinking_tokens": reasoning_tokens(deltas)}
        message["usage"] |= {**_NOT_HERE, "output_tokens_details": thinking}
        stop_reason = _STOP_REASONS[self.stopped_by]
        rest = {"stop_reason": stop_reason, "stop_details": None, "container": None}
        return json_bytes({**message, "content": content, **rest})

    # -- both

    def _message(self, usage: Usage) -> Json:
        return {
            "id": self._make_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,  # the backend does not tell which one it was
            "usage": _usage(usage),
        }

    def _call_id(self, call: Call) -> str:
        return client_id(call, "toolu_", self._make_id, self._call_ids)


def _usage(usage: Usage) -> Json:
    """Return the token counts, with the cached part of the prompt counted separately."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "output_tokens": usage.completion,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
    }
