"""A backend that speaks oddly: an answer that is whole is given whole, and any other ends with one
error that says so. Nothing hangs, nothing is the proxy's own fault, and the next request is
answered by the same backend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.support import scripted_server
from tests.support.proxy import Proxy

DEEP = "[" * 100_000
DONE = "data: [DONE]\n\n"
TEXT = "one two \n\ndata: [DONE]\n\n"  # the last words are the model's own
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
COMMON = {"id": "x", "system_fingerprint": "f", "model": "m", "created": 1}


def event(value: Any) -> str:
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n"


def chunk(text: str, finish: str | None = None) -> str:
    choice = {"index": 0, "finish_reason": finish, "delta": {"content": text}}
    return event({**COMMON, "object": "chat.completion.chunk", "choices": [choice]})


def count(usage: Any) -> str:
    return event({**COMMON, "object": "chat.completion", "choices": [], "usage": usage})


def head(*lines: str, status: str = "HTTP/1.1 200 OK") -> str:
    return "\r\n".join((status, *lines, "", ""))


def chunked(body: str, size: int, more: str = "", trailers: str = "") -> str:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    frames = "".join(f"{len(part):x}{more}\r\n{part}\r\n" for part in parts)
    return head("Transfer-Encoding: chunked") + f"{frames}0\r\n{trailers}\r\n"


WORDS = chunk("one ") + chunk(TEXT.removeprefix("one "))
EVENTS = WORDS + chunk("", "stop") + count(USAGE)
SOUND = EVENTS + DONE
PLAIN = head()


@dataclass(frozen=True)
class Stream:
    """What the backend sends when it is asked for a stream, and what becomes of it.

    Attributes:
        streamed: whether a client that asked for a stream has the whole answer.
        whole: the same of one that asked for all in one piece.
        stays_open: whether the connection does.
    """

    wire: str
    streamed: bool
    whole: bool
    stays_open: bool = False


def given(wire: str, stays_open: bool = False) -> Stream:
    return Stream(wire, True, True, stays_open)


def refused(wire: str, stays_open: bool = False) -> Stream:
    return Stream(wire, False, False, stays_open)


def passed_on(wire: str) -> Stream:
    """What nobody looks into in a stream, and nobody can put together."""
    return Stream(wire, True, False)


STREAMS = {
    # -- the end
    "nothing odd": given(PLAIN + SOUND),
    "two ends": given(PLAIN + SOUND + DONE),
    "events after the end": given(PLAIN + SOUND + chunk("late")),
    "rubbish after the end": given(PLAIN + SOUND + "rubbish"),
    "rubbish after the end, left open": given(PLAIN + SOUND + "rubbish", stays_open=True),
    "left open": given(PLAIN + SOUND, stays_open=True),
    "blank lines before the end": given(PLAIN + EVENTS + "\n\n\n" + DONE),
    "no end": refused(PLAIN + EVENTS),
    "an end without a blank line": refused(PLAIN + EVENTS + DONE.rstrip()),
    "an end in a comment": refused(PLAIN + EVENTS + ": " + DONE),
    "an end in a comment, then the end": given(PLAIN + ": " + DONE + SOUND),
    "an end in another event": refused(PLAIN + EVENTS + ": 1\n" + DONE),
    "an end in the middle of a line": refused(PLAIN + WORDS + "data: {} " + DONE),
    "nothing but an end": passed_on(PLAIN + DONE),
    # -- the frame
    "chunks": given(chunked(SOUND, 100)),
    "chunks of a byte, left open": given(chunked(SOUND, 1), stays_open=True),
    "chunks with all that chunks may have": given(
        chunked(SOUND, 7, ';name="value"', "Trailer: yes\r\n")
    ),
    "chunks that end before the answer": refused(chunked(EVENTS, 100), stays_open=True),
    "chunks that are cut off": refused(chunked(EVENTS, 100)[:-50]),
    "chunks without a size": refused(head("Transfer-Encoding: chunked") + SOUND, stays_open=True),
    "a chunk below zero": refused(head("Transfer-Encoding: chunked") + "-1\r\n" + SOUND),
    "another transfer coding": refused(head("Transfer-Encoding: gzip") + SOUND),
    "a length": given(head(f"Content-Length: {len(SOUND)}") + SOUND),
    "a length that is too large": given(head("Content-Length: 100000") + SOUND, stays_open=True),
    "a length that is too small": refused(head("Content-Length: 300") + SOUND, stays_open=True),
    # -- the events
    "an event that is no JSON": passed_on(PLAIN + WORDS + event("{no JSON") + SOUND),
    "a deep event": passed_on(PLAIN + WORDS + event(DEEP) + SOUND),
    "a deep tool call": passed_on(
        PLAIN
        + event(
            '{"choices":[{"delta":{"tool_calls":[' + '{"a":' * 9000 + "1" + "}" * 9000 + "]}}]}"
        )
        + SOUND
    ),
    "an event that is a number": passed_on(PLAIN + event("5") + SOUND),
    "an event with bytes that are no UTF-8": passed_on(PLAIN + event('{"a":"\xff"}') + SOUND),
    "a JSON answer in place of events": refused(PLAIN + json.dumps({"choices": []})),
    "lines that end as in Windows": refused(PLAIN + SOUND.replace("\n", "\r\n")),
    "a prompt's length of 5,000 digits": given(PLAIN + f": keepalive 1/{'9' * 5000}\n\n" + SOUND),
    "no usage": passed_on(PLAIN + WORDS + chunk("", "stop") + DONE),
    "a usage that is text": passed_on(PLAIN + WORDS + chunk("", "stop") + count("many") + DONE),
    **{
        f"a usage of {value!r}"[:40]: given(
            PLAIN
            + WORDS
            + chunk("", "stop")
            + count({"prompt_tokens": value, "completion_tokens": value})
            + DONE
        )
        for value in ("many", [1], None, -5, 1.5, True, float("nan"), 10**400)
    },
}

ANSWER = {
    **COMMON,
    "object": "chat.completion",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"content": TEXT}}],
    "usage": USAGE,
}
BODY = json.dumps(ANSWER)


def sized(body: str) -> str:
    return head(f"Content-Length: {len(body)}") + body


def answered(**fields: Any) -> str:
    return sized(json.dumps({**ANSWER, **fields}))


# What the backend sends when it is asked for all in one piece (with log probabilities), whether
# that is an answer, and whether the connection stays open.
WHOLES = {
    "nothing odd": (sized(BODY), True, False),
    "left open": (sized(BODY), True, True),
    "more than its length": (head(f"Content-Length: {len(BODY)}") + BODY + "x", True, True),
    "no length": (PLAIN + BODY, True, False),
    "no length, and cut off": (PLAIN + BODY[:-1], False, False),
    "nothing at all": (PLAIN, False, False),
    "a length that is too large": (head(f"Content-Length: {len(BODY) + 1}") + BODY, False, False),
    "a length that is too small": (head(f"Content-Length: {len(BODY) - 1}") + BODY, False, True),
    "chunks": (chunked(BODY, 10), True, True),
    "chunks that are cut off": (chunked(BODY, 10)[:-2], False, False),
    "no JSON": (sized("Sorry!"), False, False),
    "no UTF-8": (sized('{"choices": "\xff"}'), False, False),
    "deep JSON": (sized(DEEP), False, False),
    "a list": (sized("[]"), False, False),
    "an error with the status of an answer": (sized('{"error": "gone"}'), False, False),
    "no choices": (answered(choices=[]), False, False),
    "choices that are text": (answered(choices="many"), False, False),
    "a usage that is text": (answered(usage="many"), False, False),
    "a usage of text": (
        answered(usage={"prompt_tokens": "x", "completion_tokens": []}),
        True,
        False,
    ),
    "events": (PLAIN + SOUND, False, False),
}


def status(line: str, body: str = "", *lines: str) -> str:
    return head(*lines, status=f"HTTP/1.1 {line}") + body


# What is no answer, whatever was asked for, and whether the connection stays open.
FAILURES = {
    "no byte": ("", False),
    "half a head": ("HTTP/1.0 200 OK\r\nContent-Ty", False),
    "no status": ("HTTP/1.0\r\n\r\n" + SOUND, True),
    "a status that is no number": ("HTTP/1.0 fine OK\r\n\r\n" + SOUND, True),
    "no HTTP": ("SSH-2.0-OpenSSH_9.6\r\n\r\n", True),
    "a huge head": (head("X: " + "x" * 200_000) + SOUND, True),
    "another protocol": (status("101 Switching Protocols"), True),
    "no content": (status("204 No Content"), True),
    "a redirection": (
        status("302 Found", "", "Location: http://127.0.0.1/", "Content-Length: 0"),
        True,
    ),
    "not modified": (status("304 Not Modified"), True),
    "a length that is no number": (head("Content-Length: many") + SOUND, True),
    "a length below zero": (head("Content-Length: -1") + SOUND, True),
    "two lengths": (head("Content-Length: 5", "Content-Length: 6") + SOUND, True),
    **{
        f"{code} {name}": (status(f"{code} X", body), stays_open)
        for code in (400, 404, 500)
        for name, body, stays_open in (
            ("without a body", "", False),
            ("left open", "", True),
            ("with a page", "<h1>Sorry!</h1>", False),
            ("of no UTF-8", "\xff", False),
            ("with deep JSON", DEEP, False),
            ("with a deep error", '{"error": ' + "[" * 900 + "]" * 900 + "}", False),
            ("without an error in it", '["error"]', False),
            ("with an error that is none", '{"error": null}', False),
        )
    },
    "an error in chunks that are none": (
        status("500 X", "many\r\n", "Transfer-Encoding: chunked"),
        True,
    ),
}
MODES: dict[str, dict[str, Any]] = {
    "streamed": {"stream": True},
    "whole": {},
    "with log probabilities": {"logprobs": True},
}


@pytest.fixture(scope="module")
def shared(
    models: Path, program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    root = tmp_path_factory.mktemp("oddities")
    # A wait to the limit would end with another code, and with another backend.
    proxy = Proxy(root / "instance", models, MLX_SERVER_BIN=program, STALL_TIMEOUT=6)
    yield proxy.start()
    proxy.clean_up()


@pytest.fixture
def proxy(shared: Proxy, program: Path) -> Iterator[Proxy]:
    """The proxy; after the test, the next request is answered by the same backend."""
    assert shared.load("tiny/alpha").ok  # an earlier test may have cost it
    pid, before = shared.loaded()["pid"], len(shared.said())
    try:
        yield shared
    finally:
        scripted_server.change(program, **scripted_server.SCRIPT)
    for fields in MODES.values():
        assert shared.chat(**fields).ok
    assert shared.loaded()["pid"] == pid
    assert "Traceback" not in shared.said()[before:]


def said(answer: requests.Response, streamed: bool) -> str | None:
    """The text that the client got, or None if it got one error: the backend's failure."""
    body = answer.content.decode("latin-1")
    if not streamed or answer.status_code != 200:
        value = answer.json()
        if answer.status_code == 200:
            return str(value["choices"][0]["message"]["content"])
        assert (answer.status_code, value["error"]["code"]) == (502, "backend_failed")
        return None
    if not body.endswith("\n\n" + DONE):
        assert '"code": "backend_failed"' in body.removesuffix("\n\n").rpartition("\n\n")[2]
        assert body.count('data: {"error"') == 1
        return None
    assert ("\n\n" + body).count("\n\n" + DONE) == 1
    assert "late" not in body
    found = ""
    for line in body.splitlines():
        if line.startswith('data: {"id"') and (choices := json.loads(line[6:])["choices"]):
            found += choices[0]["delta"]["content"]
    return found


@pytest.mark.parametrize("mode", ["streamed", "whole"])
@pytest.mark.parametrize("oddity", STREAMS)
def test_an_odd_stream_is_passed_on_as_far_as_it_is_valid(
    proxy: Proxy, program: Path, oddity: str, mode: str
) -> None:
    it = STREAMS[oddity]
    scripted_server.change(program, wire=it.wire, stays_open=it.stays_open)
    answer = proxy.chat(**MODES[mode])
    got = said(answer, mode == "streamed")
    assert (got is not None) is (it.streamed if mode == "streamed" else it.whole)
    if it.streamed and it.whole:
        assert got == TEXT


@pytest.mark.parametrize("oddity", WHOLES)
def test_an_odd_answer_in_one_piece_is_passed_on_if_it_is_complete(
    proxy: Proxy, program: Path, oddity: str
) -> None:
    wire, good, stays_open = WHOLES[oddity]
    scripted_server.change(program, wire=wire, stays_open=stays_open)
    assert said(proxy.chat(logprobs=True), False) == (TEXT if good else None)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("oddity", FAILURES)
def test_an_invalid_answer_is_the_backends_failure(
    proxy: Proxy, program: Path, oddity: str, mode: str
) -> None:
    wire, stays_open = FAILURES[oddity]
    scripted_server.change(program, wire=wire, stays_open=stays_open)
    answer = proxy.chat(**MODES[mode])
    assert said(answer, mode == "streamed") is None
    assert answer.status_code == 502


@pytest.mark.parametrize("mode", MODES)
def test_a_1xx_answer_of_the_backend_is_skipped(proxy: Proxy, program: Path, mode: str) -> None:
    wire = sized(BODY) if mode == "with log probabilities" else PLAIN + SOUND
    scripted_server.change(program, wire=status("100 Continue") + status("103 Early Hints") + wire)
    assert said(proxy.chat(**MODES[mode]), mode == "streamed") == TEXT


@pytest.mark.parametrize("mode", ["streamed", "whole"])
def test_an_answer_that_arrives_byte_by_byte_is_the_same(
    proxy: Proxy, program: Path, mode: str
) -> None:
    scripted_server.change(program, wire=PLAIN + SOUND, piece_bytes=1)
    assert said(proxy.chat(**MODES[mode]), mode == "streamed") == TEXT


@pytest.mark.parametrize("mode", ["streamed", "whole"])
def test_an_endless_event_of_the_backend_ends_the_answer(
    proxy: Proxy, program: Path, mode: str
) -> None:
    assert proxy.process is not None
    process = psutil.Process(proxy.process.pid)
    before = process.memory_info().rss
    scripted_server.change(program, event_bytes=50_000_000)
    answer = proxy.chat(**MODES[mode])
    assert said(answer, mode == "streamed") is None
    assert "16 MiB" in answer.text
    assert process.memory_info().rss - before < 64 << 20


@pytest.mark.parametrize(
    "wire", [sized(DEEP), status("404 X", DEEP), status("404 X", '{"error": ' + DEEP)]
)
def test_an_unreadable_answer_to_the_first_probe_fails_the_load(
    shared: Proxy, program: Path, wire: str
) -> None:
    before = len(shared.said())
    scripted_server.change(program, wire=wire)
    try:
        answer = shared.load("tiny/beta")
    finally:
        scripted_server.change(program, **scripted_server.SCRIPT)
    assert answer.json()["error"]["code"] == "load_failed"
    assert "Traceback" not in shared.said()[before:]


def test_token_counts_that_are_no_numbers_stay_out_of_the_metrics(
    proxy: Proxy, program: Path
) -> None:
    usage = {"prompt_tokens": 10**400, "completion_tokens": "many"}
    scripted_server.change(program, wire=PLAIN + WORDS + chunk("", "stop") + count(usage) + DONE)
    assert proxy.chat().ok
    told = proxy.get("/metrics").text
    values = [it.value for family in text_string_to_metric_families(told) for it in family.samples]
    assert values
    assert max(values) < 1e15


@pytest.mark.parametrize("fields", MODES.values(), ids=MODES)
def test_a_server_without_our_additions_is_not_trusted_with_stop_words(
    proxy: Proxy, fields: dict[str, Any]
) -> None:
    answer = proxy.chat(stop="x", **fields)
    assert answer.ok
    assert answer.headers["X-Mlxproxy-Warning"].startswith("stop: ")
