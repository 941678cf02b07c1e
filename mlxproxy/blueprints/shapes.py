"""The controller's typed values as the contract's JSON."""

from __future__ import annotations

from typing import Any

from mlxproxy.backend.spec import ModelSpec
from mlxproxy.backend.standby import Standby
from mlxproxy.controller.state import (
    Event,
    Exited,
    Failure,
    Loaded,
    OperationSnapshot,
    Progress,
    SlotSnapshot,
    Snapshot,
)


def state(snapshot: Snapshot) -> dict[str, Any]:
    """Return the whole state, from which `/health` and `/v1/models/loaded` are built."""
    main, failure, operation = snapshot.main, snapshot.failure, snapshot.operation
    spec, left = main.spec, main.idle_unload_in
    return {
        "state": main.state.value,
        "state_since": main.state_since,
        **_names(spec),
        "enable_thinking": spec.enable_thinking if spec else None,
        "options": {**spec.options(), "ttl": main.ttl, "pin": main.pinned} if spec else None,
        "loaded_at": main.loaded_at,
        "pid": main.pid,
        "port": main.port,
        "in_flight": snapshot.in_flight,
        "waiting": snapshot.waiting,
        "idle_unload_in": None if left is None else round(left, 1),
        "features": list(main.features),
        "models": [_model(slot) for slot in snapshot.slots if slot.occupant is not None],
        "transition": None if operation is None else _operation(operation),
        "last_failure": None if failure is None else _failure(failure),
    }


def standby(one: Standby) -> dict[str, Any] | None:
    """Return the process that waits for the next load; null if there is none."""
    pid = one.pid
    if pid is None:
        return None
    return {"pid": pid, "ready": one.is_ready, "memory_bytes": one.memory()}


def progress(done: Progress) -> dict[str, Any]:
    """Return how far a load has progressed."""
    return {
        "slot": done.slot,
        **_names(done.spec),
        "phase": done.phase.value,
        "seconds": round(done.seconds, 1),
        "bytes_read": done.bytes_read,
        "bytes_total": done.bytes_total,
        "last_seconds": done.last_seconds,
    }


def event(what: Event) -> tuple[str, dict[str, Any]]:
    """Return the name and the data of an event of `/v1/events`."""
    if isinstance(what, Snapshot):
        return "state", state(what)
    if isinstance(what, Progress):
        return "load", progress(what)
    if isinstance(what, Loaded):
        seconds = round(what.seconds, 2)
        return "loaded", {"slot": what.slot, "id": what.spec.model_id, "seconds": seconds}
    assert isinstance(what, Exited)
    return "death", {"slot": what.slot, "id": what.spec.model_id, "reason": what.reason}


def _model(slot: SlotSnapshot) -> dict[str, Any]:
    """Return one of the models in memory, ready or not."""
    spec, left = slot.occupant, slot.idle_unload_in
    assert spec is not None
    return {
        "slot": slot.id,
        **_names(spec),
        "state": slot.state.value,
        "state_since": slot.state_since,
        "enable_thinking": spec.enable_thinking,
        "options": {**spec.options(), "ttl": slot.ttl, "pin": slot.pinned},
        "pinned": slot.pinned,
        "port": slot.port,
        "pid": slot.pid,
        "memory_bytes": slot.memory or None,
        "weights_bytes": spec.model.weights_bytes,
        "loaded_at": slot.loaded_at,
        "last_used_at": None if slot.last_use is None else round(slot.last_use, 3),
        "in_flight": slot.in_flight,
        "waiting": slot.waiting,
        "idle_unload_in": None if left is None else round(left, 1),
        "features": list(slot.features),
    }


def operations(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Return the loads and unloads that are under way, in their order."""
    return [_operation(operation) for operation in snapshot.operations]


def _names(spec: ModelSpec | None) -> dict[str, str | None]:
    """Return the model's names; the contract calls its path `model_id`, and its id `id`."""
    return {"model_id": spec.path if spec else None, "id": spec.model_id if spec else None}


def _operation(operation: OperationSnapshot) -> dict[str, Any]:
    return {
        "kind": "load" if operation.spec else "unload",
        "cause": operation.cause.value,
        **_names(operation.spec),
        "phase": operation.phase.value,
        "seconds": round(operation.seconds, 1),
    }


def _failure(failure: Failure) -> dict[str, Any]:
    return {
        **_names(failure.spec),
        "code": failure.code,
        "reason": failure.reason,
        "at": failure.at,
        "previous": failure.previous,
        "log": list(failure.log),
    }
