"""Stored answers to which a client may refer: the latest ones, up to a number and a size.

A conversation is stored as items: its input, which includes those of earlier answers, and its
output.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, cast

from mlxproxy.dialects.form import Json, json_bytes
from mlxproxy.errors import InvalidRequest

MAX_RESPONSES = 200
MAX_BYTES = 32 << 20


class PreviousResponseNotFound(InvalidRequest):
    """The answer that a request continues is not stored, or no longer."""

    code = "previous_response_not_found"

    def __init__(self, identity: str) -> None:
        super().__init__(
            f"Previous response with id '{identity}' not found. This server keeps the latest "
            "answers alone: send the whole conversation as input.",
            param="previous_response_id",
        )


class ResponseNotFound(InvalidRequest):
    """The requested answer is not stored, or no longer."""

    status = 404
    code = "not_found"

    def __init__(self, identity: str) -> None:
        super().__init__(f"Response with id '{identity}' not found.", param="response_id")


class _Entry(NamedTuple):
    response: bytes
    items: bytes
    """The input, as JSON."""
    output: dict[str, bytes]
    """Items of the output, as JSON, by their ids."""

    @property
    def size(self) -> int:
        return len(self.response) + len(self.items) + sum(map(len, self.output.values()))


class ResponsesStore:
    """A store of answers, for any number of threads; the least recently used is evicted first."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self.max_responses = max_responses
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._output: dict[str, bytes] = {}
        self._bytes = 0

    @property
    def size(self) -> int:
        """The number of bytes that are stored."""
        return self._bytes

    def put(self, response: Json, items: Sequence[Json]) -> None:
        """Store an answer, unless it alone is larger than the store may be.

        Args:
            items: the whole input.
        """
        output = {item["id"]: json_bytes(item) for item in response["output"]}
        entry = _Entry(json_bytes(response), json_bytes(list(items)), output)
        if entry.size > self.max_bytes or self.max_responses < 1:
            return
        with self._lock:
            self._drop(response["id"])
            self._entries[response["id"]] = entry
            self._output |= entry.output
            self._bytes += entry.size
            while len(self._entries) > self.max_responses or self._bytes > self.max_bytes:
                self._drop(next(iter(self._entries)))

    def conversation(self, identity: str) -> list[Json]:
        """Return all items up to an answer, including its own.

        Raises:
            PreviousResponseNotFound: it is not stored.
        """
        entry = self._used(identity)
        if entry is None:
            raise PreviousResponseNotFound(identity)
        return [*json.loads(entry.items), *map(json.loads, entry.output.values())]

    def response(self, identity: str) -> bytes:
        """Return the JSON of an answer.

        Raises:
            ResponseNotFound: it is not stored.
        """
        entry = self._used(identity)
        if entry is None:
            raise ResponseNotFound(identity)
        return entry.response

    def input_items(self, identity: str) -> Json:
        """Return the list of an answer's input items, the latest first.

        Raises:
            ResponseNotFound: it is not stored.
        """
        entry = self._used(identity)
        if entry is None:
            raise ResponseNotFound(identity)
        items = [
            item if "id" in item else {"id": f"msg_{number}_{identity}", **item}
            for number, item in enumerate(json.loads(entry.items))
        ]
        items.reverse()
        ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {}
        empty = {"first_id": None, "last_id": None}
        return {"object": "list", "data": items, **empty, **ends, "has_more": False}

    def item(self, identity: str) -> Json | None:
        """Return an item of a stored answer; None if there is no item with that id."""
        with self._lock:
            item = self._output.get(identity)
        return None if item is None else cast(Json, json.loads(item))

    def delete(self, identity: str) -> Json:
        """Delete an answer; return the confirmation.

        Raises:
            ResponseNotFound: it is not stored.
        """
        with self._lock:
            found = self._drop(identity)
        if not found:
            raise ResponseNotFound(identity)
        return {"id": identity, "object": "response", "deleted": True}

    def _used(self, identity: str) -> _Entry | None:
        with self._lock:
            if identity in self._entries:
                self._entries.move_to_end(identity)
            return self._entries.get(identity)

    def _drop(self, identity: str) -> bool:
        """Delete an answer; return whether it was there. The caller holds the lock."""
        entry = self._entries.pop(identity, None)
        if entry is None:
            return False
        self._bytes -= entry.size
        for item in entry.output:
            self._output.pop(item, None)
        return True
