"""The parts of a request that `mlx_vlm.server` does not honour in its answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from mlxproxy.backend.protocol import Unmet
from mlxproxy.catalog.model import Capabilities

_IGNORED: Final = ("min_p", "xtc_probability", "xtc_threshold")


def unmet(request: Mapping[str, Any], can: Capabilities) -> Iterator[Unmet]:
    """Yield the parts of a checked request that the answer will not honour.

    Args:
        request: as it was checked, see `rules.py`.
        can: what the model that answers can do.
    """
    for name in _IGNORED:
        if request.get(name):
            yield Unmet(name, "mlx-vlm does not sample with it.")
    thinking = request.get("enable_thinking")
    if thinking and not can.thinking:
        yield Unmet("enable_thinking", "this model cannot think, as far as its files tell.")
    if thinking is False and can.thinking and not can.thinking_switch:
        yield Unmet("enable_thinking", "this model's thinking probably cannot be turned off.")
    if request.get("tools"):
        if not can.tools:
            yield Unmet("tools", "no tool calls of this model are known; it may answer in text.")
        if request.get("parallel_tool_calls") is False:
            yield Unmet("parallel_tool_calls", "the model may call several tools at once.")
