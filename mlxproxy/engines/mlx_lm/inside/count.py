"""The exact length of a prompt: `POST /mlxproxy/count` with a chat, answered by `{"tokens": N}`.

The prompt is made by the same code as for an answer, with the model's template. Only its text is
tokenized by a copy of the tokenizer, because the generation thread uses the original. The request's
own thread does all of it, so that nobody else waits.
"""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace
from typing import Any

from . import gate
from .prompts import Counter

PATH = "/mlxproxy/count"  # as in mlxproxy/engines/mlx_lm/wire.py


def arm(server: Any, counter: Counter) -> None:
    """Patch `mlx_lm.server`; do it before other features change how a prompt is made.

    Args:
        counter: has the copy of the tokenizer.

    Raises:
        Unexpected: it tokenizes or handles requests in another way.
    """
    names: gate.Names = {
        "ResponseGenerator._tokenize": ("self", "tokenizer", "request", "args"),
        "APIHandler.do_POST": ("self",),
        "CompletionRequest": ("request_type", "prompt", "messages", "tools", "role_mapping"),
    }
    gate.require(server, names)
    tokenize, do_post = server.ResponseGenerator._tokenize, server.APIHandler.do_POST

    def count(responses: Any, body: Any) -> int:
        messages, tools = body["messages"], body.get("tools") or None
        roles = body.get("role_mapping")
        request = server.CompletionRequest("chat", "", messages, tools, roles)
        args = SimpleNamespace(chat_template_kwargs=body.get("chat_template_kwargs"))
        tokenizer = Apart(responses.model_provider.tokenizer, counter)
        return len(tokenize(responses, tokenizer, request, args)[0])

    @functools.wraps(do_post)
    def answer_or_count(self: Any) -> None:
        if self.path != PATH:
            do_post(self)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer: dict[str, Any]
        try:
            status, answer = 200, {"tokens": count(self.response_generator, json.loads(body))}
        except Exception as error:  # of a template, or of a tokenizer that cannot be copied
            status, answer = 422, {"error": type(error).__name__}
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    server.APIHandler.do_POST = answer_or_count


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
