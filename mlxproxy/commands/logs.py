"""`mlxproxy logs`: the proxy's or the backend's log lines."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

from mlxproxy import settings
from mlxproxy.commands.client import Client, ClientError, Unreachable
from mlxproxy.text import harmless


def logs(client: Client, source: str, follow: bool, lines: int) -> None:
    """Print the last lines, and with `follow` also new ones until the server stops.

    Raises:
        ClientError: there is no server, or it rejects the request.
    """
    path = f"/v1/logs?source={source}&lines={lines}"
    try:
        if not follow:
            _write(client.text(path))
            return
        with closing(client.events("GET", path + "&follow=true")) as events:
            for event in events:
                if event.kind != "comment":
                    _write(event.data + "\n")
    except Unreachable as error:
        file = _file(source)
        if client.is_own and file is not None:  # a proxy that has exited has left its log
            raise ClientError(f"{error.message} Its log is in {file}.") from None
        raise


def _file(source: str) -> Path | None:
    file = settings.load().instance.log(source)
    return file if file.is_file() else None


def _write(text: str) -> None:
    sys.stdout.write(harmless(text))
    sys.stdout.flush()
