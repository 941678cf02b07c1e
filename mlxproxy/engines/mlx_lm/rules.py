"""The rules for what a request may contain for `mlx_lm.server`, and what happens otherwise.

One wrong value crashes its generation thread, and with it every answer in flight; others make it
load, fetch or compute at everyone's expense. Measured with mlx-lm 0.31.3 and 0.32.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from mlxproxy.errors import InvalidRequest
from mlxproxy.guard import shapes
from mlxproxy.guard.check import Kind, Rule, Rules
from mlxproxy.guard.shapes import Limits

MAX_TOP_LOGPROBS = 11  # OpenAI's limit is 20, and fewer may be returned
MAX_CONTINUATIONS = 128
CONTEXT_SIZE = shapes.integer(0, 1 << 20)

# "kills": it crashes the generation thread, and so every answer in flight, until the backend is
# restarted. "compiles": each new value is compiled into a new kernel while all streams stall (1 to
# 3 s on a CPU); rounding limits the number of values.
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
    "top_logprobs": Rule(shapes.top_logprobs(MAX_TOP_LOGPROBS), "true kills, 12 gives 400"),
    "n": Rule(
        shapes.only(1, "the backend gives one answer per request; send several requests."),
        "ignored",
    ),
    "response_format": Rule(shapes.response_format, "ignored by the plain server"),
    "chat_template_kwargs": Rule(shapes.chat_template_kwargs, "a chat_template runs; some kill"),
    "enable_thinking": Rule(shapes.boolean, "becomes a template argument"),
    "reasoning_effort": Rule(shapes.one_of(shapes.EFFORTS), "becomes a template argument"),
}
_ELSEWHERE: Final = "belongs to the other endpoint: nothing has checked it"
_CHAT: Final = {
    **_COMMON,
    "messages": Rule(shapes.messages, "what templates choke on; images from anywhere"),
    "logprobs": Rule(shapes.boolean, "400 for null and numbers"),
    "functions": Rule(shapes.absent("use tools instead."), "ignored"),
    "function_call": Rule(shapes.absent("use tool_choice instead."), "ignored"),
    "modalities": Rule(shapes.only_text, "ignored"),
    "audio": Rule(shapes.absent("the model can only write text."), "ignored"),
    "web_search_options": Rule(shapes.absent("this server does not search."), "ignored"),
    "tools": Rule(shapes.tools, "an odd schema cuts the answer off when the model calls"),
    "tool_choice": Rule(shapes.tool_choice, "ignored by the plain server"),
    "role_mapping": Rule(shapes.role_mapping, "repeated for each message"),
}
_TEXT: Final = {
    **_COMMON,
    "prompt": Rule(shapes.prompt, 'an empty one and ["a"] kill'),
    "messages": Rule(shapes.drop, _ELSEWHERE),
    "tools": Rule(shapes.drop, _ELSEWHERE),
    "tool_choice": Rule(shapes.drop, _ELSEWHERE),
    "logprobs": Rule(shapes.text_logprobs(MAX_TOP_LOGPROBS), "400 for null and numbers"),
    "best_of": Rule(
        shapes.only(1, "the backend gives one answer per request; leave it out."), "ignored"
    ),
    "echo": Rule(shapes.only(False, "the backend cannot repeat the prompt."), "ignored"),
    "suffix": Rule(shapes.only("", "the backend only continues a text."), "ignored"),
}


_SCORE: Final = {
    **{
        name: _COMMON[name]
        for name in ("model", "chat_template_kwargs", "enable_thinking", "reasoning_effort")
    },
    **{name: _CHAT[name] for name in ("messages", "tools", "role_mapping")},
    "stream": Rule(shapes.only(False, "scores come whole; leave it out."), "ignored"),
    "prompt": Rule(shapes.string, "an error of its thread"),
    "continuations": Rule(shapes.texts(MAX_CONTINUATIONS), "each is read in a pass of its own"),
}


def is_exclusive(request: Mapping[str, Any], has: Callable[[str], bool]) -> bool:
    """Return whether the backend answers this checked request alone.

    Such a request waits until all others have their answers, and no other begins meanwhile.

    Args:
        has: whether a feature of `inside/` is armed.
    """
    alone = {"adapters", "draft_model", "seed"}
    if has("sampling"):  # a seeded request has a generator of its own
        alone.remove("seed")
    return not request.keys().isdisjoint(alone) or bool(shapes.images(request.get("messages", ())))


def _combine(request: dict[str, Any], limits: Limits) -> None:
    """Adjust fields whose meaning depends on other fields."""
    if "max_completion_tokens" in request:
        request["max_tokens"] = request.pop("max_completion_tokens")
    choose_tools(request)
    if request.get("temperature") == 0:  # always the likeliest token: nothing is random
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


def _combine_score(request: dict[str, Any], limits: Limits) -> None:
    if ("prompt" in request) is ("messages" in request):
        raise InvalidRequest("Give either prompt or messages.", param="prompt")
    for place, text in enumerate(request["continuations"]):
        if not text:
            raise InvalidRequest("A continuation is empty.", param=f"continuations[{place}]")
    if shapes.images(request.get("messages", ())):
        raise InvalidRequest("Scores are of texts; leave the images out.", param="messages")
    _combine(request, limits)


def choose_tools(request: dict[str, Any]) -> None:
    """Offer the model only the tools that `tool_choice` allows."""
    choice = request.get("tool_choice")
    if choice == "none":
        request.pop("tools", None)
    if choice in (None, "none", "auto"):
        return
    if "tools" not in request:
        raise InvalidRequest("tool_choice is only possible with tools.", param="tool_choice")
    if choice == "required":
        return
    names = shapes.chosen(choice)
    tools = [tool for tool in request["tools"] if tool["function"]["name"] in names]
    if len({tool["function"]["name"] for tool in tools}) < len(names):
        raise InvalidRequest("tool_choice names a tool that is not in tools.", param="tool_choice")
    request["tools"] = tools


RULES: Final[Mapping[Kind, Rules]] = {
    "chat": Rules(_CHAT, required="messages", combine=_combine),
    "text": Rules(_TEXT, required="prompt", combine=_combine),
    "score": Rules(_SCORE, required="continuations", combine=_combine_score),
}
