"""The wire format of `mlx_vlm.server`: its spelling of OpenAI's requests, answers and errors."""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Mapping
from typing import Any, Final

from mlxproxy.backend.connection import parsed
from mlxproxy.backend.protocol import Fields
from mlxproxy.engines.mlx_vlm.completion import Completion
from mlxproxy.engines.mlx_vlm.rules import is_sampled
from mlxproxy.errors import BackendFailed, InternalError, InvalidRequest, ProxyError

log = logging.getLogger("mlxproxy.relay")

# What it is sent, of all that a request may contain: it opens paths, loads models and fetches
# addresses that other fields name.
_SENT: Final = (
    "max_tokens",
    "repetition_penalty",
    "repetition_context_size",
    "presence_penalty",
    "presence_context_size",
    "frequency_penalty",
    "frequency_context_size",
    "logit_bias",
    "tools",
    "tool_choice",
    "enable_thinking",
)
_OTHERS_SENT: Final = (("input",), ("documents", "query"))  # to embed, to rank
_SAID: Final = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
_ROLES: Final = {"function": "tool"}
_SEEDS: Final = 1 << 32
_ROLE: Final = b'"role":"assistant",'
_WHY = "With LOG_LEVEL=DEBUG, the log shows the reason."
_IMAGE = re.compile(
    r"aspect ratio|identify image|load image|image file is truncated|decompression bomb",
    re.IGNORECASE,
)
_TEMPLATE = re.compile(r"[Cc]onversation|\broles?\b|template|jinja|has no attribute")


class MlxVlmWire:
    """The wire of mlx-vlm 0.7.

    Args:
        key: the key that the backend demands.
    """

    # Every event carries `"usage":`, and nothing at its end tells which one counts: all are parsed.
    chunk_end: Final = b"\0"
    count_path: Final = None
    # It writes both spellings of the reasoning itself: nothing is to be added.
    reasoning_mark: Final = b"\0"

    def __init__(self, key: str) -> None:
        self.authorization = f"Bearer {key}"

    def encode(self, fields: Fields, model: str, streamed: bool) -> bytes:
        """Return the body of a request, with nothing in it that the rules do not name.

        Its own defaults are a seed of 0, and the model's sampling; a request that leaves these out
        means another seed each time, and no sampling, as with every engine.
        """
        for names in _OTHERS_SENT:
            if names[0] in fields:
                return json.dumps({"model": model, **{it: fields[it] for it in names}}).encode()
        body: dict[str, Any] = {name: fields[name] for name in _SENT if name in fields}
        body |= {
            "model": model,
            "messages": [_said(message) for message in fields["messages"]],
            "stream": streamed,
            "temperature": fields.get("temperature", 0.0),
            "top_p": fields.get("top_p", 1.0),
            "top_k": fields.get("top_k", 0),
            # Without it, a conversation that is too long is summarized by an extra generation, and
            # every image is decoded twice.
            "context_management": [],
        }
        if is_sampled(fields):
            body["seed"] = fields.get("seed", secrets.randbelow(_SEEDS)) % _SEEDS
        if fields.get("logprobs"):
            body |= {"logprobs": True, "top_logprobs": fields.get("top_logprobs", 0)}
        if streamed:
            body["stream_options"] = {"include_usage": True}
        return json.dumps(body).encode()

    def streams_all(self, fields: Fields) -> bool:
        """Return whether a stream carries the whole answer; only chats have one, and theirs does,
        even log probabilities."""
        return "messages" in fields

    def model_field(self, name: str) -> bytes:
        """Return `"model":"…"` as pydantic writes it: without spaces, in UTF-8."""
        return b'"model":' + json.dumps(name, ensure_ascii=False).encode()

    def with_both_spellings(self, data: bytes) -> bytes:
        """Return what it is given: the backend writes both."""
        return data

    def without_role(self, data: bytes) -> bytes:
        """Return an event without its role, whose quotes would be escaped inside a JSON string."""
        return data.replace(_ROLE, b"")

    def completion(self) -> Completion:
        """Return an empty completion, which puts a whole answer together."""
        return Completion(self.failure)

    def usage_of(self, answer: bytes) -> Mapping[str, Any]:
        """Return the token counts in a whole answer.

        Raises:
            BackendFailed: it is not an answer.
        """
        try:
            usage = parsed(answer)["usage"]
        except (ValueError, KeyError, TypeError):
            usage = None
        if not isinstance(usage, dict):
            raise BackendFailed("The backend sent an answer in an unknown format. Try again.")
        return usage

    def prompt_tokens(self, data: bytes) -> int | None:
        """Return None: a stream tells the length of the prompt only at its end."""
        return None

    def count_in(self, answer: bytes) -> int | None:
        """Return None: it does not count the tokens of a prompt."""

    def failure(self, event: bytes) -> ProxyError | None:
        """Return the error in an event: `{"error": "<text>"}`, with which an answer ends."""
        if not event.startswith(b'data: {"error"'):
            return None
        log.debug("the backend ended an answer: %r", event[:2000])  # may quote a prompt
        try:
            text = str(parsed(event[6:])["error"])
        except (ValueError, KeyError, TypeError):
            text = ""
        return _refusal(text) or BackendFailed(
            f"The backend failed in the middle of this answer. Try again. {_WHY}"
        )

    def error(self, status: int, body: bytes) -> ProxyError:
        """Return the error of the backend in the contract's shape, without its own words: they may
        contain paths, and what the request said."""
        try:
            text = parsed(body)["detail"]
        except (ValueError, KeyError, TypeError):
            text = None
        log.debug("the backend answered %d: %r", status, body[:2000])  # may quote a prompt
        if status == 422:
            return InvalidRequest(f"The backend rejected this request. {_WHY}")
        if not isinstance(text, str):
            return BackendFailed(f"The backend failed to answer this request. {_WHY}")
        if (refusal := _refusal(text)) is not None:
            return refusal
        if status == 400:
            return InvalidRequest(f"The backend rejected this request. {_WHY}")
        return InternalError(f"The backend could not answer this request. {_WHY}")


def _refusal(text: str) -> InvalidRequest | None:
    """Return the error for a message of the backend that is about the request itself."""
    if _IMAGE.search(text):
        return InvalidRequest(
            "The model cannot read an image of this request: it is damaged, too large or too "
            "narrow. Send another one.",
            param="messages",
        )
    if _TEMPLATE.search(text):
        return InvalidRequest("The model's chat template rejected these messages.")
    return None


def _said(message: Mapping[str, Any]) -> dict[str, Any]:
    said = {name: message[name] for name in _SAID if name in message}
    return {**said, "role": _ROLES.get(said["role"], said["role"])}
