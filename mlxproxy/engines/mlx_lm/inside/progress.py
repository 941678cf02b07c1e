"""Progress of a prompt in a stream that counts its cached part as read.

mlx-lm's keepalives (`: keepalive n/m`) count only the tokens that are still to be read, so the same
prompt has a length of 1 the second time. Its true length is reported at the end of a stream, which
an aborted answer never reaches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from . import gate


def arm(server: Any) -> None:
    """Patch `mlx_lm.server`.

    Raises:
        Unexpected: it reports progress in another way.
    """
    names = ("self", "request", "generation_args", "progress_callback")
    gate.require(server, {"ResponseGenerator.generate": names})
    gate.require_attributes(server, "GenerationContext", ("prompt",))
    generate = server.ResponseGenerator.generate

    @functools.wraps(generate)
    def generate_and_report(
        self: Any,
        request: Any,
        generation_args: Any,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> Any:
        def report(processed: int, total: int) -> None:
            whole = len(context.prompt)
            if progress_callback is not None:
                progress_callback(max(processed, processed + whole - total), whole)

        # Progress is reported only while somebody iterates over the answer, when `context` is set.
        context, answer = generate(self, request, generation_args, report)
        return context, answer

    server.ResponseGenerator.generate = generate_and_report
