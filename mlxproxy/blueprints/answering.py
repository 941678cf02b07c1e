"""The way from a request in any dialect to a lease, and from the backend's answer to a response."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flask import Response, g

from mlxproxy.backend.spec import ModelSpec
from mlxproxy.blueprints import peering
from mlxproxy.blueprints.hooks import client, disconnect, json_body, streamed, warn
from mlxproxy.blueprints.services import services
from mlxproxy.controller import Claim, Lease
from mlxproxy.dialects import conversation
from mlxproxy.dialects.chat_events import TranslatedStream
from mlxproxy.dialects.form import NOTHING, Answer, Timing, Translated, in_their_words
from mlxproxy.errors import AnswerEnded, InvalidRequest, ProxyError
from mlxproxy.guard import check
from mlxproxy.guard.check import PATHS, Kind, Terms
from mlxproxy.guard.shapes import images
from mlxproxy.observability.answers import UnderWay
from mlxproxy.relay.body import RequestBody
from mlxproxy.relay.open import Request
from mlxproxy.relay.statistics import AnswerStats

NO_NAMES: Mapping[str, str] = {}
NO_DEFAULTS: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Fitted:
    """The terms of a model for a request whose fields are first adapted to that model.

    Args:
        terms: the terms of the model, or of any model.
        spec: the model; None: any.
        optional: fields to leave out for a model that cannot think.
        names: fields for which the client uses other names.
    """

    terms: Terms
    spec: ModelSpec | None
    optional: frozenset[str]
    names: Mapping[str, str]

    def check(self, body: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
        """Check the fields and return them, with the conversation in the form templates accept.

        Raises:
            InvalidRequest: the model cannot take them; the error uses the client's field names.
        """
        if self.optional and self.spec and not self.spec.model.capabilities.thinking:
            body = {name: value for name, value in body.items() if name not in self.optional}
        try:
            fields = self.terms.check(body, kind)
        except InvalidRequest as error:
            raise in_their_words(error, self.names) from None
        if "messages" in fields:
            fields["messages"] = conversation.settled(fields["messages"])
        return fields


@dataclass(frozen=True)
class Asked:
    """A request that has been checked and has its lease."""

    body: RequestBody
    kind: Kind
    known: ModelSpec | None
    lease: Lease
    stats: AnswerStats
    called: Callable[[ModelSpec], str]  # the name in the answer of the model that gives it

    @property
    def request(self) -> Request:
        """The request that is sent to the backend."""
        return Request(PATHS[self.kind], self.body, self.called, as_chat=self.kind == "chat")

    def warn(self) -> None:
        """Tell the client what its answer lacks. Call it once the answer's end is taken care of."""
        backend = self.lease.backend  # None as long as a long wait for it goes on
        if (spec := backend.spec if backend else self.lease.target or self.known) is not None:
            has = backend.has if backend else lambda _: True
            warn(services().selection.engine_of(spec).unmet(self.body.fields, spec, has))


def ask(
    given: dict[str, Any],
    kind: Kind,
    optional: frozenset[str] = frozenset(),
    names: Mapping[str, str] = NO_NAMES,
    ttl: float | None = None,
    defaults: Mapping[str, Any] = NO_DEFAULTS,
) -> Asked:
    """Check a chat or text request and queue it.

    Args:
        optional, names: see :class:`Fitted`.
        ttl: idle seconds after which a model that this request loads is unloaded.
        defaults: fields that apply if neither the client, the settings nor the model sets them.

    Raises:
        ProxyError: the request is rejected.
    """
    parts = services()
    controller, selection = parts.controller, parts.selection
    name = given.get("model")
    known = selection.expected(name, kind)
    body = _checked(given, kind, known, optional, names, defaults)

    def called(spec: ModelSpec) -> str:
        profile = selection.profile_for(name, spec)
        return profile.name if profile else spec.model_id

    stats = g.stats = AnswerStats()
    batch = selection.engine_of(known).batch(body.fields, known, controller.has)
    target = _target(body.fields.get("model"), ttl, kind)
    lease = controller.lease(client(), disconnect(), target, batch, selection.fallback)
    ended = AnswerEnded("Somebody has ended this answer, on the server's page or with its API.")
    wanted = lease.target or known
    answer = UnderWay(
        g.who, stats, wanted.model_id if wanted else None, lambda: controller.abort(lease, ended)
    )
    g.answer = parts.answers.begin(answer)
    return Asked(body, kind, known, lease, stats, called)


def _checked(
    given: dict[str, Any],
    kind: Kind,
    known: ModelSpec | None,
    optional: frozenset[str],
    names: Mapping[str, str],
    defaults: Mapping[str, Any] = NO_DEFAULTS,
) -> RequestBody:
    selection = services().selection  # of this request's app: `fitted` is called outside of it, too
    name = given.get("model")

    def fitted(spec: ModelSpec | None) -> Fitted:
        terms = selection.terms(spec, selection.profile_for(name, spec))
        if defaults:
            terms = terms._replace(defaults={**defaults, **terms.defaults})
        return Fitted(terms, spec, optional, names)

    return RequestBody(given, kind, known, fitted)


def counted(translated: Translated) -> int | None:
    """Return the exact number of tokens of a translated chat's prompt.

    None: the model is not loaded, cannot count, or would reject the request.
    """
    chat = translated.chat
    assert chat is not None
    try:
        known = services().selection.expected(chat.get("model"))
        process = services().controller.process_of(known) if known is not None else None
        if known is None or process is None:
            return None
        body = _checked(chat, "chat", known, translated.optional, translated.names)
    except ProxyError:
        return None
    if images(body.fields["messages"]):  # which become tokens as their size demands
        return None
    return process.count_tokens(body.fields)


def _target(name: object, ttl: float | None, kind: Kind = "chat") -> Callable[[], ModelSpec | None]:
    selection = services().selection

    def target() -> ModelSpec | None:
        spec = selection.meant(name, kind)
        return spec if spec is None or ttl is None else replace(spec, ttl=ttl)

    return target


# -- in the words of another dialect


def dialect_body() -> dict[str, Any]:
    """Return the request's body; all of it can be translated and returned to the client.

    Raises:
        InvalidJSON, InvalidRequest, TooManyRequests: see `json_body`; also if it is not plain JSON.
    """
    body = json_body()
    check.require_plain(body)
    return body


@dataclass(frozen=True)
class _Named:
    """A body that tells its answer which model it is for, before the first delta."""

    body: RequestBody
    answer: Answer
    lease: Lease
    called: Callable[[ModelSpec], str]
    on_spec: Callable[[ModelSpec], None]

    def for_spec(self, spec: ModelSpec) -> dict[str, Any]:
        self.answer.model = self.called(spec)
        self.answer.loaded = self.lease.loaded
        self.on_spec(spec)
        return self.body.for_spec(spec)


def answered(
    translated: Translated,
    ttl: float | None = None,
    on_spec: Callable[[ModelSpec], None] = lambda spec: None,
) -> Response:
    """Return the answer to a translated request.

    Args:
        ttl: see :func:`ask`.
        on_spec: called with the model that answers, before its first delta.

    Raises:
        ProxyError: there is no answer; the error says why.
    """
    answer = translated.answer
    if translated.chat is None:
        return _loaded(translated, ttl)
    asked = ask(
        translated.chat,
        translated.kind,
        translated.optional,
        translated.names,
        ttl,
        {} if translated.temperature is None else {"temperature": translated.temperature},
    )
    lease, stats = asked.lease, asked.stats
    request = Request(
        PATHS[translated.kind],
        _Named(asked.body, answer, lease, asked.called, on_spec),
        reworded=lambda error: in_their_words(error, translated.names),
    )
    relay = services().relay
    if translated.stream:
        stream = TranslatedStream(relay.stream(lease, request, stats), answer)
        response = streamed(stream, stats, answer.headers)
    else:
        completion = json.loads(relay.whole(lease, request, stats))
        response = _json(answer.whole(completion, _timing(stats)))
    asked.warn()
    return response


def nothing(answer: Answer) -> Response:
    """Return the empty answer to a request that asks for no generation."""
    return _json(answer.whole(NOTHING))


def _loaded(translated: Translated, ttl: float | None) -> Response:
    """Return the empty answer once the model is loaded; a stream of it tells that it goes on."""
    answer, stats = translated.answer, AnswerStats()
    lease = services().controller.lease(client(), disconnect(), _target(answer.model, ttl))

    def on_loaded() -> None:
        answer.model, answer.loaded = lease.spec.model_id, lease.loaded

    if translated.stream:
        g.stats = stats
        stream = services().relay.load(lease, stats, on_loaded)
        return streamed(TranslatedStream(stream, answer), stats, answer.headers)
    try:
        lease.wait()
        on_loaded()
    finally:
        lease.release()
    return nothing(answer)


def load(spec: ModelSpec) -> None:
    """Load a model and wait until it is loaded.

    Raises:
        ProxyError: it could not be loaded.
    """
    awaited(lambda claim: services().controller.load(spec, claim))


def unload(path: str) -> None:
    """Unload a model, if it is loaded, and wait until it is unloaded.

    Raises:
        ProxyError: it could not be unloaded.
    """
    awaited(lambda claim: services().controller.unload(claim, path))


def awaited(begin: Callable[[Claim], object]) -> Claim:
    """Begin a load or an unload for the client of this request; return its claim at the end.

    Raises:
        ProxyError: the controller rejects it, or it failed.
    """
    controller, claim = services().controller, Claim(client())
    begin(claim)
    disconnect().on_leave(lambda: controller.leave(claim))
    claim.wait()
    return claim


def _timing(stats: AnswerStats) -> Timing:
    ended = stats.ended or stats.started
    granted = stats.granted or ended
    first = stats.first_byte or ended
    return Timing(waited=granted - stats.started, prompt=first - granted, generation=ended - first)


def _json(body: bytes) -> Response:
    return Response(body, mimetype="application/json")


# -- models, for the dialects' lists


def entries() -> list[dict[str, Any]]:
    """Return the models that can be loaded, as the entries of `/v1/models`."""
    here = [model.to_dict() for model in services().catalog.models() if model.loadable]
    return here + [dict(offer.item) for offer in peering.offered()]


def entry(name: str) -> dict[str, Any]:
    """Return the model of that name, as an entry of `/v1/models`.

    Raises:
        ProxyError: no model has that name, or several have it.
    """
    if (offer := peering.offer_of(name)) is not None:
        return dict(offer.item)
    model, _ = services().selection.find(name)
    return model.to_dict()


def contexts() -> dict[str, int]:
    """Return the ids of the loaded models, each with the length of its context in tokens."""
    here = {spec.model_id: spec.max_context or 0 for spec in services().controller.residents()}
    there = [offer.item for offer in peering.offered() if offer.loaded]
    return {**here, **{item["id"]: item["max_context_length"] or 0 for item in there}}
