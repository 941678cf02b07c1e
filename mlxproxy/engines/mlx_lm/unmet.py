"""The parts of a request that `mlx_lm.server` does not honour in its answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mlxproxy.backend.protocol import Unmet
from mlxproxy.catalog.model import Capabilities
from mlxproxy.catalog.template import SWITCH
from mlxproxy.engines.mlx_lm.inside.syntaxes import is_forced
from mlxproxy.errors import InvalidRequest


def unmet(
    request: Mapping[str, Any], can: Capabilities, has: Callable[[str], bool]
) -> Iterator[Unmet]:
    """Yield the parts of a checked request that the answer will not honour.

    Args:
        request: as it was checked, see `rules.py`.
        can: what the model that answers can do.
        has: whether its backend has a feature of `engines/mlx_lm/inside/`.
    """
    if request.get("tools"):
        yield from _unmet_tools(request, can)
    thinking = request.get("chat_template_kwargs", {}).get(SWITCH)
    if thinking is not None:
        yield from _unmet_thinking(thinking, can)
    if "stop" in request and not has("stop"):
        yield Unmet(
            "stop",
            "with this mlx-lm, the answer may go on after a stop word, which is cut out of it.",
        )
    if request.get("logprobs") and request.get("stream") and not has("logprobs"):
        yield Unmet("logprobs", "with this mlx-lm, a stream carries none.")


def _unmet_thinking(thinking: bool, can: Capabilities) -> Iterator[Unmet]:
    if thinking and not can.thinking:
        yield Unmet("enable_thinking", "this model cannot think, as far as its files tell.")
    if not thinking and can.thinking and not can.thinking_switch:
        yield Unmet("enable_thinking", "this model's thinking probably cannot be turned off.")


def _unmet_tools(request: Mapping[str, Any], can: Capabilities) -> Iterator[Unmet]:
    if not can.tools:
        yield Unmet("tools", "mlx-lm knows no tool calls of this model; it may answer in text.")
    if request.get("parallel_tool_calls") is False and not is_forced(request.get("tool_choice")):
        yield Unmet("parallel_tool_calls", "the model may call several tools at once.")


def refusal(request: Mapping[str, Any], has: Callable[[str], bool]) -> InvalidRequest | None:
    """Return the error for a checked request that this backend cannot answer as demanded.

    Args:
        has: see :func:`unmet`.
    """
    if "continuations" in request and not has("score"):
        return InvalidRequest(
            "This backend has no scores; `mlxproxy doctor` says what it lacks.",
            param="continuations",
        )
    if "response_format" in request:
        field = "response_format"
    elif request.get("tools") and is_forced(request.get("tool_choice")):
        field = "tool_choice"
    else:
        return None
    if has("grammar"):
        return None
    return InvalidRequest(
        f"{field} cannot be enforced by this backend; `mlxproxy doctor` says what it lacks. Leave "
        "it out, or install what is missing and load the model again.",
        param=field,
    )
