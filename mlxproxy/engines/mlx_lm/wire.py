"""The wire format of `mlx_lm.server`: its spelling of OpenAI's requests, answers and errors."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from mlxproxy.backend.connection import parsed
from mlxproxy.backend.protocol import Fields
from mlxproxy.engines.mlx_lm.completion import Completion, usage_of
from mlxproxy.engines.mlx_lm.unmet import refusal
from mlxproxy.errors import (
    BackendFailed,
    ContextLengthExceeded,
    InternalError,
    InvalidRequest,
    ProxyError,
)

log = logging.getLogger("mlxproxy.relay")

COUNT_PATH: Final = "/mlxproxy/count"  # as in inside/count.py
_ROLE: Final = b'{"role": "assistant", '
_ROLE_ALONE: Final = b'{"role": "assistant"}'
_REASONING: Final = b', "reasoning": "'
_BACKSLASH: Final = 0x5C
_REASONING_FIELD = re.compile(rb', "reasoning": ("[^"\\]*(?:\\.[^"\\]*)*")')
_PROMPT_TOKENS = re.compile(rb": keepalive \d+/(\d{1,18})\n")

# The backend's messages may contain paths of this machine, or a client's own words, in any form:
# only sentences of a known kind are passed on.
_TEMPLATE = re.compile(
    r"[Cc]onversation|\broles?\b|[Uu]ser query|template|has no attribute|Only '?text"
)
_EMPTY = "the prompt has no tokens"
_TOO_LONG = re.compile(
    r"the prompt has ((?:about )?\d+ tokens), and the model's context is (\d{1,18})"
)
_VALIDATION = re.compile(r"[a-z_]+ must be [A-Za-z0-9 ,.()']{1,100}")
_AGAIN = "Try again; if the same request fails again, see the backend's log."
_WHY = "With LOG_LEVEL=DEBUG, the log shows the reason."  # its own log does not
_PLAIN = re.compile(r"[A-Za-z][A-Za-z ,'/-]{0,120}\.?")


class MlxLmWire:
    """The wire of mlx-lm 0.31 and 0.32.

    Args:
        has: whether the process has a feature of `inside/`; with `progress`, the keepalives of a
            stream count the cached tokens of the prompt; with `count`, it answers how many tokens
            a prompt has.
    """

    # `choices` comes last; only in the event with the usage does anything follow it.
    chunk_end: Final = b"]}\n\n"
    reasoning_mark: Final = _REASONING
    authorization: Final = ""

    def __init__(self, has: Callable[[str], bool]) -> None:
        self._has = has
        self._counts_cached = has("progress")
        self.count_path = COUNT_PATH if has("count") else None

    def encode(self, fields: Fields, model: str, streamed: bool) -> bytes:
        """Return the body of a request.

        Raises:
            InvalidRequest: the process cannot answer it as demanded.
        """
        if (error := refusal(fields, self._has)) is not None:
            raise error
        body = {**fields, "model": model, "stream": streamed}
        if streamed:
            body["stream_options"] = {"include_usage": True}
        return json.dumps(body).encode()

    def streams_all(self, fields: Fields) -> bool:
        """Return whether a stream carries the whole answer: all but log probabilities."""
        return not (
            "continuations" in fields or fields.get("logprobs") or fields.get("top_logprobs", 0) > 0
        )

    def model_field(self, name: str) -> bytes:
        """Return `"model": "…"` as Python's `json` writes it: quotes in a string are escaped."""
        return b'"model": ' + json.dumps(name).encode()

    def with_both_spellings(self, data: bytes) -> bytes:
        """Return events, or a whole answer, with `reasoning_content` next to `reasoning`.

        They are not parsed: inside a JSON string there is a backslash before each quotation mark,
        so this one begins a field.
        """
        found = data.find(_REASONING)
        if found < 0:
            return data
        start = found + len(_REASONING)
        end = data.find(b'"', start) + 1
        # The usual case: one event, of a text without quotation marks, which is nearly at its end.
        if data.find(b", ", end) < 0 < end and data[end - 2] != _BACKSLASH:
            return b'%b, "reasoning_content": "%b%b' % (data[:end], data[start:end], data[end:])
        if b'"reasoning_content": ' in data:
            return data
        return _REASONING_FIELD.sub(rb', "reasoning": \1, "reasoning_content": \1', data)

    def without_role(self, data: bytes) -> bytes:
        """Return an event without its role, whose quotes would be escaped inside a JSON string."""
        # (From its end, where the delta is.)
        before, role, after = data.rpartition(_ROLE)
        return before + b"{" + after if role else data.replace(_ROLE_ALONE, b"{}", 1)

    def completion(self) -> Completion:
        """Return an empty completion, which puts a whole answer together."""
        return Completion()

    def usage_of(self, answer: bytes) -> Mapping[str, Any]:
        """Return the token counts in a whole answer."""
        return usage_of(answer)

    def prompt_tokens(self, data: bytes) -> int | None:
        """Return the length of the prompt from a keepalive."""
        match = _PROMPT_TOKENS.match(data) if self._counts_cached else None
        return int(match[1]) if match else None

    def count_in(self, answer: bytes) -> int | None:
        """Return the number of tokens in the answer to a question for them."""
        try:
            tokens = parsed(answer)["tokens"]
        except (ValueError, KeyError, TypeError):
            return None
        return tokens if type(tokens) is int and tokens >= 0 else None

    def failure(self, event: bytes) -> None:
        """Return None: it ends a failed stream by closing the connection."""

    def error(self, status: int, body: bytes) -> ProxyError:
        """Return the error of the backend in the contract's shape.

        It answers 404 to anything that goes wrong in a generation, with a text that may contain
        paths.
        """
        param = None
        try:
            answer = parsed(body)
            text, param = answer["error"], answer.get("param")
        except (ValueError, KeyError, TypeError, AttributeError):
            text = None
        if not isinstance(text, str):
            return BackendFailed(f"The backend failed without giving a reason. {_AGAIN}")
        if "generation thread died" in text:
            return BackendFailed("The backend can no longer generate text. Try again.")
        log.debug("the backend answered %d: %s", status, text)  # may quote a prompt
        if status == 400 and isinstance(param, str):  # the words are those of inside/grammar.py
            return InvalidRequest(text, param=param)
        if status == 400:
            return InvalidRequest(_told("The backend rejected this request", text, _VALIDATION))
        if status == 404 and text == _EMPTY:
            return InvalidRequest("The prompt has no tokens. Send some text.")
        if status == 404 and (found := _TOO_LONG.fullmatch(text)):
            return ContextLengthExceeded.of(found[1], int(found[2]))
        if status == 404 and _TEMPLATE.search(text):
            what = "The model's chat template rejected these messages"
            return InvalidRequest(_told(what, text, _PLAIN))
        if status == 404:
            return InternalError(f"The backend could not answer this request. {_WHY}")
        return BackendFailed(f"The backend failed to answer this request. {_WHY}")


def _told(what: str, text: str, known: re.Pattern[str]) -> str:
    """Return a sentence that quotes the backend's words if they are of the known kind."""
    return f"{what}: {text.rstrip('.')}." if known.fullmatch(text) else f"{what}."
