"""The interface between the kinds of backends (engines) and the rest of mlxproxy.

A kind of backend is a folder of `engines/`, which contains everything specific to its program. The
rest of mlxproxy starts, watches, queries and stops processes only through this interface.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from mlxproxy.backend.spec import ModelSpec
from mlxproxy.catalog.inspector import Inspector
from mlxproxy.errors import ProxyError
from mlxproxy.guard.check import Kind, Rules


class Address(NamedTuple):
    """The address at which a backend answers."""

    host: str
    port: int


class Unmet(NamedTuple):
    """A field that is not honoured, and the consequence, as a sentence in ASCII."""

    field: str
    sentence: str


class Link(Protocol):
    """A channel to a process besides HTTP, over which the process reports its state."""

    def fileno(self) -> int:
        """Return the process's end of the channel, which becomes its standard input."""

    def open(self) -> None:
        """Start reading: the process has its end."""

    def close(self) -> None:
        """Close both ends: there is no process."""

    def let_clients_in(self) -> None:
        """Tell the process that clients' requests come from now on."""

    @property
    def features(self) -> Collection[str]:
        """The names of all features that the process has enabled."""

    def has(self, feature: str) -> bool:
        """Return whether the process has a feature enabled.

        mlxproxy asks for two by name: ``departures`` (once our side of a connection is shut down,
        the process ends the request and then closes the connection) and ``heartbeat``
        (:meth:`hang` can tell). Only the engine itself knows others: see
        :meth:`Engine.is_exclusive`.
        """

    def hang(self, waiting_since: float, stall_timeout: float, load_timeout: float) -> str | None:
        """Return why the process hangs; None while it lives, or if that is not reported.

        Args:
            waiting_since: since when the asking request has waited, in monotonic seconds.
            stall_timeout: seconds that one step of its work may take.
            load_timeout: seconds that a load within its work may take.
        """


@dataclass(frozen=True)
class Command:
    """The command that starts a process.

    Attributes:
        argv: the program, by its path, and its arguments.
        environment: variables besides the proxy's own, without mlxproxy's settings.
        link: makes the channel to it; takes a function to call with the reason when the process
            reports that it can no longer generate. None if there is no channel.
        remedy: what to do if the program cannot be executed, as a sentence.
    """

    argv: tuple[str, ...]
    remedy: str
    environment: Mapping[str, str] = field(default_factory=dict)
    link: Callable[[Callable[[str], None]], Link] | None = None


class Fault(NamedTuple):
    """The fault of an answer to a probe.

    Attributes:
        reason: a phrase about the process ("its first chat failed").
        is_final: whether the process can no longer generate; the reason that it gives itself may
            say more, and takes precedence.
    """

    reason: str
    is_final: bool = False


@dataclass(frozen=True)
class Probe:
    """A request that the proxy itself sends.

    Attributes:
        path: the path it is sent to.
        body: its JSON; None for a GET.
        judge: takes the status and body of the answer; returns what is wrong with it.
        not_yet: statuses that only mean that it is too early: the request is sent again.
        authorization: the value of that header; empty: none is sent.
    """

    path: str
    judge: Callable[[int, bytes], Fault | None]
    body: Mapping[str, Any] | None = None
    not_yet: frozenset[int] = frozenset()
    authorization: str = ""


class Stage(NamedTuple):
    """A step to readiness: the phase that lasts until the process has answered the probe."""

    phase: Literal["loading", "warming"]
    probe: Probe


Fields = Mapping[str, Any]
"""The fields of a request that has been checked."""


class Completion(Protocol):
    """A whole answer, assembled from the events of a stream."""

    @property
    def usage(self) -> Mapping[str, Any]:
        """The engine's token count, in OpenAI's shape; empty until it has arrived."""

    def add(self, events: bytes) -> None:
        """Add one or more whole events.

        Raises:
            BackendFailed: they are not events of this engine.
        """

    def answer(self) -> bytes:
        """Return the JSON of the whole answer.

        Raises:
            BackendFailed: the events do not make up an answer.
        """


class Wire(Protocol):
    """The wire format of an engine: its variant of OpenAI's requests, events, answers and errors.

    Attributes:
        chunk_end: the end of an event that carries only a part of the text. Such events are passed
            on without being parsed; the event that carries the token count, or an error, must end
            differently.
        count_path: the path that answers how many tokens the prompt of a chat has; None: no path
            does.
        reasoning_mark: the bytes with which the field `reasoning` begins, and nothing else does.
        authorization: the value of that header of a request; empty: none is sent.
    """

    @property
    def chunk_end(self) -> bytes: ...

    @property
    def count_path(self) -> str | None: ...

    @property
    def reasoning_mark(self) -> bytes: ...

    @property
    def authorization(self) -> str: ...

    def encode(self, fields: Fields, model: str, streamed: bool) -> bytes:
        """Return the body of a request.

        Args:
            fields: those of the client's request.
            model: the path of the model.
            streamed: ask for a stream that ends with the token count; else for a whole answer.
        """

    def streams_all(self, fields: Fields) -> bool:
        """Return whether a stream carries everything that belongs in the whole answer."""

    def model_field(self, name: str) -> bytes:
        """Return the key and value with which an answer names its model.

        They are the same throughout an answer, and no text in the answer can contain them.
        """

    def with_both_spellings(self, data: bytes) -> bytes:
        """Return events, or a whole answer, with `reasoning_content` next to each `reasoning`.

        Half of the clients read one, half the other, none both. It is called for each event that
        contains `reasoning_mark`, so it must be cheap.
        """

    def without_role(self, data: bytes) -> bytes:
        """Return an event of a chat without the role of its message.

        OpenAI tells it in the first event only, and its libraries put the values of a field
        together: "assistantassistant". It is called for each event after the first.
        """

    def completion(self) -> Completion:
        """Return an empty whole answer, to be assembled."""

    def usage_of(self, answer: bytes) -> Mapping[str, Any]:
        """Return the token count in a whole answer that the engine sent, in OpenAI's shape.

        Raises:
            BackendFailed: it is not an answer.
        """

    def prompt_tokens(self, data: bytes) -> int | None:
        """Return the length of the prompt, cached tokens included, if the beginning of a stream
        reveals it."""

    def count_in(self, answer: bytes) -> int | None:
        """Return the number of tokens that `count_path` answers; None if it does not know."""

    def failure(self, event: bytes) -> ProxyError | None:
        """Return the error with which the engine ends a stream, if this event is one."""

    def error(self, status: int, body: bytes) -> ProxyError:
        """Return the engine's error in the contract's shape, with the correct status.

        A `BackendFailed` may mean that the engine can no longer generate.
        """


class Examined(NamedTuple):
    """The findings of `mlxproxy doctor` about a program.

    Attributes:
        subject: what was examined, in a word.
        sentence: what was found.
        fix: the command that repairs it; None if nothing is wrong.
    """

    subject: str
    sentence: str
    fix: str | None = None


class Engine(Protocol):
    """A kind of backend."""

    @property
    def name(self) -> str:
        """The name of its program, as users know it."""

    @property
    def inspector(self) -> Inspector:
        """The inspector that finds out which models it can load, and how much memory they need."""

    @property
    def health(self) -> Probe:
        """The probe that finds out whether a process can still generate, without generating. Only a
        final fault counts, and a process that does not answer is not judged."""

    @property
    def trusts_output(self) -> bool:
        """Whether :meth:`death_in` can be trusted once clients are served. If they or a model can
        cause such a line, the process is asked instead."""

    @property
    def advice(self) -> Sequence[tuple[str, str]]:
        """Advice about failed loads: patterns for the reason or the log, each with a sentence that
        has the pattern's groups as fields; the first match counts."""

    def command(self, spec: ModelSpec, address: Address) -> Command:
        """Return the command that starts a process for this load.

        Raises:
            LoadFailed: the program is missing.
        """

    def stages(self, spec: ModelSpec) -> Sequence[Stage]:
        """Return the stages that prove a process ready, once its port is open.

        The model itself answers the last probe, which is also sent to a silent process to find out
        whether it still lives.
        """

    def death_in(self, output: bytes) -> str | None:
        """Return why the process can no longer generate, if some of its output says so.

        Args:
            output: whole lines.
        """

    def wire(self, has: Callable[[str], bool]) -> Wire:
        """Return the wire format of a process's requests and answers.

        Args:
            has: returns whether the process has a feature enabled.
        """

    @property
    def rules(self) -> Mapping[Kind, Rules]:
        """The rules for requests, by kind of endpoint."""

    def is_exclusive(self, request: Mapping[str, Any], has: Callable[[str], bool]) -> bool:
        """Return whether a checked request must have a process to itself.

        Args:
            has: returns whether the process has a feature enabled.
        """

    def unmet(
        self, request: Mapping[str, Any], spec: ModelSpec, has: Callable[[str], bool]
    ) -> Iterable[Unmet]:
        """Return the fields of a checked request that the answer does not honour.

        Only what is certainly wrong is rejected (:attr:`rules`). What depends on chance, or on a
        guess from the model's files, is answered, and the client is informed.

        Args:
            spec: the load that answers it.
            has: returns whether the process has a feature enabled.
        """

    def examine(self) -> Examined:
        """Return whether the program works on this machine."""
