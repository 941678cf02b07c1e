"""What a request may say: nothing that hurts the backend's other clients or reaches elsewhere.

One wrong value ends the backend's generation thread, and with it every answer in flight; others
make it load, fetch or compute for everybody's account. The tables below say for each field what
passes and why; whatever is in no table passes as long as it is plain JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

from mlxproxy.errors import InvalidRequest
from mlxproxy.guard import shapes
from mlxproxy.guard.shapes import DROP, Limits, Shape

__all__ = ["RULES", "Kind", "Limits", "Rule", "check", "is_exclusive", "require_text"]

Kind = Literal["chat", "text"]

MAX_DEPTH = 64  # of lists and objects; templates and parsers recurse, some frames a level
MIN_INTEGER, MAX_INTEGER = -(1 << 63), (1 << 64) - 1
CHARACTERS_PER_TOKEN = 16  # far above what any real text has: a longer prompt cannot fit
CONTEXT_SIZE = shapes.integer(0, 1 << 20)


class Rule(NamedTuple):
    """What one field may be, and what happens to the backend without the rule."""

    shape: Shape
    why: str


# "kills" is the generation thread, and so every answer in flight, until the backend is restarted.
# "compiles": a new value is compiled into a new kernel while all streams stand still (1 to 3 s on
# a CPU), hence the rounding: there are only so many values.
_COMMON: Final = {
    "model": Rule(shapes.string, "the caller replaces it; here it only has to be a name"),
    "adapters": Rule(shapes.allowed(lambda it: it.adapters), "a path that is read, and loaded"),
    "draft_model": Rule(shapes.allowed(lambda it: it.draft_models), "evicts the loaded model"),
    "num_draft_tokens": Rule(shapes.integer(0, 64), "each step drafts so many"),
    "stream": Rule(shapes.boolean, "400 for null"),
    "stream_options": Rule(shapes.stream_options, "{} ends a whole stream without [DONE]"),
    "max_tokens": Rule(shapes.max_tokens, "2**31 holds a place for days"),
    "max_completion_tokens": Rule(shapes.max_tokens, "wins over max_tokens"),
    "temperature": Rule(shapes.number(0, 2, 2), "compiles"),
    "top_p": Rule(shapes.top_p, "compiles; 0 is off, and 1e-9 leaves no token at all"),
    "top_k": Rule(shapes.top_k, "kills from the vocabulary's size on"),
    "min_p": Rule(shapes.number(0, 1, 3), "compiles; NaN kills"),
    "xtc_probability": Rule(shapes.number(0, 1, 2), "compiles; an integer gives 400"),
    "xtc_threshold": Rule(shapes.number(0, 0.5, 2), "compiles; above 0.5 kills"),
    "repetition_penalty": Rule(shapes.number(0, 10, 2), "huge kills, tiny divides into NaN"),
    "repetition_context_size": Rule(CONTEXT_SIZE, "2**63 kills"),
    "presence_penalty": Rule(shapes.number(-2, 2, 3), "huge kills"),
    "presence_context_size": Rule(CONTEXT_SIZE, "2**63 kills"),
    "frequency_penalty": Rule(shapes.number(-2, 2, 3), "huge kills"),
    "frequency_context_size": Rule(CONTEXT_SIZE, "2**63 kills"),
    "logit_bias": Rule(shapes.logit_bias, "an id beyond the vocabulary writes into foreign memory"),
    "seed": Rule(shapes.seed, "beyond 64 bits or below 0: no reply at all"),
    "stop": Rule(shapes.stop, "5, [null], a lone surrogate kill; 100 kB stop all for a second"),
    "top_logprobs": Rule(shapes.top_logprobs, "true kills, 12 gives 400"),
    "n": Rule(
        shapes.only(1, "the backend gives one answer per request; send several requests."),
        "ignored",
    ),
    "response_format": Rule(shapes.response_format, "ignored"),
    "chat_template_kwargs": Rule(shapes.chat_template_kwargs, "a chat_template runs; some kill"),
    "enable_thinking": Rule(shapes.boolean, "becomes a template argument"),
    "reasoning_effort": Rule(shapes.one_of(shapes.EFFORTS), "becomes a template argument"),
}
RULES: Final[Mapping[Kind, dict[str, Rule]]] = {
    "chat": {
        **_COMMON,
        "messages": Rule(shapes.messages, "what templates choke on; images from anywhere"),
        "logprobs": Rule(shapes.boolean, "400 for null and numbers"),
        "tools": Rule(shapes.tools, "an odd schema cuts the answer off when the model calls"),
        "tool_choice": Rule(shapes.tool_choice, "ignored"),
        "role_mapping": Rule(shapes.role_mapping, "repeated for each message"),
    },
    "text": {
        **_COMMON,
        "prompt": Rule(shapes.prompt, 'an empty one and ["a"] kill'),
        "messages": Rule(shapes.drop, "belongs to the other endpoint: nothing has checked it"),
        "logprobs": Rule(shapes.text_logprobs, "400 for null and numbers"),
        "best_of": Rule(
            shapes.only(1, "the backend gives one answer per request; leave it out."), "ignored"
        ),
        "echo": Rule(shapes.only(False, "the backend cannot repeat the prompt."), "ignored"),
        "suffix": Rule(shapes.only("", "the backend only continues a text."), "ignored"),
    },
}
REQUIRED: Final[Mapping[Kind, str]] = {"chat": "messages", "text": "prompt"}
PROMPT: Final = frozenset({"messages", "tools", "prompt"})


def check(body: object, kind: Kind, limits: Limits) -> dict[str, Any]:
    """A new request body that the backend takes and survives.

    Checking a checked request again changes nothing, except by limits that were not known before.

    Args:
        body: the request's JSON, as parsed; it is left as it is.
        kind: of which endpoint.
        limits: what the model and the settings allow, as far as it is known.

    Raises:
        InvalidRequest: what the backend cannot take, with the field as `param`.
    """
    if not isinstance(body, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    rules = RULES[kind]
    request: dict[str, Any] = {}
    length = 0
    for name, value in body.items():
        if value is None:  # asks for the default
            continue
        if rule := rules.get(name):
            value = rule.shape(name, value, limits)
            if value is DROP:
                continue
        characters = _characters(name, value)
        length += characters if name in PROMPT else 0
        request[name] = value
    if REQUIRED[kind] not in request:
        raise InvalidRequest(f"{REQUIRED[kind]} is missing.", param=REQUIRED[kind])
    if limits.max_context is not None:
        length -= sum(map(len, shapes.images(request.get("messages", ()))))
        if length > limits.max_context * CHARACTERS_PER_TOKEN:
            raise InvalidRequest(
                f"{length} characters cannot fit into the model's context of "
                f"{limits.max_context} tokens. Send less.",
                param=REQUIRED[kind],
            )
    _combine(request, limits)
    return request


def require_text(body: Mapping[str, Any]) -> None:
    """Return if all text of a body can be written, shown and looked up.

    For bodies that :func:`check` does not see.

    Raises:
        InvalidRequest: lone surrogates, NUL, NaN, numbers beyond 64 bits or deep nesting, with the
            field as `param`.
    """
    for name, value in body.items():
        _characters(name, value)
        if _has_nul(value):
            raise InvalidRequest(f"{name} contains a NUL character.", param=name)


def is_exclusive(request: Mapping[str, Any], own_seeds: bool = False) -> bool:
    """Return whether the backend answers this checked request alone: it waits until all others
    have their answers, and lets nobody else begin meanwhile.

    Args:
        own_seeds: whether a seeded request has a generator of its own (`inside/sampling.py`).
    """
    alone = {"adapters", "draft_model"} if own_seeds else {"adapters", "draft_model", "seed"}
    return not request.keys().isdisjoint(alone) or bool(shapes.images(request.get("messages", ())))


def _combine(request: dict[str, Any], limits: Limits) -> None:
    """What one field says about another."""
    if "max_completion_tokens" in request:
        request["max_tokens"] = request.pop("max_completion_tokens")
    if request.get("tool_choice") == "none":
        request.pop("tools", None)
    if request.get("temperature") == 0:  # always the likeliest token: nothing is left to chance
        request.pop("seed", None)
    alternatives = request.get("logprobs")
    if isinstance(alternatives, int) and not isinstance(alternatives, bool):
        request["logprobs"] = True
        request["top_logprobs"] = alternatives
    effort = request.pop("reasoning_effort", None)
    thinking = request.pop("enable_thinking", None)
    template: dict[str, Any] = {}
    if effort is not None:
        template["enable_thinking"] = effort != "none"
        if "reasoning_effort" in limits.template_kwargs:
            template["reasoning_effort"] = effort
    if thinking is not None:
        template["enable_thinking"] = thinking
    if template:
        request["chat_template_kwargs"] = template | request.get("chat_template_kwargs", {})


def _characters(name: str, value: Any, depth: int = MAX_DEPTH) -> int:
    """How much text is in a value, all of which can be written as UTF-8 and as JSON.

    Raises:
        InvalidRequest: lone surrogates, NaN and Infinity, numbers beyond 64 bits, deep nesting.
    """
    kind = type(value)
    if kind is str:
        if not value.isascii():
            _require_utf8(name, value)
        return len(value)
    if kind is float:
        if not math.isfinite(value):
            raise InvalidRequest(f"{name} contains a number that is not finite.", param=name)
    elif kind is int:
        if not MIN_INTEGER <= value <= MAX_INTEGER:
            raise InvalidRequest(f"{name} contains a number of more than 64 bits.", param=name)
    elif kind is dict or kind is list:
        if depth == 0:
            raise InvalidRequest(f"{name} is nested more than {MAX_DEPTH} levels deep.", param=name)
        total = 0
        items = value
        if kind is dict:
            total = _characters(name, "".join(value))
            items = value.values()
        for item in items:
            if type(item) is str and item.isascii():  # most of what there is: spare it the call
                total += len(item)
            else:
                total += _characters(name, item, depth - 1)
        return total
    return 0


def _has_nul(value: Any) -> bool:
    """Whether a value that is not nested deeply has a NUL in one of its texts."""
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any("\0" in name for name in value) or any(map(_has_nul, value.values()))
    return isinstance(value, list) and any(map(_has_nul, value))


def _require_utf8(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            f"{name} contains a lone surrogate, which is not a character.", param=name
        ) from None
