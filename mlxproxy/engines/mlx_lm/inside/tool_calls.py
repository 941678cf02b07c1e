"""Handling of a tool call that cannot be parsed: only that call is lost, not the answer.

mlx-lm's parsers raise other errors than the `ValueError` that its server expects, and a call that
has no arguments, or whose name is not a string, fails when it is formatted. Without this module,
either would lose the whole answer, including what the model had said before. Some parsers need
time quadratic in a text's length, so a very long call is not parsed at all, nor is one that nobody
waits for any more.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from . import gate

MAX_CHARACTERS = 1 << 20
FAILED = "Failed to parse tool call"  # the beginning of the server's own message


def arm(server: Any, check_client: Callable[[], None]) -> None:
    """Patch `mlx_lm.server`.

    Args:
        check_client: raises if the client that this thread serves has left.

    Raises:
        Unexpected: calls are formatted in another way there.
    """
    names = ("self", "tool_parser", "tools", "streaming")
    gate.require(
        server,
        {"ToolCallFormatter.__init__": names, "ToolCallFormatter.__call__": ("self", "tool_calls")},
    )
    formatter = server.ToolCallFormatter
    make, form = formatter.__init__, formatter.__call__

    @functools.wraps(make)
    def make_complete(self: Any, tool_parser: Any, tools: Any, streaming: bool = False) -> None:
        make(self, complete(tool_parser), tools, streaming)

    @functools.wraps(form)
    def form_each(self: Any, tool_calls: Any) -> list[Any]:
        formed: list[Any] = []
        for text in tool_calls or ():
            check_client()
            try:
                formed += form(self, [text])
            except Exception as error:  # whatever some model's parser raises
                logging.warning("%s (%s)", FAILED, type(error).__name__)
        return formed

    formatter.__init__, formatter.__call__ = make_complete, form_each


def complete(parser: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """Return a parser that returns calls with a name and arguments, or raises ValueError."""

    def parse(text: str, tools: Any) -> Any:
        if len(text) > MAX_CHARACTERS:
            raise ValueError("the call is too long")
        parsed = parser(text, tools)
        for call in parsed if isinstance(parsed, list) else [parsed]:
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                raise ValueError("it is no call of a function")
            call.setdefault("arguments", call.pop("parameters", {}))
        return parsed

    return parse
