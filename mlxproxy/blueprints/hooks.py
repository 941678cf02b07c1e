"""Hooks around every request: access checks, its id, its log line, the shape of errors."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from flask import Flask, Request, Response, g, jsonify, request
from werkzeug.exceptions import (
    BadRequest,
    HTTPException,
    RequestEntityTooLarge,
)
from werkzeug.exceptions import (
    MethodNotAllowed as WerkzeugMethodNotAllowed,
)

from mlxproxy import sse
from mlxproxy.backend.protocol import Unmet
from mlxproxy.blueprints import page
from mlxproxy.blueprints.auth import LINKED_PATHS
from mlxproxy.blueprints.services import services
from mlxproxy.dialects.chat_events import Relayed
from mlxproxy.dialects.errors import dialect_of, rendered
from mlxproxy.disconnect import Disconnect
from mlxproxy.errors import (
    InternalError,
    InvalidJSON,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    ProxyError,
    RequestTooLarge,
)
from mlxproxy.observability import logs
from mlxproxy.relay.statistics import AnswerStats
from mlxproxy.server.head import LONGEST_METHOD
from mlxproxy.server.headers import SECURITY_HEADERS, request_id

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger("mlxproxy.request")

OPEN_PATHS = ("/health",)  # need no API key
QUIET_PATHS = ("/health", "/metrics")  # polled every few seconds, so logged at DEBUG only
# A body of nothing but small values is thirty times as large once parsed, and everything else
# stalls meanwhile. This is ten times the commas of the longest prompt that fits into any context.
MAX_VALUES = 250_000
VALUE_BYTES = 64  # of an empty list, the smallest value that is an object of its own
HOPS = "HTTP_X_MLXPROXY_HOPS"  # in the environment of a request that another mlxproxy sends
LISTING = "/v1/models"  # what a peer asks for every few seconds
HOST = "mlxproxy.host"  # the key in the environment that holds the Host header


def disconnect() -> Disconnect:
    """Return the client's `Disconnect`; one that never fires if the server has none (tests)."""
    return cast(Disconnect, request.environ.get("mlxproxy.disconnect") or Disconnect())


def _this_request() -> Request:
    return cast(Request, request._get_current_object())  # type: ignore[attr-defined]


def client() -> str:
    """Return who asks, for fair queueing: the API key if keys are set, else the address."""
    return g.get("key") or request.remote_addr or "unknown"


def take_memory(size: int) -> None:
    """Reserve `size` bytes of the memory for bodies until this request's answer ends.

    Raises:
        TooManyRequests: this client, or all clients together, hold too many already.
    """
    if (at_end := request.environ.get("mlxproxy.at_end")) is not None:  # set by mlxproxy's server
        at_end.callback(services().bodies.take(client(), size))


def json_body(required: bool = True) -> dict[str, Any]:
    """Return the request's body, parsed as a JSON object.

    Raises:
        InvalidJSON, InvalidRequest: it is not JSON, or not an object.
        TooManyRequests: too many bytes of bodies are in memory already.
    """
    take_memory(request.content_length or 0)
    raw = request.get_data(cache=False)
    # (A tool call's arguments are JSON inside a JSON string, and its commas may be escaped.)
    values = sum(raw.count(comma) for comma in (b",", rb"\u002c", rb"\u002C"))
    if values > MAX_VALUES:
        raise InvalidRequest(f"The body has more than {MAX_VALUES:,} values.")
    take_memory(values * VALUE_BYTES)
    if not raw and not required:
        return {}
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        where = f" ({error})" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidJSON(f"The body is not valid JSON{where}.") from None
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object, such as {}.")
    return body


def streamed(
    body: Relayed, stats: AnswerStats, headers: Mapping[str, str] = sse.HEADERS
) -> Response:
    """Return a response that streams the answer; the request ends when the answer ends."""
    if (at_end := request.environ.get("mlxproxy.at_end")) is not None:
        at_end.callback(body.close)  # in case nobody ever reads it
    # With direct_passthrough, the server iterates over the stream itself, with nothing in between.
    return Response(_Recorded(body, stats), headers=dict(headers), direct_passthrough=True)


class _Recorded:
    """A streamed body that records its request when the server closes it."""

    def __init__(self, body: Relayed, stats: AnswerStats) -> None:
        self._body = body
        self._stats = stats
        self._record = recorder()

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        """End the answer and record it."""
        try:
            self._body.close()
        finally:
            self._record(200, self._stats)


def warn(warnings: Iterable[Unmet]) -> None:
    """Tell the client in a header what its answer lacks, and log the names of those fields.

    Call it once per request.
    """
    if found := tuple(warnings):
        g.warnings = " ".join(f"{one.field}: {one.sentence}" for one in found)
        g.who["unmet"] = ",".join(one.field for one in found)


def install(app: Flask) -> None:
    """Install all of these hooks in the application."""
    inner = app.wsgi_app

    def wsgi_app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        # Only this module decides which hosts are allowed: werkzeug rejects some in its own way.
        environ[HOST] = environ.pop("HTTP_HOST", "")
        return inner(environ, start_response)

    app.wsgi_app = wsgi_app  # type: ignore[method-assign]
    app.before_request(_admit)
    app.after_request(_finish)
    app.register_error_handler(Exception, _render)


def _admit() -> Response | None:
    # Each use of `request` and `g` looks up the context, and `request.headers` searches for each
    # name: used throughout, they would cost as much again as all of Flask's own work.
    asked = _this_request()
    environ, parts = asked.environ, services()
    g.request_id = request_id(environ.get("HTTP_X_REQUEST_ID", ""))
    g.started = time.monotonic()
    g.who = {  # the request in its events and its log line
        "id": g.request_id,
        "client": asked.remote_addr,
        "method": asked.method[:LONGEST_METHOD],
        "path": quote(asked.path[:200], safe="/:@,;~+"),
    }
    access = parts.access
    host = environ[HOST]
    origin = environ.get("HTTP_ORIGIN")
    if host:  # HTTP/1.0 clients need not send a Host header; every browser does
        access.check_host(host)
    access.check_origin(origin, host)
    if origin is None and (site := environ.get("HTTP_SEC_FETCH_SITE")) is not None:
        access.check_site(site, host, _is_followed_link(asked))
    if asked.method == "OPTIONS" and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ:
        return Response(status=204)
    if asked.path not in OPEN_PATHS and not page.is_for(asked):
        g.key = access.check_key(environ.get("HTTP_AUTHORIZATION"), environ.get("HTTP_X_API_KEY"))
    if not _is_quiet(asked):
        parts.bus.publish("request_started", g.who)  # which copies it
    return None


def _is_quiet(asked: Request) -> bool:
    """Return whether only DEBUG logs a request; a page that opens reads dozens of its files."""
    path = asked.path
    polls = path == LISTING and asked.method == "GET" and HOPS in asked.environ
    return polls or path in QUIET_PATHS or path.startswith(page.PREFIX)


def _is_followed_link(asked: Request) -> bool:
    """Return whether somebody has followed a link on a page to a path that links may lead to."""
    fetch = [asked.environ.get(f"HTTP_SEC_FETCH_{name}") for name in ("MODE", "DEST")]
    return (
        asked.method == "GET" and asked.path in LINKED_PATHS and fetch == ["navigate", "document"]
    )


def _finish(response: Response) -> Response:
    environ, headers = _this_request().environ, response.headers
    security_headers = g.get("security_headers", SECURITY_HEADERS)
    headers.extend({"X-Request-Id": g.request_id, **security_headers})
    if dialect_of(_this_request().path) == "anthropic":
        headers["request-id"] = g.request_id  # the name that Anthropic's SDK reads
    if (warnings := g.get("warnings")) is not None:
        headers["X-Mlxproxy-Warning"] = warnings
    origin = environ.get("HTTP_ORIGIN")
    if origin is not None:
        headers.add("Vary", "Origin")
        if services().access.allows(origin, environ[HOST]):
            _share(response, origin)
    if not response.is_streamed:
        _end_line(response)
        recorder()(response.status_code, g.get("stats"))
    return response


def _end_line(response: Response) -> None:
    """End JSON with a line feed, so that a terminal's prompt starts on a new line."""
    parts = response.response
    if response.mimetype != "application/json" or not isinstance(parts, list) or not parts:
        return
    if not parts[-1].endswith(b"\n"):
        parts[-1] += b"\n"  # a part of its own would be sent, and wake the client, on its own
        response.content_length = sum(map(len, parts))


def _share(response: Response, origin: str) -> None:
    """Add the headers that let a browser hand the answer to a page of an allowed origin."""
    headers = response.headers
    headers["Access-Control-Allow-Origin"] = origin
    headers["Cross-Origin-Resource-Policy"] = "cross-origin"
    headers["Access-Control-Expose-Headers"] = "X-Request-Id, X-Mlxproxy-Warning, Retry-After"
    if request.method == "OPTIONS":
        headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE, OPTIONS"
        headers["Access-Control-Allow-Headers"] = request.headers.get(
            "Access-Control-Request-Headers",
            "Authorization, Content-Type, X-Api-Key, X-Request-Id, "
            "Anthropic-Version, Anthropic-Beta",
        )
        headers["Access-Control-Max-Age"] = "600"


def recorder() -> Callable[[int, AnswerStats | None], None]:
    """Return a function that records the end of this request: one log line, one event, metrics.

    It may be called from any thread.
    """
    asked = _this_request()
    parts, started, facts = services(), g.started, g.who
    route = asked.url_rule.rule if asked.url_rule else "other"
    answer, quiet = g.get("answer"), _is_quiet(asked)

    def record(status: int, stats: AnswerStats | None) -> None:
        parts.answers.end(answer)
        facts.update(status=status, seconds=round(time.monotonic() - started, 3))
        if stats is not None:
            facts.update(stats.figures())
        parts.metrics.request(route, status, stats)
        if not quiet:
            parts.bus.publish("request", facts)
        level = logging.DEBUG if quiet else logging.INFO
        if log.isEnabledFor(level):
            shown = " ".join(f"{name}={it}" for name, it in facts.items() if it is not None)
            line = shown.encode("unicode_escape").decode()  # always a single line
            log.log(level, "%s", line, extra={logs.REQUEST: facts})

    return record


def _render(error: Exception) -> Response:
    """Return any error as the contract's object; details of unexpected ones go to the log only."""
    known = _known(error)
    if known is None:
        log.error("request %s failed", g.get("request_id"), exc_info=error)
        known = InternalError(
            "An internal error occurred in mlxproxy. Its log has the details under the request "
            f"id {g.request_id}."
        )
    # Whatever raised it may keep a reference to it, and its frames refer to the request's body.
    error.__traceback__ = None
    shown = rendered(known, dialect_of(_this_request().path), g.request_id)
    response = jsonify(shown.body)
    response.status_code = shown.status
    response.headers.extend(shown.headers)
    if known.retry_after is not None:
        response.headers["Retry-After"] = str(known.retry_after)
    if known.status == 401:
        response.headers["WWW-Authenticate"] = 'Bearer realm="mlxproxy"'
    if isinstance(error, WerkzeugMethodNotAllowed) and error.valid_methods:
        response.headers["Allow"] = ", ".join(sorted(error.valid_methods))
    return response


def _known(error: Exception) -> ProxyError | None:
    if isinstance(error, ProxyError):
        return error
    if isinstance(error, RequestEntityTooLarge):
        limit = services().settings.max_body
        return RequestTooLarge(f"The body is larger than {limit:,} bytes (MAX_BODY).")
    if isinstance(error, WerkzeugMethodNotAllowed):
        allowed = " or ".join(sorted(set(error.valid_methods or ()) - {"HEAD", "OPTIONS"}))
        method = request.method[:LONGEST_METHOD]
        return MethodNotAllowed(f"{request.path[:200]} requires {allowed}, not {method}.")
    if isinstance(error, BadRequest):
        return InvalidRequest("The request could not be read.")
    if isinstance(error, HTTPException) and error.code is not None and error.code < 500:
        return NotFound(
            f"There is nothing at {request.path[:200]}. The endpoints are /v1/models, "
            "/v1/models/loaded, /v1/models/load, /v1/models/unload, /v1/chat/completions, "
            "/v1/completions, /v1/messages, /v1/responses, /v1/events, /v1/logs, /metrics and "
            "/health; Ollama's and LM Studio's begin with /api."
        )
    return None
