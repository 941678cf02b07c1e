"""Log probabilities in the form of OpenAI's API, whole and streamed.

mlx-lm 0.32.2 names a token as its vocabulary does (``Ġcapital``) and without its bytes. It reports
any one of the likeliest tokens as the chosen one, omits all of them from a stream, and uses the
same shape for chat and text completions.

A token that is an incomplete character has that character's bytes, and U+FFFD as its text. The
token that ended the answer and the tokens of a stop word are not part of the text and are omitted.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from . import gate

LEAST = -9999.0  # OpenAI's number for "practically never"; JSON has no infinity
SPACE = "\u2581".encode()  # as SentencePiece writes it

ToBytes = Callable[[int], bytes | None]


def arm(server: Any, utils: Any) -> None:
    """Patch `mlx_lm.server`, whose tokenizers are those of `mlx_lm.tokenizer_utils`.

    Raises:
        Unexpected: answers are assembled in another way there.
    """
    gate.require(
        server,
        {
            "ResponseGenerator.generate": ("self", "request", "generation_args"),
            "APIHandler.generate_response": ("self", "text", "finish_reason"),
            "Response": ("text", "token", "logprob", "finish_reason", "top_tokens"),
        },
    )
    gate.require(utils, {"_byte_decoder": (), "TokenizerWrapper.detokenizer": ()})
    for name in ("BPEStreamingDetokenizer", "SPMStreamingDetokenizer"):
        gate.require_attributes(utils, name, ("tokenmap",))
    generator, handler = server.ResponseGenerator, server.APIHandler
    generate, form = generator.generate, handler.generate_response
    thread = threading.local()  # .kept: the tokens of the request that this HTTP thread answers

    @functools.wraps(generate)
    def generate_and_keep(
        self: Any, request: Any, generation_args: Any, *arguments: Any, **named: Any
    ) -> Any:
        thread.kept = None
        context, responses = generate(self, request, generation_args, *arguments, **named)
        if generation_args.logprobs or generation_args.top_logprobs > 0:
            to_bytes = bytes_of(self.model_provider.tokenizer, utils)
            thread.kept = Kept(to_bytes, lambda: getattr(context.text_sm, "surplus", 0))
            responses = thread.kept.each(responses)
        return context, responses

    @functools.wraps(form)
    def generate_response(self: Any, *arguments: Any, **named: Any) -> Any:
        response = form(self, *arguments, **named)
        kept = getattr(thread, "kept", None)
        if kept is not None:
            texts = self.object_type == "text_completion"
            response["choices"][0]["logprobs"] = kept.take(texts)
        return response

    generator.generate = generate_and_keep
    handler.generate_response = generate_response


def bytes_of(tokenizer: Any, utils: Any) -> ToBytes:
    """Return a function that gives a token's bytes; None if its own text does not reveal them."""
    detokenizer = tokenizer.detokenizer
    tokens = getattr(detokenizer, "tokenmap", ())
    if isinstance(detokenizer, utils.BPEStreamingDetokenizer):
        decoder = utils._byte_decoder()

        def bpe(token: int) -> bytes:
            text = (tokens[token] if token < len(tokens) else None) or ""
            return b"".join(
                bytes([decoder[character]]) if character in decoder else character.encode()
                for character in text
            )

        return bpe
    if isinstance(detokenizer, utils.SPMStreamingDetokenizer):
        return lambda token: (
            tokens[token].replace(SPACE, b" ") if token < len(tokens) and tokens[token] else b""
        )

    def decoded(token: int) -> bytes | None:
        name = tokenizer.convert_ids_to_tokens(token) or ""
        if len(name) == len("<0x00>") and name.startswith("<0x"):
            return bytes([int(name[3:5], 16)])
        text = str(tokenizer.decode([token]))
        if "\ufffd" in text:
            return None
        return text.encode()

    return decoded


class Token(NamedTuple):
    """One token of an answer."""

    token: int
    logprob: float
    likeliest: tuple[Any, ...]
    text: str  # the text that it has added to the answer

    @classmethod
    def of(cls, response: Any) -> Token:
        """Return the token that a response of the generation thread describes."""
        return cls(response.token, response.logprob, response.top_tokens, response.text)


class Kept:
    """The tokens of one answer that have not been sent yet.

    Args:
        to_bytes: gives a token's bytes.
        surplus: gives the number of characters at the end that belong to a stop word.
    """

    def __init__(self, to_bytes: ToBytes, surplus: Callable[[], int]) -> None:
        self._to_bytes = to_bytes
        self._surplus = surplus
        self._tokens: list[Token] = []
        self._offset = 0  # characters of the text so far

    def each(self, responses: Iterator[Any]) -> Iterator[Any]:
        """Yield the responses of the generation thread, and keep the tokens they describe."""
        for response in responses:
            if response.finish_reason != "stop":
                self._tokens.append(Token.of(response))
            yield response

    def take(self, texts: bool) -> dict[str, Any] | None:
        """Return the log probabilities of the tokens since the last call; None if there are none.

        Args:
            texts: whether to use the shape of text completions.
        """
        tokens, surplus = self._tokens, self._surplus()
        while tokens and surplus > 0 and len(tokens[-1].text) <= surplus:
            surplus -= len(tokens.pop().text)
        self._tokens = []
        if not tokens:
            return None
        content = [
            {
                **self._named(token.token, token.logprob),
                "top_logprobs": [
                    self._named(top["id"], top["logprob"])
                    for top in sorted(token.likeliest, key=_logprob, reverse=True)
                ],
            }
            for token in tokens
        ]
        if not texts:
            return {"content": content}
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.text)
        return {
            "tokens": [entry["token"] for entry in content],
            "token_logprobs": [entry["logprob"] for entry in content],
            "top_logprobs": [_by_name(entry) for entry in content if entry["top_logprobs"]] or None,
            "text_offset": offsets,
            "content": content,  # as mlx-lm has it
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        """Return a token in OpenAI's form, plus its id."""
        found = self._to_bytes(token)
        return {
            "id": token,
            "token": "\ufffd" if found is None else found.decode(errors="replace"),
            "logprob": logprob if logprob > LEAST else LEAST,  # JSON has no NaN either
            "bytes": None if found is None else list(found),
        }


def _by_name(token: dict[str, Any]) -> dict[str, float]:
    """Return the likeliest tokens and the chosen one by name; of equal names, the likeliest."""
    names: dict[str, float] = {}
    for entry in (*token["top_logprobs"], token):
        names.setdefault(entry["token"], entry["logprob"])
    return names


def _logprob(entry: dict[str, Any]) -> float:
    return float(entry["logprob"])
