"""The parts of one proxy that the blueprints call."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from flask import current_app

from mlxproxy.backend.standby import Standby
from mlxproxy.blueprints.auth import Access
from mlxproxy.blueprints.budget import Budget
from mlxproxy.catalog import Catalog
from mlxproxy.controller import Controller
from mlxproxy.dialects.responses_store import ResponsesStore
from mlxproxy.observability.answers import Answers
from mlxproxy.observability.events import EventBus
from mlxproxy.observability.metrics import Metrics
from mlxproxy.peers.relay import Peers
from mlxproxy.relay.relay import Relay
from mlxproxy.selection import Selection
from mlxproxy.settings import Settings


@dataclass(frozen=True)
class Services:
    """The parts, made once by `mlxproxy.wiring`, held by the application (``app.extensions``).

    Attributes:
        answers: those under way.
        bodies: the budget of bytes that request bodies take up in memory.
        responses: stored answers of the Responses API that clients may refer to.
        chats: the same for LM Studio's API.
        peers: the other machines; None if there are none.
    """

    settings: Settings
    roots: tuple[Path, ...]
    catalog: Catalog
    controller: Controller
    standby: Standby
    relay: Relay
    selection: Selection
    access: Access
    bus: EventBus
    metrics: Metrics
    answers: Answers
    bodies: Budget
    responses: ResponsesStore
    chats: ResponsesStore
    peers: Peers | None = None


def services() -> Services:
    """Return the parts of the proxy that serves this request."""
    return cast(Services, current_app.extensions["mlxproxy"])
