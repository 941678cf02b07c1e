"""The proxy with a delay in its relay, to see that the benchmark finds it.

``python -m benchmarks.delayed 5 serve`` is ``python -m mlxproxy serve``, 5 ms slower an event.
"""

from __future__ import annotations

import sys
import time

from mlxproxy.cli import main
from mlxproxy.upstream import Upstream


def delay(milliseconds: float) -> None:
    """Has each read of the backend's connection take so much longer."""
    read = Upstream.read

    def late(upstream: Upstream) -> bytes:
        data = read(upstream)
        time.sleep(milliseconds / 1000)
        return data

    Upstream.read = late  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    delay(float(sys.argv.pop(1)))
    main()
