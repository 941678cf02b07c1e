"""What an engine must say of itself, so that nothing outside its own folder knows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from mlxproxy.errors import ProxyError

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
