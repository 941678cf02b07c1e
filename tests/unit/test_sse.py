"""Server-sent events as they are written, read by those who read ours."""

from __future__ import annotations

import json
from unittest import mock

import pytest
from flask import Response

from mlxproxy import sse
from mlxproxy.commands.client import Client, Event
from mlxproxy.errors import NoModelLoaded


def read(sent: bytes) -> list[Event]:
    """What the commands' client makes of a stream."""
    client = Client("http://localhost", None)
    answer = mock.MagicMock()
    answer.__enter__.return_value.iter_lines.return_value = sent.splitlines()
    with mock.patch.object(client, "_send", return_value=answer):
        return list(client.events("GET", "/"))


def test_every_kind_of_server_sent_event_is_parsed() -> None:
    data = {"text": "two\nlines, and [DONE]"}
    assert read(sse.event(data)) == [Event("message", json.dumps(data))]
    assert read(sse.event(data, "state")) == [Event("state", json.dumps(data))]
    assert read(sse.text("one\ntwo\n")) == [Event("message", "one\ntwo")]
    assert read(sse.comment()) == [Event("comment", "")]
    assert read(sse.comment("keepalive")) == [Event("comment", "keepalive")]


def test_a_streamed_error_is_the_contracts_error_object() -> None:
    error = NoModelLoaded("Load one.")
    assert read(sse.event(error.body())) == [Event("message", json.dumps(error.body()))]


@pytest.mark.parametrize(
    "sent", [sse.event({"a": "b\n\nc"}), sse.event({}, "x"), sse.text("a\nb"), sse.comment("a")]
)
def test_every_written_event_is_one_server_sent_event(sent: bytes) -> None:
    events = sse.Events()
    assert events.take(sent) == sent
    assert not events.pending
    assert sent.count(sse.BLANK) == 1


def test_event_streams_are_sent_uncached_and_unbuffered() -> None:
    headers = Response(iter(()), headers=sse.HEADERS).headers
    assert headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert headers["Cache-Control"] == "no-cache"
    assert headers["X-Accel-Buffering"] == "no"
