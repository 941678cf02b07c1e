"""The rules for what a request may contain for `mlx_vlm.server`, and what happens otherwise.

One exception in a step of its batch ends every answer in flight, so nothing passes that could raise
one; it opens paths and fetches addresses that a request names, so images are data URLs only. The
wire sends it nothing but fields from these tables. Measured with mlx-vlm 0.7.10.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mlxproxy.engines.mlx_lm.inside.syntaxes import is_forced
from mlxproxy.engines.mlx_lm.rules import choose_tools
from mlxproxy.errors import InvalidRequest
from mlxproxy.guard import shapes
from mlxproxy.guard.check import Kind, Rule, Rules
from mlxproxy.guard.shapes import Limits

MAX_TEXTS: Final = 2048  # OpenAI's own limit
MAX_TOP_LOGPROBS: Final = 20  # as the command line says, too
_CONTEXT_SIZE: Final = shapes.integer(0, 1 << 20)
_NOT_ENFORCED: Final = (
    "cannot be enforced by mlx-vlm. Leave it out, or use a model that mlx_lm.server serves."
)
_NOT_SAMPLED: Final = "mlx-vlm ignores it: the client is told"


def _text_format(name: str, value: Any, limits: Limits) -> Any:
    """Accept only text: without Metal any schema ends its batch, with it an odd one does."""
    if shapes.response_format(name, value, limits) is shapes.DROP:
        return shapes.DROP
    raise InvalidRequest(f"{name} {_NOT_ENFORCED}", param=name)


_CHAT: Final = {
    "model": Rule(shapes.string, "another name unloads the model before it looks for the other"),
    "messages": Rule(shapes.messages, "images from paths and addresses are opened"),
    "stream": Rule(shapes.boolean, "422 for null"),
    "stream_options": Rule(shapes.stream_options, "ours"),
    "max_tokens": Rule(shapes.max_tokens, "2**31 runs to the end of the context"),
    "max_completion_tokens": Rule(shapes.max_tokens, "ignored"),
    "temperature": Rule(shapes.number(0, 2, 2), "NaN gives garbage to the whole batch"),
    "top_p": Rule(shapes.top_p, "belongs to the batch"),
    "top_k": Rule(shapes.top_k, "from the vocabulary's size on, it ends its batch"),
    "min_p": Rule(shapes.number(0, 1, 3), _NOT_SAMPLED),
    "xtc_probability": Rule(shapes.number(0, 1, 2), _NOT_SAMPLED),
    "xtc_threshold": Rule(shapes.number(0, 0.5, 2), _NOT_SAMPLED),
    "repetition_penalty": Rule(shapes.number(0.01, 10, 2), "0 divides into infinity"),
    "repetition_context_size": Rule(_CONTEXT_SIZE, "a size of memory"),
    "presence_penalty": Rule(shapes.number(-2, 2, 3), "NaN gives garbage"),
    "presence_context_size": Rule(_CONTEXT_SIZE, "a size of memory"),
    "frequency_penalty": Rule(shapes.number(-2, 2, 3), "NaN gives garbage"),
    "frequency_context_size": Rule(_CONTEXT_SIZE, "a size of memory"),
    "logit_bias": Rule(shapes.logit_bias, "an id beyond the vocabulary crashes the process"),
    "seed": Rule(shapes.seed, "belongs to the batch; without one, it is always 0"),
    "stop": Rule(
        shapes.absent("mlx-vlm has no stop words. Leave it out, or set max_tokens."), "ignored"
    ),
    "n": Rule(
        shapes.only(1, "the backend gives one answer per request; send several requests."),
        "ignored",
    ),
    "logprobs": Rule(shapes.boolean, "belongs to the batch"),
    "top_logprobs": Rule(shapes.top_logprobs(MAX_TOP_LOGPROBS), "only with logprobs"),
    "response_format": Rule(_text_format, "a schema that fails ends every answer in its batch"),
    "chat_template_kwargs": Rule(shapes.chat_template_kwargs, "ignored, but for thinking"),
    "enable_thinking": Rule(shapes.boolean, "a template argument"),
    "reasoning_effort": Rule(shapes.one_of(shapes.EFFORTS), "a template argument"),
    "tools": Rule(shapes.tools, "an odd schema may fail in the template"),
    "tool_choice": Rule(shapes.tool_choice, "adds an instruction to the prompt"),
    "functions": Rule(shapes.absent("use tools instead."), "ignored"),
    "function_call": Rule(shapes.absent("use tool_choice instead."), "ignored"),
    "modalities": Rule(shapes.only_text, "ignored"),
    "audio": Rule(shapes.absent("the model can only write text."), "ignored"),
    "web_search_options": Rule(shapes.absent("this server does not search."), "ignored"),
    "adapters": Rule(shapes.allowed(lambda limits: frozenset()), "a path that is read"),
    "draft_model": Rule(shapes.allowed(lambda limits: frozenset()), "not possible here"),
    "role_mapping": Rule(shapes.drop, "ignored"),
}


def is_sampled(request: Mapping[str, Any]) -> bool:
    """Return whether chance decides about the answer to a checked request."""
    return bool(request.get("temperature", 0) > 0)


def is_exclusive(request: Mapping[str, Any]) -> bool:
    """Return whether a checked request must not share a batch.

    The sampling settings, and whether there are log probabilities, are the first request's for all
    that join its batch. Greedy answers have them all in common.
    """
    return is_sampled(request) or bool(request.get("logprobs"))


def _combine(request: dict[str, Any], limits: Limits) -> None:
    """Adjust fields whose meaning depends on other fields."""
    if "max_completion_tokens" in request:
        request["max_tokens"] = request.pop("max_completion_tokens")
    choose_tools(request)
    if request.get("tools") and is_forced(request.get("tool_choice")):
        raise InvalidRequest(f"tool_choice {_NOT_ENFORCED}", param="tool_choice")
    if not is_sampled(request):
        request.pop("seed", None)
    if request.get("top_logprobs", 0) and not request.get("logprobs"):
        raise InvalidRequest("top_logprobs is only possible with logprobs.", param="top_logprobs")
    template = request.pop("chat_template_kwargs", {})
    effort = request.pop("reasoning_effort", template.get("reasoning_effort"))
    thinking = template.get("enable_thinking", request.pop("enable_thinking", None))
    if thinking is None and effort is not None:
        thinking = effort != "none"
    if thinking is not None:
        request["enable_thinking"] = thinking


_EMBED: Final = {
    "model": _CHAT["model"],
    "input": Rule(shapes.texts(MAX_TEXTS), "images from paths and addresses are opened"),
    "encoding_format": Rule(shapes.one_of(frozenset({"float", "base64"})), "ignored: ours"),
    "dimensions": Rule(shapes.integer(1, 1 << 16), "ignored: ours"),
    "truncate": Rule(shapes.boolean, "ours: it cuts in silence"),
}
_RERANK: Final = {
    "model": _CHAT["model"],
    "query": Rule(shapes.string, "422 for anything else"),
    "documents": Rule(shapes.texts(MAX_TEXTS), "images from paths and addresses are opened"),
    "top_n": Rule(shapes.integer(1, MAX_TEXTS), "ours"),
    "return_documents": Rule(shapes.boolean, "ours"),
}


def _require_query(request: dict[str, Any], limits: Limits) -> None:
    if not request.get("query"):
        raise InvalidRequest("query is missing.", param="query")


_NO_PROMPT: Final[frozenset[str]] = frozenset()  # each text has to fit, not all of them together
RULES: Final[Mapping[Kind, Rules]] = {
    "chat": Rules(_CHAT, required="messages", combine=_combine),
    "embed": Rules(_EMBED, required="input", prompt=_NO_PROMPT),
    "rerank": Rules(_RERANK, "documents", _require_query, _NO_PROMPT),
}
