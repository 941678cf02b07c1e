"""The records of the soak: what clients saw of their answers, each one judged and counted.

An answer is ``whole``, or ``failed`` with an error that its client can read, or its client ``left``
on purpose. Any other answer is ``wrong``: cut off without an error, late, empty, out of order.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Json = dict[str, Any]
Shape = Literal["stream", "whole", "progress", "plain"]
Outcome = Literal["whole", "failed", "left", "wrong"]

OUTCOMES: tuple[Outcome, ...] = ("whole", "failed", "left", "wrong")
# The contract's errors that a client may get for the events of a soak, and their status.
STATUS = {
    "load_cancelled": 409,
    "too_many_requests": 429,
    "load_failed": 500,
    "backend_failed": 502,
    "no_model_loaded": 503,
    "model_swapped": 503,
    "model_unloaded": 503,
    "shutting_down": 503,
    "load_timeout": 504,
    "backend_timeout": 504,
}
DONE = b"[DONE]"
SHOWN = 10  # maximum number of problems of one kind that are printed in full

_WORD = re.compile(r"\.*([a-z]+)(\d+)")


@dataclass
class Seen:
    """One request, and what its client saw of the answer, byte for byte.

    Attributes:
        row: what the client did, which names the row of the table.
        shape: ``stream`` and ``whole`` are answers of a model, ``progress`` is a load as events,
            ``plain`` is any other JSON.
        model: the only model that may have answered; None: any model, but only one.
        tokens: the required length of the answer.
        limit: seconds within which the answer must have ended.
        ended: the end was a proper one (a chunk terminator, or all of Content-Length).
        left: the client disconnected before the end, as intended.
        trouble: what went wrong on the connection.
        begun: when the request was sent (monotonic seconds); it ended `seconds` later.
    """

    row: str
    request_id: str
    shape: Shape = "plain"
    model: str | None = None
    tokens: int = 0
    limit: float = 90.0
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    ended: bool = False
    left: bool = False
    trouble: str = ""
    begun: float = field(default_factory=time.monotonic)
    seconds: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """The judgement of an answer; `code` is the error's if it failed, `why` says what is wrong."""

    outcome: Outcome
    code: str = ""
    why: str = ""


class Wrong(Exception):
    """An answer that no client may see."""


def judge(seen: Seen, codes: Iterable[str] = STATUS) -> Verdict:
    """Return the verdict on one answer.

    Args:
        codes: the codes of the errors that may occur here.
    """
    try:
        if seen.left:
            _require_good_so_far(seen)
            return Verdict("left")
        code = _judge(seen)
    except Wrong as wrong:
        return Verdict("wrong", why=str(wrong))
    if code and code not in codes:
        return Verdict("wrong", code, f"{code} has no cause here: {_excerpt(seen.body)}")
    return Verdict("failed", code) if code else Verdict("whole")


def _judge(seen: Seen) -> str:
    """Return the code of the error that the client got, or an empty text for a whole answer."""
    if seen.trouble:
        raise Wrong(seen.trouble)
    if seen.status is None:
        raise Wrong("no answer")
    _require_id(seen)
    if seen.seconds > seen.limit:
        raise Wrong(f"took {seen.seconds:.1f} s, more than {seen.limit:g} s")
    if not seen.ended:
        raise Wrong(f"cut off after {_excerpt(seen.body)}")
    if seen.status >= 400:
        return _error(_parsed(seen.body), seen.status, seen.headers)
    if not seen.body:
        raise Wrong(f"{seen.status} with an empty body")
    if seen.shape == "stream":
        return _stream(seen)
    if seen.shape == "progress":
        return _progress(seen)
    answer = _parsed(seen.body)
    if seen.shape == "whole":
        _whole(seen, answer)
    elif "error" in answer:
        raise Wrong(f"{seen.status} with an error in it")
    return ""


def _stream(seen: Seen) -> str:
    chunks, last = _chunks(seen.body), _payloads(seen.body)[-1:]
    words = _words(seen, chunks)
    failed = bool(chunks) and "error" in chunks[-1]
    if failed and last == [DONE]:
        raise Wrong("[DONE] after the error")
    if failed:
        return _error(chunks[-1])
    if last == [DONE]:
        usage = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
        _require_whole(seen, words, usage[-1] if usage else {})
        finished = [it for chunk in chunks for it in chunk["choices"] if it["finish_reason"]]
        if len(finished) != 1:
            raise Wrong(f"finished {len(finished)} times")
        return ""
    raise Wrong(f"ends after {len(words)} words as if it were whole")


def _progress(seen: Seen) -> str:
    chunks = _chunks(seen.body)
    if not chunks:
        raise Wrong("no event at all")
    if "error" in chunks[-1]:
        return _error(chunks[-1])
    if chunks[-1].get("status") != "loaded":
        raise Wrong(f"ends with {chunks[-1].get('status')}")
    return ""


def _whole(seen: Seen, answer: Json) -> None:
    try:
        text = answer["choices"][0]["message"]["content"] or ""
    except (KeyError, IndexError, TypeError):
        raise Wrong(f"not the shape of an answer: {_excerpt(seen.body)}") from None
    _require_whole(seen, _numbered(seen, text), answer.get("usage") or {})


def _require_whole(seen: Seen, words: list[int], usage: Json) -> None:
    if len(words) != seen.tokens:
        raise Wrong(f"{len(words)} words of {seen.tokens}")
    if usage.get("completion_tokens") != seen.tokens:
        raise Wrong(f"its usage is not that of {seen.tokens} words: {usage}")


def _require_good_so_far(seen: Seen) -> None:
    """Check that what a client saw before it left is the beginning of a correct answer."""
    if seen.status is None or not seen.body:
        return
    _require_id(seen)
    if seen.shape == "stream" and seen.status == 200:
        whole_frames = seen.body[: seen.body.rfind(b"\n\n") + 2]
        _words(seen, _chunks(whole_frames))


def _words(seen: Seen, chunks: list[Json]) -> list[int]:
    """Return the numbers of a stream's words, which all come from one process."""
    if any("error" in chunk for chunk in chunks[:-1]):
        raise Wrong("events after the error")
    answers = [chunk for chunk in chunks if "error" not in chunk]
    origins = {(it.get("id"), it.get("system_fingerprint"), it.get("model")) for it in answers}
    if len(origins) > 1:
        raise Wrong(f"one stream from several answers: {sorted(map(str, origins))}")
    deltas = [choice.get("delta", {}) for it in answers for choice in it.get("choices", ())]
    return _numbered(seen, "".join(delta.get("content") or "" for delta in deltas))


def _numbered(seen: Seen, text: str) -> list[int]:
    """Return the numbers of the words of an answer: 0, 1, 2, … of one model."""
    matches = [_WORD.fullmatch(word) for word in text.split()]
    if None in matches:
        raise Wrong(f"words that no model says: {text[:80]!r}")
    found = [(match[1], int(match[2])) for match in matches if match is not None]
    models = {name for name, _ in found}
    if len(models) > 1 or (seen.model is not None and not models <= {seen.model}):
        raise Wrong(f"answered by {' and '.join(sorted(models))}, not by {seen.model or 'one'}")
    numbers = [number for _, number in found]
    if numbers != list(range(len(numbers))):
        first = next(at for at, number in enumerate(numbers) if at != number)
        raise Wrong(f"word {numbers[first]} where {first} was due")
    return numbers


def _payloads(body: bytes) -> list[bytes]:
    """Return the data of the events of a stream, without the comments."""
    if not body.endswith(b"\n\n"):
        raise Wrong(f"ends within an event: {_excerpt(body[-80:])}")
    lines = [line for line in body.split(b"\n") if line and not line.startswith(b":")]
    if odd := [line for line in lines if not line.startswith(b"data: ")]:
        raise Wrong(f"no line of an event: {_excerpt(odd[0])}")
    return [line[len(b"data: ") :] for line in lines]


def _chunks(body: bytes) -> list[Json]:
    """Return the events of a stream as JSON, without [DONE], which may only be the last."""
    if not body:
        return []
    payloads = _payloads(body)
    if DONE in payloads[:-1]:
        raise Wrong("events after [DONE]")
    return [_parsed(payload) for payload in payloads if payload != DONE]


def _error(
    answer: Json, status: int | None = None, headers: Mapping[str, str] | None = None
) -> str:
    """Return the code of an error in the contract's shape; `status` is None within a stream."""
    error = answer.get("error")
    if not isinstance(error, dict) or not {"message", "type", "param", "code"} <= error.keys():
        raise Wrong(f"an error in no shape of the contract's: {_excerpt(json.dumps(answer))}")
    code = error["code"]
    if code not in STATUS:
        raise Wrong(f"the error {code}: {error['message']}")
    if status not in (None, STATUS[code]):
        raise Wrong(f"{code} with the status {status}")
    if not error["message"]:
        raise Wrong(f"{code} without a message")
    if status == 429 and not (headers or {}).get("retry-after", "").isdigit():
        raise Wrong("429 without Retry-After")
    return str(code)


def _require_id(seen: Seen) -> None:
    if seen.headers.get("x-request-id") != seen.request_id:
        raise Wrong(f"the request id is {seen.headers.get('x-request-id')}")


def _parsed(data: bytes) -> Json:
    try:
        value = json.loads(data)
    except ValueError:
        raise Wrong(f"no JSON: {_excerpt(data)}") from None
    if not isinstance(value, dict):
        raise Wrong(f"no object: {_excerpt(data)}")
    return value


def _excerpt(data: bytes | str) -> str:
    text = data if isinstance(data, str) else data.decode("utf-8", "replace")
    return repr(text if len(text) < 300 else f"{text[:140]} … {text[-140:]}")


@dataclass(frozen=True)
class Problem:
    """Something wrong: `about` is a request's id, or the thing that was checked."""

    phase: str
    about: str
    row: str
    why: str


class Ledger:
    """All verdicts, counted. May be used by many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[str, Counter[Outcome]] = {}
        self._slowest: dict[str, float] = {}
        self._codes: Counter[tuple[str, str]] = Counter()
        self._facts: list[tuple[str, str, str]] = []
        self._unloads: list[Seen] = []
        self._cancelled: list[Seen] = []
        self.problems: list[Problem] = []

    def enter(self, phase: str, seen: Seen, codes: Iterable[str] = STATUS) -> Verdict:
        """Judge an answer and record it."""
        verdict = judge(seen, codes)
        with self._lock:
            self._rows.setdefault(seen.row, Counter())[verdict.outcome] += 1
            self._slowest[seen.row] = max(self._slowest.get(seen.row, 0.0), seen.seconds)
            if verdict.code:
                self._codes[phase, verdict.code] += 1
            if seen.row.startswith("unload"):
                self._unloads.append(seen)
            if verdict.code == "load_cancelled":
                self._cancelled.append(seen)
            if verdict.outcome == "wrong":
                self.problems.append(Problem(phase, seen.request_id, seen.row, verdict.why))
        return verdict

    def require_unloads(self, phase: str) -> None:
        """Check that each cancelled load was cancelled by an unload in flight at the same time.

        An unload whose client has left may remain in flight after that, for a few seconds.
        """
        with self._lock:
            cancelled, self._cancelled = self._cancelled, []
            unloads, self._unloads = self._unloads, []
        spans = [(it.begun, it.begun + it.seconds + (10 if it.left else 0)) for it in unloads]
        for seen in cancelled:
            ended = seen.begun + seen.seconds
            if not any(seen.begun < end and begin < ended for begin, end in spans):
                self.wrong(phase, seen.request_id, f"{seen.row}: cancelled, and nobody unloaded")

    def wrong(self, phase: str, about: str, why: str) -> None:
        """Record a problem other than an answer: a process, thread or socket too many."""
        with self._lock:
            self.problems.append(Problem(phase, about, "afterwards", why))

    def fact(self, phase: str, name: str, value: str) -> None:
        """Record a figure that is only displayed."""
        with self._lock:
            self._facts.append((phase, name, value))

    @property
    def balanced(self) -> bool:
        """Whether there were answers, and nothing was wrong."""
        return bool(self._rows) and not self.problems

    def total(self) -> Counter[Outcome]:
        """Return how many answers there were of each outcome."""
        with self._lock:
            return sum(self._rows.values(), Counter())

    def print(self, console: Console) -> None:
        """Print the records as tables, then each problem (only the first few of each kind)."""
        for table in self._tables():
            console.print(table)
        for line in self._told():
            console.print(escape(line), soft_wrap=True, highlight=False)

    def _tables(self) -> Iterator[Table]:
        answers = Table("requests", title="The ledger", title_justify="left")
        for name in ("asked", *OUTCOMES, "slowest"):
            answers.add_column(name, justify="right")
        for row in sorted(self._rows):
            count = self._rows[row]
            figures = [str(sum(count.values())), *(str(count[it] or "") for it in OUTCOMES)]
            answers.add_row(row, *figures, f"{self._slowest[row]:.1f} s")
        total = self.total()
        answers.add_section()
        figures = [str(sum(total.values())), *(str(total[it] or "") for it in OUTCOMES)]
        answers.add_row("all", *figures, "")
        yield answers
        phases = list(dict.fromkeys(phase for phase, _ in self._codes))
        errors = Table("errors that were read", *phases, title_justify="left")
        for code in sorted({code for _, code in self._codes}):
            errors.add_row(code, *(str(self._codes[it, code] or "") for it in phases))
        yield errors
        names = list(dict.fromkeys(name for _, name, _ in self._facts))
        phases = list(dict.fromkeys(phase for phase, _, _ in self._facts))
        facts = Table("the proxy", *phases, title_justify="left")
        value = {(phase, name): shown for phase, name, shown in self._facts}
        for name in names:
            facts.add_row(name, *(value.get((phase, name), "") for phase in phases))
        yield facts

    def _told(self) -> Iterator[str]:
        shown: Counter[tuple[str, str]] = Counter()
        for problem in self.problems:
            kind = (problem.row, re.sub(r"\d+|'.*", "", problem.why)[:40])
            shown[kind] += 1
            if shown[kind] <= SHOWN:
                yield f"WRONG [{problem.phase}] {problem.about} ({problem.row}): {problem.why}"
        for (row, _), count in shown.items():
            if count > SHOWN:
                yield f"… and {count - SHOWN} more like these ({row})"
