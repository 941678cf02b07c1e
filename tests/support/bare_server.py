"""The server alone, running an application that a test provides."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from mlxproxy.server import channel, server
from mlxproxy.settings import Settings


class BareServer:
    """The server alone, running an application that a test provides."""

    def __init__(
        self,
        application: Callable[..., Any],
        channel_class: type[channel.Channel] = channel.DirectChannel,
    ) -> None:
        settings = Settings(max_concurrent=1, max_queue=0)
        self._listener = server.listen("127.0.0.1", 0)
        self.server = server.Server(
            application, settings, self._listener, lambda: None, lambda: None, channel_class
        )
        self.port = self.server.address[1]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            self.server._turn(0.02)

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        server.wasyncore.close_all(self.server._poller)
        self._listener.close()
        self.server._dispatcher.shutdown(timeout=1)
