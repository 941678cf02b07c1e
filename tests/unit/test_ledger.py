"""The soak's ledger finds what is wrong with an answer, and only that."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from tools.soak.ledger import Ledger, Seen, judge

ID = "soak-1"
ERROR = {"message": "Gone. Ask again.", "type": "server_error", "param": None}
FAILED = {"error": {**ERROR, "code": "backend_failed"}}


def event(data: object) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def chunk(text: str = "", finish: str | None = None, **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": finish, "delta": {"content": text}}
    return {"id": "a", "system_fingerprint": "7", "model": "m", "choices": [choice], **fields}


def words(*numbers: int, name: str = "alpha") -> bytes:
    return b"".join(event(chunk(f"{name}{number} ")) for number in numbers)


def end(tokens: int) -> bytes:
    usage = chunk(usage={"completion_tokens": tokens}, choices=[])
    return event(chunk(finish="length")) + event(usage) + event(b"[DONE]")


def stream(body: bytes, **facts: Any) -> Seen:
    return Seen("stream", ID, "stream", **{"tokens": 3, **answered(body), **facts})


def answered(body: bytes, status: int = 200, **headers: str) -> dict[str, Any]:
    shown = {"x-request-id": ID, **headers}
    return {"status": status, "headers": shown, "body": body, "ended": True}


def whole(text: str, tokens: int = 3, **facts: Any) -> Seen:
    answer = {
        "choices": [{"message": {"content": text}}],
        "usage": {"completion_tokens": tokens},
    }
    return Seen(
        "whole", ID, "whole", **{"tokens": 3, **answered(json.dumps(answer).encode()), **facts}
    )


@pytest.mark.parametrize(
    "seen",
    [
        stream(b":\n\n: loading alpha 2s\n\n" + words(0, 1, 2) + end(3)),
        stream(words(0, 1, 2) + end(3), model="alpha"),
        stream(event(chunk("....alpha0 alp")) + event(chunk("ha1 alpha2 ")) + end(3)),
        whole("alpha0 alpha1 alpha2 "),
        Seen("load", ID, **answered(b'{"status": "loaded"}')),
        Seen("load", ID, "progress", **answered(event({"status": "loaded"}))),
    ],
)
def test_a_complete_answer_is_counted_as_whole(seen: Seen) -> None:
    assert judge(seen).outcome == "whole", judge(seen).why


@pytest.mark.parametrize(
    "seen",
    [
        stream(words(0, 1) + event(FAILED)),
        stream(event(FAILED)),
        Seen("stream", ID, "stream", **answered(json.dumps(FAILED).encode(), 502)),
        Seen("whole", ID, "whole", **answered(json.dumps(FAILED).encode(), 502)),
        Seen("load", ID, "progress", **answered(event({"status": "loading"}) + event(FAILED))),
    ],
)
def test_a_readable_error_is_counted_as_a_failure_with_its_code(seen: Seen) -> None:
    verdict = judge(seen)
    assert (verdict.outcome, verdict.code) == ("failed", "backend_failed"), verdict.why


@pytest.mark.parametrize(
    "seen",
    [
        Seen("stream", ID, "stream", left=True),
        stream(words(0, 1) + b'data: {"id": "a", "cho', left=True, ended=False),
        Seen("whole", ID, "whole", left=True),
    ],
)
def test_a_disconnect_on_purpose_is_counted_as_such(seen: Seen) -> None:
    assert judge(seen).outcome == "left"


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (stream(words(0, 1)), "as if it were whole"),
        (stream(b":\n\n"), "as if it were whole"),
        (stream(words(0, 1, 2) + end(3), ended=False), "cut off"),
        (stream(words(0, 1, 2) + end(3), left=True, headers={}), "request id"),
        (stream(words(0, 2) + end(2), tokens=2), "word 2 where 1 was due"),
        (stream(words(0, 1, 1) + end(3)), "word 1 where 2 was due"),
        (stream(words(0, 2) + b"data: {", left=True), "word 2 where 1 was due"),
        (stream(words(0, 1) + end(2)), "2 words of 3"),
        (stream(words(0, 1, 2) + end(2)), "usage"),
        (stream(words(0, 1, 2) + event(b"[DONE]")), "usage"),
        (stream(words(0, 1, 2) + event(chunk(finish="stop")) + end(3)), "finished 2 times"),
        (stream(words(0) + words(1, 2, name="beta") + end(3)), "alpha and beta"),
        (stream(words(0, 1, 2) + end(3), model="beta"), "not by beta"),
        (stream(words(0) + event(chunk("alpha1 ", id="b"))), "several answers"),
        (stream(words(0) + event(FAILED) + event(b"[DONE]")), "[DONE] after the error"),
        (stream(event(FAILED) + words(0)), "after the error"),
        (stream(words(0, 1, 2) + end(3) + words(3)), "after [DONE]"),
        (stream(words(0) + b'data: {"id": "a\n\n' + event(FAILED)), "no JSON"),
        (stream(words(0) + b'data: {"id": "a'), "within an event"),
        (stream(words(0) + event({"error": "text"})), "no shape"),
        (
            stream(words(0) + event({"error": {**ERROR, "code": "internal_error"}})),
            "internal_error",
        ),
        (stream(b""), "empty body"),
        (whole("", **answered(b"")), "empty body"),
        (whole("alpha0 alpha1 "), "2 words of 3"),
        (whole("alpha0 alpha1 alpha2", 4), "usage"),
        (whole("alpha0 alpha1 what", 3), "no model says"),
        (whole("", **answered(json.dumps(FAILED).encode(), 200)), "shape of an answer"),
        (whole("", **answered(json.dumps(FAILED).encode(), 500)), "with the status 500"),
        (whole("", **answered(b"Bad Gateway", 502)), "no JSON"),
        (Seen("load", ID, **answered(json.dumps(FAILED).encode())), "with an error in it"),
        (
            Seen("load", ID, "progress", **answered(event({"status": "loading"}))),
            "ends with loading",
        ),
        (Seen("look", ID, limit=1.0, seconds=1.5, **answered(b"{}")), "more than 1 s"),
        (Seen("look", ID, trouble="no end within 90 s"), "no end within 90 s"),
        (Seen("look", ID), "no answer"),
    ],
)
def test_any_other_outcome_is_wrong_and_says_why(seen: Seen, why: str) -> None:
    verdict = judge(seen)
    assert verdict.outcome == "wrong"
    assert why in verdict.why


def test_a_429_without_retry_after_is_wrong() -> None:
    body = json.dumps({"error": {**ERROR, "code": "too_many_requests"}}).encode()
    assert judge(Seen("x", ID, **answered(body, 429))).outcome == "wrong"
    assert judge(Seen("x", ID, **answered(body, 429, **{"retry-after": "5"}))).outcome == "failed"


def test_an_error_without_a_cause_is_wrong() -> None:
    verdict = judge(stream(words(0) + event(FAILED)), codes={"model_swapped"})
    assert verdict.outcome == "wrong"
    assert "backend_failed has no cause" in verdict.why


def test_the_ledger_balances_until_one_entry_is_wrong() -> None:
    ledger = Ledger()
    assert not ledger.balanced  # nothing was asked
    ledger.enter("calm", stream(words(0, 1, 2) + end(3)))
    ledger.enter("calm", stream(event(FAILED)))
    assert ledger.balanced
    ledger.enter("calm", stream(words(0)))
    assert not ledger.balanced
    assert ledger.total() == {"whole": 1, "failed": 1, "wrong": 1}
    said = io.StringIO()
    ledger.print(Console(file=said, width=100))
    assert f"WRONG [calm] {ID} (stream): ends after 1 words" in said.getvalue()
    assert "backend_failed" in said.getvalue()


def test_the_ledger_does_not_balance_with_a_process_too_many() -> None:
    ledger = Ledger()
    ledger.enter("calm", stream(words(0, 1, 2) + end(3)))
    ledger.wrong("calm", "processes", "2 backends at once")
    assert not ledger.balanced


@pytest.mark.parametrize(("begun", "balanced"), [(9.0, True), (12.5, False), (5.0, False)])
def test_a_cancelled_request_is_wrong_without_an_unload_at_that_time(
    begun: float, balanced: bool
) -> None:
    ledger = Ledger()
    ledger.enter("calm", Seen("unload", ID, begun=10, seconds=2, **answered(b"{}")))
    body = json.dumps({"error": {**ERROR, "code": "load_cancelled"}}).encode()
    ledger.enter("calm", Seen("load", ID, begun=begun, seconds=2, **answered(body, 409)))
    ledger.require_unloads("calm")
    assert ledger.balanced is balanced
