"""What a kind of backend says of itself, and what everything else knows of it.

A kind of backend is a folder of `engines/`, with all that is known of its program. The rest of
mlxproxy starts, watches, asks and stops a process through what stands here, whatever it serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from mlxproxy.backend.spec import ModelSpec
from mlxproxy.catalog.inspector import Inspector
from mlxproxy.errors import ProxyError
from mlxproxy.guard.check import Kind, Rules


class Address(NamedTuple):
    """Where a backend answers."""

    host: str
    port: int


class Unmet(NamedTuple):
    """A field that is not honoured, and what that means, as a sentence in ASCII."""

    field: str
    sentence: str


class Link(Protocol):
    """A channel to a process beside its HTTP, over which it tells how it is."""

    def fileno(self) -> int:
        """Return the process's end, which it gets as its standard input."""

    def open(self) -> None:
        """Begin to read: the process has its end."""

    def close(self) -> None:
        """Give up both ends: there is no process."""

    def let_clients_in(self) -> None:
        """Tell the process that clients' requests come from now on."""

    def has(self, feature: str) -> bool:
        """Return whether the process has armed a feature.

        The program asks for two by name: ``departures`` (once our side of a connection is shut, the
        process ends the request and then closes the connection) and ``heartbeat`` (:meth:`hang` can
        tell). Of others only the engine itself knows, see :meth:`Engine.is_exclusive`.
        """

    def hang(self, waiting_since: float, stall_timeout: float, load_timeout: float) -> str | None:
        """Return why the process hangs; None while it lives, or where that is not told.

        Args:
            waiting_since: since when the request has waited that asks, in monotonic seconds.
            stall_timeout: seconds that one step of its work may take.
            load_timeout: seconds that a load within its work may take.
        """


@dataclass(frozen=True)
class Command:
    """How a process is started.

    Attributes:
        argv: the program, by its path, and its arguments.
        environment: what it gets beside the proxy's own, without mlxproxy's settings.
        link: makes the channel to it, given whom to call with the reason when the process tells
            that it can no longer generate; None where there is no channel.
        remedy: what to do if the program cannot be executed, as a sentence.
    """

    argv: tuple[str, ...]
    remedy: str
    environment: Mapping[str, str] = field(default_factory=dict)
    link: Callable[[Callable[[str], None]], Link] | None = None


class Fault(NamedTuple):
    """What is wrong with an answer to a probe.

    Attributes:
        reason: a phrase about the process ("its first chat failed").
        is_final: whether the process can no longer generate; its own last words may say more, and
            count for more.
    """

    reason: str
    is_final: bool = False


@dataclass(frozen=True)
class Probe:
    """A request of our own.

    Attributes:
        path: where it is sent.
        body: its JSON; None for a GET.
        judge: takes status and body of the answer; returns what is wrong with it.
        not_yet: statuses that say nothing but that it is too early: the request is sent again.
    """

    path: str
    judge: Callable[[int, bytes], Fault | None]
    body: Mapping[str, Any] | None = None
    not_yet: frozenset[int] = frozenset()


class Stage(NamedTuple):
    """A step to readiness: what the process is doing until it has answered the probe."""

    phase: Literal["loading", "warming"]
    probe: Probe


Fields = Mapping[str, Any]
"""The fields of a request that has been checked."""


class Completion(Protocol):
    """A whole answer, put together from the events of a stream."""

    @property
    def usage(self) -> Mapping[str, Any]:
        """The engine's count of tokens, in OpenAI's shape; empty until it has come."""

    def add(self, events: bytes) -> None:
        """Take one or several whole events.

        Raises:
            BackendFailed: they are none of the engine's.
        """

    def answer(self) -> bytes:
        """Return the JSON of the whole answer.

        Raises:
            BackendFailed: the events amount to none.
        """


class Wire(Protocol):
    """How an engine spells OpenAI's requests, events, answers and errors.

    Attributes:
        chunk_end: the end of an event that carries nothing but a part of the text. Such events are
            passed on without another look; the one that counts the tokens must end otherwise.
    """

    @property
    def chunk_end(self) -> bytes: ...

    def encode(self, fields: Fields, model: str, streamed: bool) -> bytes:
        """Return the body of a request.

        Args:
            fields: what the client asks for.
            model: the path of the model.
            streamed: ask for a stream that ends with the count of tokens; else for a whole answer.
        """

    def streams_all(self, fields: Fields) -> bool:
        """Return whether a stream carries all that belongs into the whole answer."""

    def model_field(self, name: str) -> bytes:
        """Return how an answer says which model it is of, key and value.

        The same for the whole of an answer, and unlike anything that a text in it can hold.
        """

    def completion(self) -> Completion:
        """Return a whole answer that is still to be put together."""

    def usage_of(self, answer: bytes) -> Mapping[str, Any]:
        """Return the count of tokens in a whole answer of the engine's own, in OpenAI's shape.

        Raises:
            BackendFailed: it is no answer.
        """

    def prompt_tokens(self, data: bytes) -> int | None:
        """Return the length of the prompt, cached tokens included, if the beginning of a stream
        gives it away."""

    def error(self, status: int, body: bytes) -> ProxyError:
        """Return the engine's error in the contract's shape, with a status that tells the truth.

        A `BackendFailed` may mean that the engine can no longer generate.
        """


class Examined(NamedTuple):
    """What `mlxproxy doctor` says of a program.

    Attributes:
        subject: what was looked at, in a word.
        sentence: what was found.
        fix: the command that mends it; None where nothing is wrong.
    """

    subject: str
    sentence: str
    fix: str | None = None


class Engine(Protocol):
    """A kind of backend."""

    @property
    def name(self) -> str:
        """Its program, as users know it."""

    @property
    def inspector(self) -> Inspector:
        """Finds out which models it can load, and what they need in memory."""

    @property
    def health(self) -> Probe:
        """Finds out whether a process can still generate, without generating. Only a final fault
        counts, and a process that does not answer is not judged."""

    @property
    def trusts_output(self) -> bool:
        """Whether :meth:`death_in` can be believed once clients are served. If they or a model can
        bring about such a line, the process is asked instead."""

    @property
    def advice(self) -> Sequence[tuple[str, str]]:
        """What a person can do about a failed load: a pattern of the reason or of the log, and a
        sentence with the pattern's groups as fields; the first that fits counts."""

    def command(self, spec: ModelSpec, address: Address) -> Command:
        """Return how a process for that load is started.

        Raises:
            LoadFailed: the program is missing.
        """

    def stages(self, spec: ModelSpec) -> Sequence[Stage]:
        """Return what proves a process ready, once its port is open.

        The last probe is answered by the model itself; it is sent to a silent process, too, to see
        whether it still lives.
        """

    def death_in(self, output: bytes) -> str | None:
        """Return why the process can no longer generate, if some of its output says so.

        Args:
            output: whole lines.
        """

    def wire(self, has: Callable[[str], bool]) -> Wire:
        """Return how a process spells requests and answers.

        Args:
            has: whether a feature is armed in the process.
        """

    @property
    def rules(self) -> Mapping[Kind, Rules]:
        """What requests may say."""

    def is_exclusive(self, request: Mapping[str, Any], has: Callable[[str], bool]) -> bool:
        """Return whether a checked request must have a process to itself.

        Args:
            has: whether a feature is armed in the process.
        """

    def unmet(
        self, request: Mapping[str, Any], spec: ModelSpec, has: Callable[[str], bool]
    ) -> Iterable[Unmet]:
        """Return what of a checked request the answer does without.

        Only what is certainly wrong is refused (:attr:`rules`). What is left to chance, or rests on
        a guess from the model's files, is answered, and the client is told.

        Args:
            spec: what answers it.
            has: whether a feature is armed in the process.
        """

    def examine(self) -> Examined:
        """Return whether the program works on this machine."""
