"""LM Studio's REST API, v0 and v1: an answer, streamed or whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from mlxproxy import sse
from mlxproxy.dialects import errors
from mlxproxy.dialects.chat_events import deltas_of, reasoning_tokens
from mlxproxy.dialects.form import (
    NOTHING,
    UNTIMED,
    Answer,
    BlockAnswer,
    Call,
    Clock,
    Delta,
    Failed,
    Json,
    Loading,
    MakeId,
    Progress,
    Stretch,
    Timing,
    Usage,
    Waiting,
    json_bytes,
    named_event,
)
from mlxproxy.dialects.stopwatch import Stopwatch
from mlxproxy.errors import ProxyError

_BLOCKS: Final[Mapping[Stretch, str]] = {"text": "message", "reasoning": "reasoning"}
_NO_TOOLS: Final = "The request offered no tools."


class LMStudioAnswer(BlockAnswer):
    """The encoder of one answer of v1.

    Its stream reports the load of the model and the reading of the prompt, and ends with the whole
    answer, even after an error.

    Args:
        model: the model name that it states.
        make_id: makes its id, and those under which its parts are kept.
        clock: returns seconds, to time the answer.
        remember: stores the answer, as a response of OpenAI's Responses.
    """

    def __init__(
        self,
        model: str,
        *,
        make_id: MakeId,
        clock: Clock,
        remember: Callable[[Json], None] | None = None,
    ) -> None:
        super().__init__(model)
        self._make_id = make_id
        self._remember = remember
        self._watch = Stopwatch(clock)
        self._phase: Literal["waiting", "loading", "prompt", "answer"] = "waiting"
        self._loading = ""  # the model that is being loaded
        self._output: list[Json] = []
        self._pieces: list[str] = []
        self._before = b""

    # -- streamed

    def begin(self) -> bytes:
        return _event("chat.start", model_instance_id=self.model)

    def feed(self, delta: Delta) -> bytes:
        if self._phase == "answer" or isinstance(delta, (Loading, Progress)):
            return super().feed(delta)
        return self._enter(delta) + super().feed(delta)

    def on_loading(self, loading: Loading) -> bytes:
        before = b""
        if self._phase == "waiting":
            self._phase, self._loading = "loading", loading.model
            before = _event("model_load.start", model_instance_id=loading.model)
        if loading.fraction is None:
            return before + sse.comment(f"loading {loading.model}")
        progress: Json = {"model_instance_id": loading.model, "progress": loading.fraction}
        return before + _event("model_load.progress", **progress)

    def on_progress(self, progress: Progress) -> bytes:
        begun = self._begun()
        if self._phase != "prompt":
            return begun
        done = min(1.0, progress.processed / (progress.total or 1))
        return begun + _event("prompt_processing.progress", progress=round(done, 4))

    def open(self, stretch: Stretch) -> bytes:
        self._pieces = []
        kind = f"{_BLOCKS[stretch]}.delta"
        self._before = b'event: %b\ndata: {"type":"%b","content":' % ((kind.encode(),) * 2)
        return _event(f"{_BLOCKS[stretch]}.start")

    def piece(self, text: str) -> bytes:
        self._pieces.append(text)
        return b"%b%b}\n\n" % (self._before, json_bytes(text))

    def close(self, stretch: Stretch) -> bytes:
        self._output.append({"type": _BLOCKS[stretch], "content": "".join(self._pieces)})
        return _event(f"{_BLOCKS[stretch]}.end")

    def one_call(self, call: Call) -> bytes:
        metadata = {"type": "invalid_name", "tool_name": call.name, "arguments": call.value}
        failed: Json = {"reason": _NO_TOOLS, "metadata": metadata}
        self._output.append({"type": "invalid_tool_call", **failed})
        return _event("tool_call.failure", **failed)

    def on_failed(self, error: ProxyError) -> bytes:
        closed = self.close_open()
        result = self._result(self._watch.timing(), kept=False)
        return closed + errors.lmstudio_event(error) + _event("chat.end", result=result)

    def finish(self) -> bytes:
        before = self._entered() + self.close_open()
        return before + _event("chat.end", result=self._result(self._watch.timing()))

    def _enter(self, delta: Delta) -> bytes:
        """Return the events that end the phases that are over once this delta has arrived."""
        if isinstance(delta, Waiting):
            return b"" if delta.words else self._begun()
        return b"" if isinstance(delta, Failed) else self._entered()

    def _begun(self) -> bytes:
        """Return the events for the moment when the backend starts to read the prompt."""
        if self._phase in ("prompt", "answer"):
            return b""
        self._watch.begun()
        loaded = b""
        if self._phase == "loading":
            took = round(self.loaded, 3)
            told: Json = {"model_instance_id": self._loading, "load_time_seconds": took}
            loaded = _event("model_load.end", **told)
        self._phase = "prompt"
        return loaded + _event("prompt_processing.start")

    def _entered(self) -> bytes:
        """Return the events for the moment when the answer begins."""
        if self._phase == "answer":
            return b""
        self._watch.token()
        begun = self._begun()
        self._phase = "answer"
        return begun + _event("prompt_processing.end")

    # -- whole

    def whole(self, completion: Mapping[str, Any] = NOTHING, timing: Timing = UNTIMED) -> bytes:
        deltas = deltas_of(completion)
        self._phase = "answer"
        for delta in deltas:
            self.feed(delta)
        self.close_open()
        self.thoughts = reasoning_tokens(deltas)
        return json_bytes(self._result(timing))

    # -- both

    def _result(self, timing: Timing, kept: bool = True) -> Json:
        """Return the whole answer, and store it before anybody can refer to it."""
        usage = self.usage or Usage(0, 0, 0)
        stats: Json = {
            "input_tokens": usage.prompt,
            "total_output_tokens": usage.completion,
            "reasoning_output_tokens": min(self.thoughts, usage.completion),
            "tokens_per_second": _rate(usage, timing),
            "time_to_first_token_seconds": round(timing.waited + timing.prompt, 3),
        }
        if self.loaded:
            stats["model_load_time_seconds"] = round(self.loaded, 3)
        result: Json = {"model_instance_id": self.model, "output": self._output, "stats": stats}
        if kept and self._remember is not None:
            result["response_id"] = self._make_id("resp_")
            self._remember({"id": result["response_id"], "output": self._items()})
        return result

    def _items(self) -> list[Json]:
        """Return the output as items of Responses."""
        items: list[Json] = []
        for part in self._output:
            if part["type"] == "message":
                said = [{"type": "output_text", "text": part["content"]}]
                identity = {"type": "message", "id": self._make_id("msg_")}
                items.append({**identity, "role": "assistant", "content": said})
            elif part["type"] == "reasoning":
                thought = [{"type": "summary_text", "text": part["content"]}]
                identity = {"type": "reasoning", "id": self._make_id("rs_")}
                items.append({**identity, "summary": thought})
        return items


def _event(kind: str, **rest: Any) -> bytes:
    return named_event({"type": kind, **rest})


def _rate(usage: Usage, timing: Timing) -> float:
    return round(usage.completion / timing.generation, 2) if timing.generation > 0 else 0.0


_STOP_REASONS: Final = {
    "stop": "eosFound",
    "length": "maxPredictedTokensReached",
    "tool_calls": "toolCalls",
}


class LMStudioV0Answer(Answer):
    """The encoder of one answer of v0: OpenAI's answer, with timings at its end.

    Args:
        model: the model name that it states.
        kind: the endpoint's kind.
        wants_usage: whether a stream ends with the token counts.
        make_id: makes its id.
        now: returns seconds since 1970.
        clock: returns seconds, to time the answer.

    Attributes:
        about: `model_info` and `runtime`; the caller that knows the model sets them.
    """

    def __init__(
        self,
        model: str,
        kind: Literal["chat", "text"],
        wants_usage: bool,
        make_id: MakeId,
        now: Clock,
        clock: Clock,
    ) -> None:
        super().__init__(model)
        self.about: Mapping[str, Any] = {}
        self._kind = kind
        self._wants_usage = wants_usage
        self._id = make_id("chatcmpl-" if kind == "chat" else "cmpl-")
        self._created = int(now())
        self._watch = Stopwatch(clock)
        self._calls = 0
        self._before: tuple[str, bytes] | None = None  # model, and the start of a chunk for it

    # -- streamed

    def on_text(self, text: str) -> bytes:
        self._watch.token()
        if self._kind == "text":
            return self._chunk(text=text)
        if self._before is None or self._before[0] != self.model:
            line = self._chunk(delta={"role": "assistant", "content": ""})
            self._before = self.model, line.partition(b'"content":""')[0]
        after = b'"content":%b},"finish_reason":null}]}\n\n' % json_bytes(text)
        return self._before[1] + after

    def on_reasoning(self, text: str) -> bytes:
        self._watch.token()
        both = {"reasoning": text, "reasoning_content": text}
        return self._chunk(delta={"role": "assistant", **both})

    def on_call(self, call: Call) -> bytes:
        self._watch.token()
        function = {"name": call.name, "arguments": call.arguments}
        told = {"index": self._calls, "id": call.id, "type": "function", "function": function}
        self._calls += 1
        return self._chunk(delta={"role": "assistant", "tool_calls": [told]})

    def on_progress(self, progress: Progress) -> bytes:
        self._watch.begun()
        return super().on_progress(progress)

    def on_waiting(self, words: str) -> bytes:
        if not words:
            self._watch.begun()
        return super().on_waiting(words)

    def on_failed(self, error: ProxyError) -> bytes:
        return b"data: %b\n\n" % json_bytes(errors.lmstudio(error))

    def finish(self) -> bytes:
        empty: Json = {"text": ""} if self._kind == "text" else {"delta": {}}
        last = self._head([{"index": 0, **empty, "finish_reason": self.stopped_by}])
        ended = _data({**last, **self._took(self._watch.timing())})
        if self._wants_usage:
            ended += _data({**self._head([]), "usage": self._usage()})
        return ended + sse.DONE

    # -- whole

    def whole(self, completion: Mapping[str, Any] = NOTHING, timing: Timing = UNTIMED) -> bytes:
        for delta in deltas_of(completion):
            self.note(delta)
        choices = []
        for choice in completion["choices"]:
            message = choice.get("message", {})
            if "reasoning" in message:
                message = {**message, "reasoning_content": message["reasoning"]}
            choices.append({**choice, "message": message} if message else choice)
        took = self._took(timing)
        head = {**completion, "model": self.model, "choices": choices}
        return json_bytes({**head, "usage": self._usage(), **took})

    # -- both

    def _chunk(self, **said: Any) -> bytes:
        return _data(self._head([{"index": 0, **said, "finish_reason": None}]))

    def _head(self, choices: list[Json]) -> Json:
        kind = "chat.completion.chunk" if self._kind == "chat" else "text_completion"
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.model,
            "choices": choices,
        }

    def _usage(self) -> Json:
        usage = self.usage or Usage(0, 0, 0)
        return {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.completion,
            "total_tokens": usage.prompt + usage.completion,
            "prompt_tokens_details": {"cached_tokens": usage.cached},
        }

    def _took(self, timing: Timing) -> Json:
        usage = self.usage or Usage(0, 0, 0)
        stats = {
            "tokens_per_second": _rate(usage, timing),
            "time_to_first_token": round(timing.waited + timing.prompt, 3),
            "generation_time": round(timing.generation, 3),
            "stop_reason": _STOP_REASONS[self.stopped_by],
        }
        return {"stats": stats, **self.about}


def _data(value: Json) -> bytes:
    return b"data: %b\n\n" % json_bytes(value)
