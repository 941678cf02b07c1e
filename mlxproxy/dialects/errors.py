"""The proxy's errors in each dialect's shape: instead of an answer, and inside its stream."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple

from mlxproxy import errors, sse
from mlxproxy.dialects.form import Json, json_bytes, named_event
from mlxproxy.errors import BackendFailed, InternalError, ProxyError

Dialect = Literal["openai", "anthropic", "ollama", "lmstudio"]


class Rendered(NamedTuple):
    """An error as a response."""

    status: int
    body: Json
    headers: Mapping[str, str]


def dialect_of(path: str) -> Dialect:
    """Return the dialect to which a path belongs, whether or not that path is served."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return "anthropic"
    if path.startswith(("/api/v0/", "/api/v1/")):
        return "lmstudio"
    return "ollama" if path.startswith("/api/") else "openai"


def rendered(error: ProxyError, dialect: Dialect, request_id: str) -> Rendered:
    """Return the response for an error.

    Its headers are those that only some dialects have; all others are the same for every dialect.
    """
    headers = {"x-should-retry": "false"} if error.code in _HOPELESS else {}
    if dialect == "anthropic":
        headers["request-id"] = request_id
        return Rendered(error.status, anthropic(error, request_id), headers)
    if dialect == "ollama":
        return Rendered(error.status, ollama(error), headers)
    if dialect == "lmstudio":
        return Rendered(error.status, lmstudio(error), headers)
    return Rendered(error.status, error.body(), headers)


# A retry cannot succeed until somebody intervenes. The SDKs of OpenAI and Anthropic obey the header
# before they look at the status; by status, they would retry 409, 429 and everything from 500 on.
_HOPELESS: Final = frozenset(
    {
        "ambiguous_model",
        "insufficient_memory",
        "insufficient_storage",
        "load_cancelled",
        "load_failed",
        "models_root_unavailable",
        "no_model_loaded",
        "peer_loop",
        "port_in_use",
    }
)


# -- Anthropic

_ANTHROPIC_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic(error: ProxyError, request_id: str | None = None) -> Json:
    """Return Anthropic's error object."""
    kind = _ANTHROPIC_TYPES.get(error.status)
    if kind is None:
        kind = "api_error" if error.status >= 500 else "invalid_request_error"
    message = error.message
    if sizes := too_long(error):  # the sentence that makes Claude Code shorten the conversation
        message = "prompt is too long: {} tokens > {} maximum".format(*sizes)
    body: Json = {"type": "error", "error": {"type": kind, "message": message}}
    if request_id is not None:
        body["request_id"] = request_id
    return body


def anthropic_event(error: ProxyError, request_id: str | None = None) -> bytes:
    """Return the last event of a stream."""
    return named_event(anthropic(error, request_id))


# -- Responses


def responses(error: ProxyError) -> Json:
    """Return the error of a failed response.

    Depending on the code, Codex shortens the conversation, waits or gives up; if it does not know
    the code, it assumes a temporary fault and tries five times.
    """
    if too_long(error):
        code = "context_length_exceeded"
    elif error.status == 429:
        code = "rate_limit_exceeded"
    elif error.status < 500:
        code = "invalid_prompt"
    elif error.status == 503:
        code = "server_is_overloaded"
    else:
        code = "server_error"
    return {"code": code, "message": error.message}


# -- Ollama


def ollama(error: ProxyError) -> Json:
    """Return Ollama's error object."""
    return {"error": error.message}


def ollama_line(error: ProxyError) -> bytes:
    """Return the last line of a stream."""
    return json_bytes(ollama(error)) + b"\n"


# -- LM Studio


def lmstudio(error: ProxyError) -> Json:
    """Return LM Studio's error object."""
    if error.code == "model_not_found":
        kind = "model_not_found"
    elif error.code == "not_implemented":
        kind = "not_implemented"
    else:
        kind = "invalid_request" if error.status < 500 else "internal_error"
    body = {"type": kind, "message": error.message, "code": error.code}
    if error.param is not None:
        body["param"] = error.param
    return {"error": body}


def lmstudio_event(error: ProxyError) -> bytes:
    """Return the event that reports the error; `chat.end` follows it."""
    return named_event({"type": "error", **lmstudio(error)})


# -- in a stream whose events come from another machine


def in_stream(error: ProxyError, path: str, request_id: str) -> bytes:
    """Return the last event of a stream of the API that this path belongs to."""
    dialect = dialect_of(path)
    if dialect == "anthropic":
        return anthropic_event(error, request_id)
    if dialect == "ollama":
        return ollama_line(error)
    if path == "/api/v1/chat":
        stats = ("input_tokens", "total_output_tokens", "reasoning_output_tokens")
        result: Json = {"output": [], "stats": dict.fromkeys(stats, 0)}
        return lmstudio_event(error) + named_event({"type": "chat.end", "result": result})
    if path == "/v1/responses":
        return named_event({"type": "error", **responses(error), "param": error.param})
    return sse.event(error.body())


# -- reading an error from its body

# The backend's sentence, the guard's, and the one that replaces both, which OpenAI's clients know.
_TOO_LONG = (
    re.compile(r"has (?:about )?(?P<size>\d+) (?P<unit>tokens), and .* context is (?P<most>\d+)"),
    re.compile(r"(?P<size>\d+) (?P<unit>characters) cannot fit into .* context of (?P<most>\d+)"),
    re.compile(
        r"maximum context length is (?P<most>\d+) tokens, but the prompt has (?:about )?"
        r"(?P<size>\d+) (?P<unit>tokens|characters)"
    ),
)
CHARACTERS_PER_TOKEN = 4  # a rule of thumb


def too_long(error: ProxyError) -> tuple[int, int] | None:
    """Return the token count of a prompt that does not fit, and the count that would fit."""
    for sentence in _TOO_LONG:
        if found := sentence.search(error.message):
            size = int(found["size"])
            if found["unit"] == "characters":
                size //= CHARACTERS_PER_TOKEN
            return size, int(found["most"])
    return None


def from_body(error: Any) -> ProxyError:
    """Return the error from the object that a stream carries as its last event."""
    if not isinstance(error, dict):
        return BackendFailed("The backend ended the answer with an error. Try again.")
    kind = _KINDS.get(error.get("code", ""), InternalError)
    details = {key: value for key, value in error.items() if key not in _COMMON}
    return kind(str(error.get("message", "")), param=error.get("param"), **details)


_COMMON = frozenset({"message", "type", "param", "code"})


def _all(kind: type[ProxyError]) -> Iterator[type[ProxyError]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from _all(narrower)


_KINDS: Final = {
    kind.code: kind for kind in _all(errors.ProxyError) if kind.__module__ == errors.__name__
}
