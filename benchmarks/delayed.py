"""The proxy with a delay in its relay, to check that the benchmark detects it.

``python -m benchmarks.delayed 5 serve`` is ``python -m mlxproxy serve``, 5 ms slower per event.
"""

from __future__ import annotations

import sys
import time

from mlxproxy.backend.connection import BackendConnection
from mlxproxy.cli import main


def delay(milliseconds: float) -> None:
    """Delay each read from the backend's connection by this time."""
    read = BackendConnection.read

    def late(upstream: BackendConnection) -> bytes:
        data = read(upstream)
        time.sleep(milliseconds / 1000)
        return data

    BackendConnection.read = late  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    delay(float(sys.argv.pop(1)))
    main()
