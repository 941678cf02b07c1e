"""Stop words that end an answer's text, however the model spells them in tokens.

mlx-lm 0.32.2 stops at a stop word only if the model generates exactly the tokens into which the
tokenizer encodes the word alone: "France" is not " France". Otherwise it cuts the word out of the
text and continues ("The capital of  is Paris."). Here the text itself is searched. Text that may be
the beginning of a stop word is held back, and nothing else is.

A stop word ends the answer, but not a thought or a tool call: those are not part of the text that
the client asked to end there, and half a tool call is of no use. (llama.cpp searches everything
that the model says; OpenAI's reasoning models accept no stop words at all.) A stop word that
contains one of the model's own markers, such as ``</think>``, never occurs in a text. It is left to
mlx-lm, whose tokens are exact in that case.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from . import gate

NAMES: gate.Names = {
    "ResponseGenerator._make_state_machine": ("self", "model_key", "tokenizer", "stop_words"),
    "ResponseGenerator.generate": ("self", "request", "generation_args"),
    "Response": ("text", "token", "logprob", "finish_reason", "top_tokens"),
    "TextStateMachine.make_state": ("self", "initial"),
    "TextStateMachine.split": ("state", "text"),
    "TextStateMachine.flush": ("state",),
}
HANDLER_USES = ("text_sm", "make_state", "TextStateMachine", "split", "flush", "finish_reason")
MARKERS = ("think_start", "think_end", "tool_call_start", "tool_call_end")

TEXT, CALL = "normal", "tool"  # mlx-lm's names for the states of an answer
Segments = list[tuple[str, str]]


def arm(server: Any) -> None:
    """Patch `mlx_lm.server`.

    Raises:
        Unexpected: it detects the end of an answer in another way.
    """
    gate.require(server, NAMES)
    gate.require_uses(server, "APIHandler.handle_completion", HANDLER_USES)
    gate.require_uses(server, "ResponseGenerator._generate", ("_make_state_machine",))
    generator, machine = server.ResponseGenerator, server.TextStateMachine
    make, generate = generator._make_state_machine, generator.generate

    @functools.wraps(make)
    def make_state_machine(self: Any, model_key: Any, tokenizer: Any, stop_words: Any) -> Any:
        markers = markers_of(tokenizer)
        marked = [word for word in stop_words if any(marker in word for marker in markers)]
        words = [word for word in stop_words if word not in marked]
        if not words or self._is_distributed:  # each machine of a group must end by itself
            return make(self, model_key, tokenizer, stop_words)
        sequences, text_machine = make(self, model_key, tokenizer, marked)
        answer = Answer(words, text_machine, sequences, drops=bool(marked))
        return answer, answer  # never put into mlx-lm's cache: it belongs to this request

    @functools.wraps(generate)
    def generate_until_found(self: Any, *arguments: Any, **named: Any) -> Any:
        context, responses = generate(self, *arguments, **named)
        if isinstance(context.text_sm, Answer):
            responses = context.text_sm.responses(responses)
        return context, responses

    class TextStateMachine(server.TextStateMachine):  # type: ignore[misc]
        """The class that the HTTP handler calls, for answers with stop words and for all others."""

        @staticmethod
        def split(state: Any, text: str) -> Any:
            return state.split(text) if isinstance(state, Answer) else machine.split(state, text)

        @staticmethod
        def flush(state: Any) -> Any:
            return state.flush() if isinstance(state, Answer) else machine.flush(state)

    generator._make_state_machine = make_state_machine
    generator.generate = generate_until_found
    server.TextStateMachine = TextStateMachine


def markers_of(tokenizer: Any) -> set[str]:
    """Return the texts with which this tokenizer's model marks thoughts, tool calls and so on."""
    markers = {getattr(tokenizer, name, None) for name in MARKERS}
    markers.update(getattr(tokenizer, "structural_markers", ()))
    for edges in getattr(tokenizer, "response_transitions", {}).values():
        markers.update(marker for marker, _ in edges)
    return {marker for marker in markers if isinstance(marker, str) and marker}


class StopWords:
    """A search for the first of several words in a text that arrives in pieces.

    If several words are found, the one that is complete first ends the text, or the longest of
    those: the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._beginnings = {word[:length] for word in words for length in range(1, len(word))}
        self._longest = max(map(len, words)) - 1
        self._held = ""

    def take(self, text: str) -> tuple[str, int | None]:
        """Take the next piece.

        Returns:
            The text that is certainly part of the answer; and, if a word was found, the number of
            characters from its beginning on, else None.
        """
        text = self._held + text
        places = ((word, text.find(word)) for word in self._words)
        found = [(place + len(word), place) for word, place in places if place >= 0]
        if found:
            self._held = ""
            _, place = min(found)
            return text[:place], len(text) - place
        certain = len(text) - self._beginning_at_end(text)
        self._held = text[certain:]
        return text[:certain], None

    def _beginning_at_end(self, text: str) -> int:
        """Return the length of the longest suffix of the text that is the beginning of a word."""
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0

    def release(self) -> str:
        """Return the text that was held back: it can no longer become a stop word."""
        held, self._held = self._held, ""
        return held


class Answer:
    """One answer with stop words.

    It replaces mlx-lm's text machine, that machine's state, and mlx-lm's stop sequences.

    The HTTP handler's thread finds the word and sends nothing after it. The generation thread sees
    that at its next token, ends the answer like any other, and keeps its prompt cache.

    Args:
        words: the stop words.
        machine: mlx-lm's text machine, which distinguishes thoughts and tool calls from text.
        sequences: mlx-lm's stop sequences: the end of the answer, and markers that are stop words.
        drops: whether text held back at the end may begin such a marker, and so is not text.

    Attributes:
        found: whether a stop word is complete.
        surplus: the number of characters that the model has said beyond the end of the answer.
    """

    def __init__(self, words: Sequence[str], machine: Any, sequences: Any, drops: bool) -> None:
        self.found = False
        self.surplus = 0
        self._words = StopWords(words)
        self._machine = machine
        self._sequences = sequences
        self._drops = drops
        self._state: Any = None  # the text machine's
        self._response: Any = None  # the one that the handler is looking at
        self._ends = False  # whether the answer ends by itself

    # -- for the handler's thread

    def make_state(self, initial: str = TEXT) -> Answer:
        """Begin the answer."""
        self._state = self._machine.make_state(initial)
        return self

    def responses(self, given: Iterator[Any]) -> Iterator[Any]:
        """Yield the generation thread's responses, up to the one that completes a stop word."""
        for response in given:
            if response.finish_reason == "stop":
                # At "stop", the handler drops held text; at "length", it flushes it. See flush().
                response.finish_reason, response.text = "length", ""
                self._ends = True
            self._response = response
            yield response
            if self.found:
                return

    def split(self, text: str) -> tuple[Answer, Segments]:
        """Take the model's next text; return what is certainly part of the answer, by state."""
        self._state, segments = self._machine.split(self._state, text)
        return self, self._searched(segments)

    def flush(self) -> tuple[Answer, str, str]:
        """Return the text held back, now that nothing follows, and the state."""
        self._state, held, state = self._machine.flush(self._state)
        if self.found:
            return self, "", state
        if self._ends:
            self._response.finish_reason = "stop"
            if self._drops or state == CALL:  # the beginning of a marker
                held = ""
        text = "".join(text for _, text in self._searched([(state, held)]))
        return self, text + self._words.release(), state

    def _searched(self, segments: Segments) -> Segments:
        """Return the segments up to the first stop word in a text."""
        certain: Segments = []
        for number, (state, text) in enumerate(segments, start=1):
            behind = None
            if state == TEXT:
                text, behind = self._words.take(text)
            elif held := self._words.release():  # a stop word does not continue after a marker
                certain.append((TEXT, held))
            certain.append((state, text))
            if behind is not None:
                self.found = True
                self._response.finish_reason = "stop"
                _, unread, _ = self._machine.flush(self._state)  # a state is immutable
                self.surplus = (
                    behind + len(unread) + sum(len(rest) for _, rest in segments[number:])
                )
                break
        return certain

    # -- for the generation thread

    def matcher(self) -> Matcher:
        """Return the matcher to which each token of the answer is passed."""
        return Matcher(self, self._sequences.matcher())


class Matcher:
    """Tells whether an answer ends with a token, as mlx-lm's `StopSequences.Matcher` does."""

    def __init__(self, answer: Answer, sequences: Any) -> None:
        self._answer = answer
        self._sequences = sequences

    def advance(self, token: int) -> bool:
        """Take one token, and return whether the answer has ended."""
        return self._sequences.advance(token) or self._answer.found
