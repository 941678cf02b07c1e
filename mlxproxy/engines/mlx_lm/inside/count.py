"""The exact length of a prompt: `POST /mlxproxy/count` with a chat, answered by `{"tokens": N}`.

The prompt is made by the same code as for an answer, with the model's template. Only its text is
tokenized by a copy of the tokenizer, because the generation thread uses the original. The request's
own thread does all of it, so that nobody else waits.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from . import gate, paths
from .prompts import Counter

PATH = "/mlxproxy/count"  # as in mlxproxy/engines/mlx_lm/wire.py
NAMES: gate.Names = {
    "ResponseGenerator._tokenize": ("self", "tokenizer", "request", "args"),
    "CompletionRequest": ("request_type", "prompt", "messages", "tools", "role_mapping"),
}


def arm(server: Any, counter: Counter) -> None:
    """Patch `mlx_lm.server`; do it before other features change how a prompt is made.

    Args:
        counter: has the copy of the tokenizer.

    Raises:
        Unexpected: it tokenizes or handles requests in another way.
    """
    gate.require(server, NAMES)
    tokenize = server.ResponseGenerator._tokenize

    def count(handler: Any, body: Any) -> tuple[int, dict[str, Any]]:
        responses = handler.response_generator
        tokenizer = Apart(responses.model_provider.tokenizer, counter)
        return 200, {"tokens": len(chat_tokens(server, tokenize, responses, tokenizer, body))}

    paths.add(server, PATH, count)


def chat_tokens(
    server: Any, tokenize: Callable[..., Any], responses: Any, tokenizer: Apart, body: Any
) -> list[int]:
    """Return the tokens of a chat's prompt.

    Args:
        tokenize: `ResponseGenerator._tokenize`, before other features change it.
    """
    messages, tools, roles = body["messages"], body.get("tools") or None, body.get("role_mapping")
    request = server.CompletionRequest("chat", "", messages, tools, roles)
    args = SimpleNamespace(chat_template_kwargs=body.get("chat_template_kwargs"))
    tokens: list[int] = tokenize(responses, tokenizer, request, args)[0]
    return tokens


class Apart:
    """The model's tokenizer, except that a copy of it does the encoding.

    Args:
        tokenizer: the one that the generation thread uses.
        counter: makes and keeps the copy.
    """

    def __init__(self, tokenizer: Any, counter: Counter) -> None:
        self._shared = tokenizer
        self._counter = counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shared, name)

    def apply_chat_template(self, *arguments: Any, tokenize: bool = True, **named: Any) -> Any:
        """Render a conversation; return its text or its tokens."""
        text = self._shared.apply_chat_template(*arguments, tokenize=False, **named)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text."""
        own = self._counter.copy_of(self._shared)
        ids: list[int] = own.encode(text, add_special_tokens=add_special_tokens).ids
        return ids
