"""Model management: list models, report what is loaded, load, unload."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from flask import Blueprint, Response, request

from mlxproxy import sse
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.blueprints import shapes
from mlxproxy.blueprints.answering import awaited
from mlxproxy.blueprints.hooks import client, disconnect, json_body, recorder, warn
from mlxproxy.blueprints.peering import described, elsewhere, offer_of, offered
from mlxproxy.blueprints.services import services
from mlxproxy.catalog import LONGEST_NAME
from mlxproxy.catalog.model import Model
from mlxproxy.controller import Claim, Controller
from mlxproxy.errors import (
    InvalidRequest,
    MethodNotAllowed,
    ModelsRootUnavailable,
    ProxyError,
)
from mlxproxy.guard import check
from mlxproxy.preferences import Profile
from mlxproxy.settings import context_length, seconds

blueprint = Blueprint("models", __name__, url_prefix="/v1/models")

PROGRESS_INTERVAL = 0.5  # seconds between two progress events
MAX_NAMES = 16  # adapters or draft models of a load; each answer and event about it repeats them


@blueprint.get("")
def listing() -> Response:
    """List the models that can be loaded; with `?all=true` the others too, with reasons.

    `complete` is false until every folder has been read to its end once since the start.

    Raises:
        ModelsRootUnavailable: nothing has been read yet, so an empty list would be wrong.
    """
    everything = request.args.get("all", "").lower() in ("1", "true", "yes")
    catalog = services().catalog
    complete = catalog.is_complete()  # asked first: a list may have more than it claims, never less
    models = catalog.models()
    if not complete and not models:
        catalog.require_disk()
    shown = [model for model in models if everything or model.loadable]
    profiles = services().selection.profiles()
    items = _items(shown) + [_profile_item(profile, model) for profile, model in profiles]
    ids = [*(model.id for model in shown), *(profile.name for profile, _ in profiles)]
    for offer in offered():
        items.append(offer.encoded)
        ids.append(str(offer.item["id"]))
    told = "true" if complete else "false"
    first, last = (json.dumps(ids[end]) if ids else "null" for end in (0, -1))
    # Without `has_more`, Anthropic's SDK would ask for the next page forever.
    return _json(
        f'{{"object": "list", "complete": {told}, "has_more": false, "first_id": {first}, '
        f'"last_id": {last}, "data": [{", ".join(items)}]}}'
    )


def _items(models: Iterable[Model]) -> list[str]:
    """Return the models as JSON items of the listing: facts from their files and current state."""
    controller, needed_bytes = services().controller, services().selection.needed_bytes
    snapshot = controller.describe()
    loaded = {slot.spec.path for slot in snapshot.slots if slot.spec is not None}
    loading = {each.spec.path for each in snapshot.operations if each.spec is not None}
    available = controller.budget()
    items = []
    for model in models:
        path = str(model.path)
        now = "loaded" if path in loaded else "loading" if path in loading else "not-loaded"
        fits = "true" if needed_bytes(model) <= available else "false"
        is_loaded = "true" if path in loaded else "false"
        items.append(
            f'{model.encoded[:-1]}, "loaded": {is_loaded}, "state": "{now}", "fits": {fits}}}'
        )
    return items


def _profile_item(profile: Profile, model: Model) -> str:
    (item,) = _items([replace(model, id=profile.name)])
    return f'{item[:-1]}, "profile_of": {json.dumps(model.id)}}}'


def _json(text: str) -> Response:
    return Response(text, mimetype="application/json")


@blueprint.get("/loaded")
def loaded() -> dict[str, Any]:
    """Report what is loaded, since when and with which options, or why nothing is loaded."""
    state = shapes.state(services().controller.describe())
    state["standby"] = shapes.standby(services().standby)
    if state["model_id"] is None:
        kept = (
            *("state", "state_since", "in_flight", "waiting", "transition", "last_failure"),
            *("models", "standby"),
        )
        return {"loaded": False, **{name: state[name] for name in kept}, **described(services())}
    return {"loaded": True, **state, **described(services())}


@blueprint.get("/<path:name>")
def one(name: str) -> Response:
    """Return one model, by any name that a load accepts."""
    if name in ("load", "unload"):
        raise MethodNotAllowed(f"/v1/models/{name} requires POST, not GET.")
    if (offer := offer_of(name)) is not None:
        return _json(offer.encoded)
    selection = services().selection
    model, profile = selection.find(name)
    item = _profile_item(profile, model) if profile else _items([model])[0]
    settings = json.dumps(selection.in_force(model, profile))
    return _json(f'{item[:-1]}, "settings": {settings}}}')


@blueprint.post("/load")
def load() -> Response | dict[str, Any] | tuple[dict[str, Any], int]:
    """Load a model; answer once the model has really answered a first chat."""
    body = _body()
    if (there := elsewhere(body, _field(body), manages=True)) is not None:
        return there
    wanted = _wanted(body)
    stream, wait = _flag(body, "stream", False), _flag(body, "wait", True)
    parts = services()
    if (thinking := body.get("enable_thinking")) is not None:
        asked = {"chat_template_kwargs": {"enable_thinking": thinking}}
        warn(parts.selection.engine_of(wanted).unmet(asked, wanted, lambda _: True))
    controller, claim = parts.controller, Claim(client(), waits=wait)
    controller.load(wanted, claim)
    if not wait:
        return {"status": "loading", **_told(wanted)}, 202
    disconnect().on_leave(lambda: controller.leave(claim))
    if stream:
        record = recorder()
        events = _progress(controller, claim, wanted)
        response = Response(events, headers=sse.HEADERS)
        response.call_on_close(lambda: controller.leave(claim))
        response.call_on_close(lambda: record(200, None))
        return response
    claim.wait()
    return {"status": "loaded", **_told(wanted), "changed": claim.changed}


@blueprint.post("/unload")
def unload() -> Response | dict[str, Any]:
    """Unload a model; cancel a load of it that is in progress.

    Without `model_id`, this unloads the model that answers requests that name none.
    """
    body = _body(required=False)
    if (there := elsewhere(body, _field(body), manages=True)) is not None:
        return there
    parts = services()
    named = body.get(_field(body)) is not None
    path = parts.selection.path_of(_name(body)) if named else None
    claim = awaited(lambda claim: parts.controller.unload(claim, path))
    return {"status": "unloaded" if claim.changed else "already_unloaded"}


def _body(required: bool = True) -> dict[str, Any]:
    """Return the request's body; all text in it can be returned to the client and looked up."""
    body = json_body(required)
    check.require_text(body)
    return body


def _wanted(body: dict[str, Any]) -> ModelSpec:
    """Return the specification of the load that the body asks for.

    Raises:
        ProxyError: a field is wrong, or the model is unknown or unusable.
    """
    name, parts = _name(body), services()
    said: dict[str, Any] = {}  # the rest is for the settings to say
    if (ttl := body.get("ttl")) is not None:
        try:
            said["ttl"] = seconds(ttl)
        except ValueError:
            raise InvalidRequest(
                'ttl must be seconds or a duration such as "30m"; 0 means never.', param="ttl"
            ) from None
    if (context := body.get("context")) is not None:
        try:
            said["context"] = context_length(context)
        except ValueError as error:
            raise InvalidRequest(f"context must be {error}: tokens.", param="context") from None
    for flag in ("enable_thinking", "pin"):
        if body.get(flag) is not None:
            said[flag] = _flag(body, flag, False)
    missing = parts.catalog.missing_roots()
    try:
        return parts.selection.spec_for(
            name,
            adapters=_names(body, "adapters"),
            draft_models=_names(body, "draft_models"),
            force=_flag(body, "force", False),
            **said,
        )
    except ProxyError as error:
        if missing and error.code == "model_not_found":
            raise ModelsRootUnavailable(
                f"The models folder {missing[0]} does not exist. Is its disk mounted?"
            ) from None
        raise


def _field(body: dict[str, Any]) -> str:
    """Return the field of the body that names the model."""
    return "model_id" if "model_id" in body else "model"


def _name(body: dict[str, Any]) -> str:
    """Return the name of the model in the body."""
    name = body.get(_field(body))
    if not isinstance(name, str) or not name.strip():
        raise InvalidRequest(
            "model_id must be a string: the id or the absolute path of a model from GET "
            "/v1/models.",
            param="model_id",
        )
    return name


def _flag(body: dict[str, Any], name: str, default: bool) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false.", param=name)
    return value


def _names(body: dict[str, Any], name: str) -> frozenset[str]:
    value = body.get(name)
    if value is None:
        return frozenset()
    if not isinstance(value, list) or not all(isinstance(it, str) and it for it in value):
        raise InvalidRequest(f"{name} must be a list of paths.", param=name)
    if len(value) > MAX_NAMES or max(map(len, value), default=0) > LONGEST_NAME:
        raise InvalidRequest(
            f"{name} must be at most {MAX_NAMES} paths of at most {LONGEST_NAME:,} characters.",
            param=name,
        )
    return frozenset(value)


def _told(wanted: ModelSpec) -> dict[str, Any]:
    return {"model_id": wanted.path, "id": wanted.model_id, **wanted.options()}


def _progress(controller: Controller, claim: Claim, wanted: ModelSpec) -> Iterator[bytes]:
    """Yield the load as server-sent events: progress, then `loaded` or the error."""
    try:
        while not claim.wait(PROGRESS_INTERVAL):
            yield sse.event({"status": "loading", **shapes.progress(controller.progress(claim))})
    except ProxyError as error:
        yield sse.event(error.body())
    else:
        yield sse.event({"status": "loaded", **_told(wanted), "changed": claim.changed})
