"""Paths that only mlxproxy asks for; `mlx_lm.server` does not have them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from . import gate

Answer = Callable[[Any, Any], tuple[int, dict[str, Any]] | None]
"""Answers a POST on the request's own thread. It is called with the handler and the body, and
returns the status and the answer; None if the client has left."""

FAILED = 404  # as `mlx_lm.server` answers whatever goes wrong in a generation


def add(server: Any, path: str, answer: Answer) -> None:
    """Patch `mlx_lm.server`, to answer one more path.

    Raises:
        Unexpected: it handles requests in another way.
    """
    gate.require(server, {"APIHandler.do_POST": ("self",)})
    do_post = server.APIHandler.do_POST

    @functools.wraps(do_post)
    def answer_or_pass_on(self: Any) -> None:
        if self.path != path:
            do_post(self)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            answered = answer(self, json.loads(body))
        except Exception as error:  # of a template, or of a tokenizer that cannot be copied
            answered = FAILED, {"error": str(error)}
        if answered is None:
            return
        status, fields = answered
        data = json.dumps(fields).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    server.APIHandler.do_POST = answer_or_pass_on
