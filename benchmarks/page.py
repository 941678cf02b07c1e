"""The page: when it is painted, how large it is, and what it costs the streams that it watches."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from typing import Any, ClassVar

from benchmarks import load
from benchmarks.contestants import MODEL, Proxy, standin_in
from benchmarks.figures import Figure, Goal
from benchmarks.load import Outcome, Work
from benchmarks.part import Place
from benchmarks.sheet import Sheet, spread
from tests.support import browser

EVENTS = "/v1/events?figures=true"  # what the page reads, as long as it is open
WORK = Work(streams=32, events=500, interval=10, model=MODEL)
QUICK = Work(streams=32, events=200, interval=10, model=MODEL)
ROUNDS = 8
PAINTS = 5
READY_SECONDS = 30.0
PAINT = """() => new Promise((resolve) => {
    const name = "first-contentful-paint";
    new PerformanceObserver((list, observer) => {
        for (const entry of list.getEntriesByName(name)) {
            observer.disconnect();
            resolve(entry.startTime);
        }
    }).observe({ type: "paint", buffered: true });
})"""

NOTE = f"""\
The page is painted in a browser that has nothing of it yet, on the same machine; its size is that
of all its files. What an open page costs is measured with {WORK.streams} streams, by turns with and
without a reader that follows `{EVENTS}` as the page does; "added" is the median of the rounds' own
differences, in percent of one core, and "x closed" that of their quotients."""


@dataclass
class Page:
    """One value from each round.

    Attributes:
        size: bytes of all files of the page.
        paint: milliseconds from the navigation to the first text on the screen.
        unpainted: why that was not measured.
        alone, watched: 32 streams, without and with an open page.
        rate: events per second of them.
    """

    size: int = 0
    paint: list[float] = field(default_factory=list)
    unpainted: str = ""
    alone: list[Outcome] = field(default_factory=list)
    watched: list[Outcome] = field(default_factory=list)
    rate: float = 0.0
    day: str = field(default_factory=lambda: date.today().isoformat())

    NAME: ClassVar = "page"
    ALWAYS: ClassVar = True
    NOTE: ClassVar = NOTE

    @classmethod
    def measure(cls, place: Place, quick: bool) -> Page:
        """Measure everything; the paint only where there is a browser."""
        measured, work = cls(), QUICK if quick else WORK
        measured.rate = work.streams * 1000 / work.interval
        with Proxy(place.folder, place.models, standin_in(place.folder)).running() as proxy:
            proxy.load(MODEL)
            place.say("the page in a browser")
            measured.size = _size(proxy.port)
            measured.unpainted = _why_not()
            if not measured.unpainted:
                measured.paint = _paints(proxy.port, 1 if quick else PAINTS)
            place.say(f"{work.streams} streams, with and without an open page")
            for number in range(1 if quick else ROUNDS):
                for is_watched in (False, True) if number % 2 else (True, False):
                    with _open_page(proxy.port) if is_watched else contextlib.nullcontext():
                        outcome = load.run(proxy.port, [proxy.pid], work)
                    if outcome.broken:
                        raise RuntimeError(f"{outcome.broken} streams were not whole")
                    (measured.watched if is_watched else measured.alone).append(outcome)
        return measured

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Page:
        """Return what `dataclasses.asdict` and JSON have converted."""
        runs = {name: [Outcome(**it) for it in stored[name]] for name in ("alone", "watched")}
        return cls(**{**stored, **runs})

    def figure(self, name: str, attribute: str) -> Figure:
        return Figure([getattr(one, attribute) for one in getattr(self, name)])

    def cpu(self, name: str) -> Figure:
        """Return the proxy's processor time, in percent of one core."""
        each = self.figure(name, "cpu_per_event").rounds
        return Figure([value * self.rate / 1e4 for value in each])

    def added_cpu(self) -> Figure:
        """Return the percent of one core that an open page costs."""
        return self.cpu("watched").above(self.cpu("alone"))

    def delay(self) -> Figure:
        """Return an event's p99 with an open page, divided by that without, round by round."""
        return self.figure("watched", "p99").over(self.figure("alone", "p99"))

    def goals(self) -> Iterator[Goal]:
        """Yield the goals."""
        yield Goal("first paint of the page", Figure(self.paint).median, 300, "ms")
        yield Goal("the page, in all", self.size / 1000, 150, "kB")
        yield Goal("processor time, page open", self.added_cpu().median, 1.0, "% of a core")
        yield Goal("event p99, page open", self.delay().median, 1.1, "x closed")

    def sheets(self) -> Iterator[Sheet]:
        """Yield the tables."""
        table = Sheet(f"The page ({self.day})", ("", ""))
        paint = spread(Figure(self.paint), 0) or f"not measured: {self.unpainted}"
        table.add("first paint, ms", paint)
        table.add("all files, kB", f"{self.size / 1000:.0f}")
        yield table
        table = Sheet(
            f"{WORK.streams} streams and an open page ({self.day})",
            ("page", "CPU, %\nof a core", "added", "event\np50, µs", "event\np99, µs", "x closed"),
        )
        for head, name in (("closed", "alone"), ("open", "watched")):
            is_open = name == "watched"
            table.add(
                head,
                spread(self.cpu(name), 1),
                spread(self.added_cpu(), 2) if is_open else "",
                spread(self.figure(name, "p50"), 0),
                spread(self.figure(name, "p99"), 0),
                f"{self.delay().median:.2f}" if is_open else "",
            )
        yield table


def _size(port: int) -> int:
    """Return the bytes of the document and of all files that it names."""
    document = _file(port, "/")
    return len(document) + sum(
        len(_file(port, path)) for path in set(re.findall(r'"(/page/[^"]+)"', document.decode()))
    )


def _file(port: int, path: str) -> bytes:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as it:
        it.request("GET", path, headers={"Accept": "text/html"})
        response = it.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{path}: status {response.status}")
        return response.read()


def _why_not() -> str:
    """Return why the page cannot be painted; nothing if it can."""
    if importlib.util.find_spec("playwright") is None:
        return "Playwright is not installed (pip install playwright)"
    return "" if browser.program() else browser.MISSING


def _paints(port: int, rounds: int) -> list[float]:
    """Return the milliseconds to the first paint, each time in a browser without anything of it."""
    from playwright.sync_api import sync_playwright

    paints = []
    with sync_playwright() as started:
        chromium = started.chromium.launch(
            executable_path=browser.program(), args=list(browser.ARGUMENTS)
        )
        for number in range(rounds + 1):
            context = chromium.new_context()
            page = context.new_page()
            page.goto(f"http://127.0.0.1:{port}/")
            if number:  # in the first, the browser itself starts
                paints.append(float(page.evaluate(PAINT)))
            context.close()
        chromium.close()
    return paints


@contextlib.contextmanager
def _open_page(port: int) -> Iterator[None]:
    """Follow the events for the block, from another process, as a browser does."""
    context = get_context("spawn")
    ready = context.Event()
    reader = context.Process(target=_follow, args=(port, ready), daemon=True)
    reader.start()
    try:
        if not ready.wait(READY_SECONDS):
            raise RuntimeError("the reader of the events has no snapshot")
        yield
        if not reader.is_alive():
            raise RuntimeError("the reader of the events has ended")
    finally:
        reader.terminate()
        reader.join(READY_SECONDS)


def _follow(port: int, ready: Event) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", EVENTS)
    response = connection.getresponse()
    while line := response.readline():
        if line.startswith(b"event: snapshot"):
            ready.set()
