"""The proxy with waitress's own path to a client's socket, through its buffers.

``python -m tests.support.buffered_proxy serve`` is ``mlxproxy serve`` without the direct path.
"""

from __future__ import annotations

from functools import partial
from unittest import mock

from mlxproxy.cli import main
from mlxproxy.server.channel import Channel
from mlxproxy.server.server import Server

if __name__ == "__main__":
    with mock.patch("mlxproxy.main.Server", partial(Server, channel_class=Channel)):
        main()
