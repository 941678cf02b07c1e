"""What the proxy knows of the program in `server.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mlxproxy.backend.protocol import Address, Command, Examined, Fault, Fields, Probe, Stage, Unmet
from mlxproxy.backend.spec import ModelSpec
from mlxproxy.catalog.layout import CONFIG, Folder
from mlxproxy.catalog.model import Model
from mlxproxy.errors import BackendFailed, InvalidRequest, ProxyError
from mlxproxy.guard import shapes
from mlxproxy.guard.check import Kind, Rule, Rules
from mlxproxy.guard.shapes import Limits

NAME: Final = "second.server"
PROGRAM: Final = Path(__file__).with_name("server.py")
DEATH: Final = b"FATAL core stopped: "


def _health(status: int, _: bytes) -> Fault | None:
    return Fault("its core has stopped", is_final=True) if status == 500 else _ready(status, _)


def _ready(status: int, _: bytes) -> Fault | None:
    return None if status == 200 else Fault("it is not ready")


def _warm(status: int, answer: bytes) -> Fault | None:
    return None if status == 200 else Fault(f"its warm-up failed: {status}")


def _combine(request: dict[str, Any], limits: Limits) -> None:
    request["options"] = {"tokens": request.pop("max_tokens", 8)}


class Second:
    """An engine for models whose `model_type` is ``second``."""

    name = NAME
    health = Probe("/ready", _health)
    trusts_output = True  # nothing of what clients say is in it
    advice = ((r"the moon is in the (\w+) quarter", "the moon is {0}. Wait for a month."),)
    rules: Mapping[Kind, Rules] = {
        "chat": Rules(
            {
                "messages": Rule(shapes.messages, "it has no other prompt"),
                "max_tokens": Rule(shapes.max_tokens, "it counts them itself"),
                "temperature": Rule(shapes.only(0, "this backend cannot be warmed."), "ignored"),
            },
            required="messages",
            combine=_combine,
        ),
        "text": Rules({}, required="prompt"),
    }

    @property
    def inspector(self) -> Inspector:
        return Inspector()

    def command(self, spec: ModelSpec, address: Address) -> Command:
        bind = f"{address.host}:{address.port}"
        return Command((sys.executable, "-IS", str(PROGRAM), spec.path, bind), remedy="Despair.")

    def stages(self, spec: ModelSpec) -> Sequence[Stage]:
        ready = Probe("/ready", _health, not_yet=frozenset({503}))
        hello = {"messages": [{"role": "user", "content": "Hi"}]}
        options = {"tokens": 1, "stream": False}
        chat = Probe("/v1/chat/completions", _warm, {**hello, "options": options})
        return Stage("loading", ready), Stage("warming", chat)

    def death_in(self, output: bytes) -> str | None:
        _, found, rest = output.partition(DEATH)
        return f"its core stopped, {rest.decode().splitlines()[0]}" if found else None

    def wire(self, has: Callable[[str], bool]) -> Wire:
        return Wire()

    def is_exclusive(self, request: Mapping[str, Any], has: Callable[[str], bool]) -> bool:
        return False

    def unmet(
        self, request: Mapping[str, Any], spec: ModelSpec, has: Callable[[str], bool]
    ) -> Sequence[Unmet]:
        return ()

    def examine(self) -> Examined:
        return Examined("second", "works")


class Inspector:
    """Finds the models of this engine."""

    fingerprint = NAME
    kinds = frozenset({"second"})

    def __call__(self, folder: Folder) -> Model:
        config = json.loads(Path(folder.path, CONFIG).read_text())
        ours = config.get("model_type") == "second"
        return Model(
            id=folder.id,
            path=Path(folder.path),
            type="llm",
            engine=NAME,
            loadable=ours,
            reason=None if ours else "It is of another kind.",
        )


class Wire:
    """Chunks in JSON without spaces; options in an object of their own; errors in `detail`."""

    chunk_end = b'"usage":null}\n\n'
    count_path = None
    reasoning_mark = b',"reasoning":"'
    authorization = ""

    def encode(self, fields: Fields, model: str, streamed: bool) -> bytes:
        options = {**fields["options"], "stream": streamed}
        return json.dumps({"messages": fields["messages"], "options": options}).encode()

    def streams_all(self, fields: Fields) -> bool:
        return True

    def model_field(self, name: str) -> bytes:
        return b'"model":' + json.dumps(name).encode()

    def with_both_spellings(self, data: bytes) -> bytes:
        return data

    def without_role(self, data: bytes) -> bytes:
        return data

    def completion(self) -> Completion:
        return Completion()

    def usage_of(self, answer: bytes) -> Mapping[str, Any]:
        usage: Mapping[str, Any] = json.loads(answer)["usage"]
        return usage

    def prompt_tokens(self, data: bytes) -> int | None:
        return None

    def count_in(self, answer: bytes) -> int | None:
        return None

    def failure(self, event: bytes) -> None:
        return None

    def error(self, status: int, body: bytes) -> ProxyError:
        if status == 400:
            return InvalidRequest(f"The backend says: {json.loads(body)['detail']}.")
        return BackendFailed("The backend does not answer this. Try again.")


class Completion:
    """A whole answer out of this engine's events."""

    def __init__(self) -> None:
        self.usage: dict[str, Any] = {}
        self._first: dict[str, Any] = {}
        self._text = ""

    def add(self, events: bytes) -> None:
        for line in events.splitlines():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            self._first = self._first or event
            self.usage = event["usage"] or self.usage
            for choice in event["choices"]:
                self._text += choice["delta"].get("content") or ""

    def answer(self) -> bytes:
        message = {"role": "assistant", "content": self._text}
        choices = [{"index": 0, "message": message, "finish_reason": "length"}]
        whole = {**self._first, "object": "chat.completion", "choices": choices}
        return json.dumps({**whole, "usage": self.usage}, separators=(",", ":")).encode()
