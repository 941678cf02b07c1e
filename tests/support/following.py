"""A follower of a stream of events or log lines."""

from __future__ import annotations

import json
from typing import Any

import requests

from tests.support.proxy import Proxy


class Following:
    """A client of a stream that reads it event by event."""

    def __init__(self, proxy: Proxy, path: str) -> None:
        self._response = requests.get(proxy.url + path, stream=True, timeout=20)
        self.status = self._response.status_code
        self._lines = self._response.iter_lines()

    def next(self) -> tuple[str, str]:
        """Return the next event: its kind and its data."""
        kind, data = "message", []
        for raw in self._lines:
            line = raw.decode()
            if line.startswith("event: "):
                kind = line[7:]
            elif line.startswith("data: "):
                data.append(line[6:])
            elif not line and data:
                return kind, "\n".join(data)
        return "end", ""

    def until(self, kind: str, **wanted: Any) -> dict[str, Any]:
        """Return the next event of that kind with these fields."""
        while True:
            found, data = self.next()
            assert found != "end", f"{kind} {wanted} did not come"
            if found == kind:
                fields: dict[str, Any] = json.loads(data)
                if wanted.items() <= fields.items():
                    return fields

    def close(self) -> None:
        self._response.close()
