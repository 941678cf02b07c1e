"""Log lines, events and metrics: what the proxy is doing.

``GET /v1/logs`` answers with the last lines as text, or follows the log as server-sent events.
``GET /v1/events`` sends a ``snapshot`` first and then, each with ``at`` in Unix seconds:

=================== ================================================================================
``state``           the controller's state has changed: the whole state, as in the snapshot
``load``            a load's slot, phase, seconds and (if known) bytes; sent every second
``loaded``          a load has succeeded: ``slot``, ``id``, ``seconds``
``death``           a backend has exited by itself: ``slot``, ``id``, ``reason``
``request_started`` ``id``, ``client``, ``method``, ``path``
``request``         a request has ended: the same, ``status``, ``seconds``, and for an answer by the
                    model ``model``, ``outcome``, ``tokens_in``, ``cached_tokens``, ``tokens_out``,
                    ``waited``, ``first_token``, ``tokens_per_second``
``figures``         with ``?figures=true``, every second while an answer or a load is under way:
                    ``answers``, ``models`` (each with its speed and memory), the memory budget;
                    each snapshot then has ``curves``: by the id of each model that has answered,
                    ``tokens_per_second`` and ``first_token`` (seconds) in each of the 300 seconds
                    before ``at``, the oldest first, of the answers that have ended
``lost``            the reader was too slow: ``count`` events are lost, a new snapshot follows
=================== ================================================================================
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, request

from mlxproxy import sse
from mlxproxy.blueprints import shapes
from mlxproxy.blueprints.hooks import client as asker
from mlxproxy.blueprints.hooks import disconnect, recorder
from mlxproxy.blueprints.peering import described as described_peers
from mlxproxy.blueprints.services import Services, services
from mlxproxy.controller.state import Snapshot
from mlxproxy.disconnect import Disconnect
from mlxproxy.errors import InvalidRequest, NotFound
from mlxproxy.observability.events import Subscriber
from mlxproxy.observability.logtail import LogTail

blueprint = Blueprint("observe", __name__)

KEEPALIVE = 15.0  # seconds of silence after which a follower gets a comment
TICK = 1.0  # seconds between two progress events of a load
LOG_POLL = 0.25  # seconds; the file's writer may lag a little behind the event
LINES, MOST_LINES = 200, 10_000
SOURCES = ("proxy", "backend")
EVENTS = ("state", "load", "loaded", "death", "request_started", "request")


@blueprint.get("/v1/logs")
def logs() -> Response:
    """Return the last lines of the proxy's or a backend's log; with `follow=true`, follow it.

    With several backends, `port` says which one is meant; by default it is the first.
    """
    parts = services()
    source = request.args.get("source", SOURCES[0])
    if source not in SOURCES:
        raise InvalidRequest("source must be proxy or backend.", param="source")
    path = _backend_log(parts) if source == "backend" else parts.settings.instance.log(source)
    lines = _lines()
    if not _flag("follow", False):
        with LogTail(path, lines) as tail:
            return Response(tail.read(), mimetype="text/plain")
    client = disconnect()
    return _followed(
        parts, client, (f"{source}_log",), lambda it: _log_events(parts, client, it, path, lines)
    )


@blueprint.get("/v1/events")
def events() -> Response | dict[str, Any]:
    """Stream what happens, as it happens; with `follow=false`, return just the snapshot as JSON."""
    parts = services()
    if not _flag("follow", True):
        return snapshot(parts)
    client, wants_figures = disconnect(), _flag("figures", False)
    return _followed(parts, client, EVENTS, lambda it: _events(parts, client, it, wants_figures))


@blueprint.delete("/v1/answers/<name>")
def end_answer(name: str) -> dict[str, Any]:
    """End one answer, or a request that waits for one; its client gets an error that says so."""
    if not services().answers.abort(name):
        raise NotFound("There is no such answer; it has probably just ended.")
    return {"status": "ended"}


@blueprint.get("/metrics")
def metrics() -> Response:
    """Return the counts since the start, for Prometheus."""
    from mlxproxy.observability import (
        prometheus,  # imports prometheus_client, so not before somebody asks
    )

    controller = services().controller
    body, content_type = prometheus.render(
        services().metrics.counts(),
        controller.describe(),
        controller.memory(),
        request.headers.get("Accept", ""),
        described_peers(services()).get("peers", ()),
    )
    return Response(body, content_type=content_type)


def snapshot(parts: Services) -> dict[str, Any]:
    """Return the state as the controller describes it, with speed (tokens/s) and memory (bytes)."""
    spec = parts.controller.current()
    described = parts.controller.describe()
    told = shapes.state(described)
    figures = _figures(parts, described)
    for model, figure in zip(told["models"], figures["models"], strict=True):
        model.update(figure)
    return {
        **told,
        **{name: value for name, value in figures.items() if name != "models"},
        "weights_bytes": spec.model.weights_bytes if spec is not None else None,
        **described_peers(parts),
    }


def _first(parts: Services, wants_figures: bool) -> dict[str, Any]:
    """Return what a follower is told first: with `figures`, also the curves that those continue."""
    told = snapshot(parts)
    if wants_figures:
        told["curves"] = parts.metrics.curves.describe(time.monotonic())
    return told


def _figures(parts: Services, described: Snapshot) -> dict[str, Any]:
    """Return what changes while answers go on: the answers, speeds (tokens/s), memory (bytes)."""
    held, budget = parts.controller.memory(), parts.controller.budget()
    under_way = parts.answers.stats()
    models = [
        {
            "slot": slot.id,
            "in_flight": slot.in_flight,
            "waiting": slot.waiting,
            "memory_bytes": held.get(slot.id),
            "tokens_per_second": parts.metrics.speed(under_way, slot.occupant.model_id),
        }
        for slot in described.slots
        if slot.occupant is not None
    ]
    return {
        "models": models,
        "in_flight": described.in_flight,
        "waiting": described.waiting,
        "tokens_per_second": parts.metrics.speed(under_way),
        "memory_bytes": sum(held.values()),
        "memory_budget_bytes": None if budget == sys.maxsize else budget,
        "answers": parts.answers.describe(),
        "operations": _operations(parts, described),
    }


def _operations(parts: Services, described: Snapshot) -> list[dict[str, Any]]:
    """Return what is under way; each load with its progress."""
    told = [shapes.progress(each) for each in parts.controller.loads()]
    progress = {each["model_id"]: each for each in told}
    return [{**each, **progress.get(each["model_id"], {})} for each in shapes.operations(described)]


def _followed(
    parts: Services,
    client: Disconnect,
    kinds: tuple[str, ...],
    stream: Callable[[Subscriber], Iterator[bytes]],
) -> Response:
    """Return the stream as a response that unsubscribes when it ends, however it ends.

    Raises:
        TooManyRequests: too many clients are following already.
    """
    if request.method == "HEAD":
        return Response(headers=sse.HEADERS)
    subscription = parts.bus.subscribe(*kinds, client=asker())
    response = Response(stream(subscription), headers=sse.HEADERS)
    client.on_leave(subscription.wake)
    record = recorder()

    def end() -> None:
        parts.bus.unsubscribe(subscription)
        record(response.status_code, None)

    response.call_on_close(end)  # a generator that was never started runs no `finally`
    return response


def _events(
    parts: Services, client: Disconnect, subscription: Subscriber, wants_figures: bool
) -> Iterator[bytes]:
    lost, busy = 0, False
    yield _event("snapshot", _first(parts, wants_figures))
    tick = said = time.monotonic()
    while not (parts.bus.closed or client.gone):
        event = subscription.get(max(0.0, tick + TICK - time.monotonic()))
        if subscription.lost > lost:
            yield _event("lost", {"count": subscription.lost - lost})
            yield _event("snapshot", _first(parts, wants_figures))
            lost = subscription.lost
        if event is not None:
            yield _event(*event)
            said = time.monotonic()
        if (now := time.monotonic()) < tick + TICK:
            continue
        tick, described = now, parts.controller.describe()
        operations = _operations(parts, described)
        for each in operations:
            if each["kind"] == "load":
                yield _event("load", each)
                said = now
        # One more after the last answer, so that nobody believes that it goes on.
        was_busy, busy = busy, bool(described.in_flight or described.waiting or operations)
        if wants_figures and (busy or was_busy):
            yield _event("figures", _figures(parts, described))
            said = now
        if now - said >= KEEPALIVE:
            yield sse.comment("keepalive")
            said = now


def _log_events(
    parts: Services, client: Disconnect, subscription: Subscriber, path: Path, lines: int
) -> Iterator[bytes]:
    """Yield the log's lines from its file; the subscription only says when to look at it."""
    silent = 0.0
    yield sse.comment()  # so that the head is sent: the first line may take long to come
    with LogTail(path, lines) as tail:
        while not (parts.bus.closed or client.gone):
            if text := tail.read():
                yield sse.text(text)
                silent = 0.0
            elif silent >= KEEPALIVE:
                yield sse.comment("keepalive")
                silent = 0.0
            elif subscription.get(LOG_POLL) is None:
                silent += LOG_POLL


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return sse.event({"at": round(time.time(), 3), **data}, kind)


def _flag(name: str, default: bool) -> bool:
    value = request.args.get(name)
    if value is None:
        return default
    if value.lower() not in ("true", "false", "1", "0"):
        raise InvalidRequest(f"{name} must be true or false.", param=name)
    return value.lower() in ("true", "1")


def _backend_log(parts: Services) -> Path:
    ports = parts.settings.backend_ports
    given = request.args.get("port", str(ports.start))
    if given not in map(str, ports):
        told = " or ".join(map(str, ports))
        raise InvalidRequest(f"port must be that of a backend: {told}.", param="port")
    return parts.settings.instance.backend_log(int(given), ports.start)


def _lines() -> int:
    value = request.args.get("lines", str(LINES))
    if not re.fullmatch("[0-9]{1,5}", value) or int(value) > MOST_LINES:
        raise InvalidRequest(f"lines must be a whole number from 0 to {MOST_LINES}.", param="lines")
    return int(value)
