"""Log probabilities of given continuations of a prompt: `POST /v1/score`.

The prompt is read once (or found in the prompt cache), each continuation in one pass over a copy of
its caches. The generation thread does that in pieces, between the steps of the answers under way,
so nobody waits for more than one piece.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import itertools
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from . import gate, paths
from .count import NAMES, Apart, chat_tokens
from .logprobs import LEAST
from .pace import Pace
from .prompts import EMPTY, TOO_LONG, Counter
from .report import Pulse

PATH = "/v1/score"  # as in mlxproxy/guard/check.py
PIECE_TOKENS = 256  # at most: a row of logits for each is in memory at once
LOOK_SECONDS = 0.2  # between two looks whether the client has left
PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT


def arm(
    server: Any, cache: Any, mx: Any, pulse: Pulse, context: int | None, counter: Counter
) -> None:
    """Patch `mlx_lm.server`, whose prompt caches are those of `mlx_lm.models.cache`.

    Args:
        pulse: is told of the work, so that nobody takes it for a hang.
        context: tokens that the model can take; None if that is not known.
        counter: has the copy of the tokenizer.

    Raises:
        Unexpected: it generates or handles requests in another way.
    """
    gate.require(server, {**NAMES, "ResponseGenerator._next_request": ("self", "timeout")})
    gate.require_attributes(server, "ResponseGenerator", ("model_provider", "prompt_cache"))
    gate.require_attributes(server, "ModelProvider", ("model", "model_key"))
    gate.require(
        cache,
        {
            "make_prompt_cache": ("model",),
            "LRUPromptCache.fetch_nearest_cache": ("self", "model", "tokens"),
            "LRUPromptCache.insert_cache": ("self", "model", "tokens", "prompt_cache"),
            "LRUPromptCache.trim_to": (),
        },
    )
    take, tokenize = server.ResponseGenerator._next_request, server.ResponseGenerator._tokenize
    jobs: collections.deque[Job] = collections.deque()
    scorer = Scorer(cache, mx, pulse)

    @functools.wraps(take)
    def score_and_take(self: Any, timeout: float | None = None) -> Any:
        if not jobs:
            return take(self, timeout)
        pulse.active += 1
        if not jobs[0].advance(scorer, self):
            jobs.popleft()
        pulse.active -= 1
        return take(self, None)

    def score(handler: Any, body: Any) -> tuple[int, dict[str, Any]] | None:
        responses = handler.response_generator
        tokenizer = Apart(responses.model_provider.tokenizer, counter)
        texts = body["continuations"]
        if "messages" in body:
            prompt = chat_tokens(server, tokenize, responses, tokenizer, body)
            following = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        else:
            prompt, following = split(tokenizer, body["prompt"], texts)
        job = Job(prompt, following, context)
        jobs.append(job)
        if not job.wait(handler.connection):
            return None
        copied = counter.copy_of(responses.model_provider.tokenizer)
        choices = job.choices(
            texts, lambda token: copied.decode([token], skip_special_tokens=False)
        )
        return 200, {
            "id": f"score-{uuid.uuid4()}",
            "object": "score",
            "model": body["model"],
            "created": int(time.time()),
            "choices": choices,
            "usage": job.usage(),
        }

    server.ResponseGenerator._next_request = score_and_take
    paths.add(server, PATH, score)


def split(tokenizer: Apart, prompt: str, texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of a prompt, and those that each continuation adds to them.

    Where a continuation changes the last tokens of the prompt (both share one), the prompt ends
    before them, for all continuations.
    """
    before = tokenizer.encode(prompt)
    wholes = [tokenizer.encode(prompt + text) for text in texts]
    shared = min(_common(before, whole) for whole in wholes)
    return before[:shared], [whole[shared:] for whole in wholes]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


class Job:
    """The score of each continuation of one prompt.

    Args:
        prompt: its tokens.
        continuations: the tokens of each.
        context: tokens that the model can take; None if that is not known.

    Raises:
        ValueError: there is nothing to score, or it is longer than the context.
    """

    def __init__(
        self, prompt: list[int], continuations: list[list[int]], context: int | None
    ) -> None:
        tokens = len(prompt) + max(map(len, continuations))
        if not all(continuations):
            raise ValueError(EMPTY)
        if context is not None and tokens > context:
            raise ValueError(TOO_LONG.format(tokens=tokens, context=context))
        self.prompt = prompt
        self.continuations = continuations
        self.cached = 0  # tokens of the prompt that were in the prompt cache
        self.left = False  # its client has left
        self.scores: list[Score] = []
        self._work: Iterator[None] | None = None
        self._error: Exception | None = None
        self._done = threading.Event()

    def advance(self, scorer: Scorer, responses: Any) -> bool:
        """Do one piece of the work, on the generation thread; return whether there is more."""
        try:
            if self._work is None:
                self._work = scorer.work(self, responses)
            if not self.left:
                next(self._work)
                return True
        except StopIteration:
            pass
        except Exception as error:
            self._error = error
        self._work = None
        self._done.set()
        return False

    def wait(self, connection: socket.socket) -> bool:
        """Wait for the end of the work; return whether the client is still there."""
        while not self._done.wait(LOOK_SECONDS):
            with contextlib.suppress(BlockingIOError):
                self.left = self.left or not connection.recv(1, PEEK)
        return not self.left

    def choices(self, texts: Sequence[str], decode: Callable[[int], str]) -> list[dict[str, Any]]:
        """Return the scores, in the shape of a text completion's choices.

        Raises:
            RuntimeError: the model failed.
        """
        if self._error is not None:
            raise RuntimeError(f"scoring failed: {type(self._error).__name__}")
        return [
            {
                "index": index,
                "text": texts[index],
                "logprob": sum(value for value in score.logprobs if value is not None),
                "is_greedy": score.greedy,
                "logprobs": {
                    "tokens": [decode(token) for token in self.continuations[index]],
                    "token_logprobs": score.logprobs,
                },
            }
            for index, score in enumerate(self.scores)
        ]

    def usage(self) -> dict[str, Any]:
        """Return the token counts. Nothing is generated, so all tokens are the prompt's."""
        tokens = len(self.prompt) + sum(map(len, self.continuations))
        return {
            "prompt_tokens": tokens,
            "completion_tokens": 0,
            "total_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Score(NamedTuple):
    """The score of one continuation.

    Attributes:
        logprobs: of each token; None for a first token that nothing precedes.
        greedy: whether each token is the likeliest one.
    """

    logprobs: list[float | None]
    greedy: bool


class Scorer:
    """Computes scores; only the generation thread may use it.

    Args:
        cache: `mlx_lm.models.cache`.
        mx: `mlx.core`.
        pulse: counts the pieces.
    """

    def __init__(self, cache: Any, mx: Any, pulse: Pulse) -> None:
        self._cache = cache
        self._pulse = pulse
        self._mx = mx
        self._pace = Pace()

    def work(self, job: Job, responses: Any) -> Iterator[None]:
        """Score a job's continuations, and yield after each piece of the work."""
        provider, head = responses.model_provider, job.prompt[:-1]
        found, rest = None, head
        if head:
            found, rest = responses.prompt_cache.fetch_nearest_cache(provider.model_key, head)
        caches = found or self._cache.make_prompt_cache(provider.model)
        job.cached = len(head) - len(rest)
        for piece in self._pieces(rest):
            with self._measured(piece):
                provider.model(self._mx.array([piece]), cache=caches)
                self._mx.eval([each.state for each in caches])
            yield
        if len(rest) > 1:  # the one that is always left to compute is not worth an entry
            self._keep(responses, head, copy.deepcopy(caches))
        for tokens in job.continuations:
            score = Score([] if job.prompt else [None], True)
            inputs = [*job.prompt[-1:], *tokens][:-1]
            targets = iter(tokens[len(tokens) - len(inputs) :])
            own = copy.deepcopy(caches)
            for piece in self._pieces(inputs):
                chosen = list(itertools.islice(targets, len(piece)))
                with self._measured(piece):
                    logprobs, greedy = self._score(provider.model, own, piece, chosen)
                score = Score([*score.logprobs, *logprobs], score.greedy and greedy)
                yield
            job.scores.append(score)

    def _keep(self, responses: Any, tokens: list[int], caches: list[Any]) -> None:
        """Put a prompt into the prompt cache, which enforces its limit only when told to."""
        provider, kept = responses.model_provider, responses.prompt_cache
        kept.insert_cache(provider.model_key, tokens, caches)
        if (limit := provider.cli_args.prompt_cache_bytes) is not None:
            kept.trim_to(n_bytes=limit)

    def _pieces(self, tokens: list[int]) -> Iterator[list[int]]:
        while tokens:
            size = self._pace.piece(PIECE_TOKENS, 1)
            yield tokens[:size]
            tokens = tokens[size:]

    @contextlib.contextmanager
    def _measured(self, piece: list[int]) -> Iterator[None]:
        began = time.monotonic()
        with self._pulse.at("step"):
            yield
        self._pace.read(len(piece), time.monotonic() - began)

    def _score(
        self, model: Any, caches: list[Any], inputs: list[int], targets: list[int]
    ) -> tuple[list[float], bool]:
        mx = self._mx
        logits = model(mx.array([inputs]), cache=caches)[0].astype(mx.float32)
        chosen = mx.take_along_axis(logits, mx.array(targets)[:, None], axis=-1)[:, 0]
        logprobs = chosen - mx.logsumexp(logits, axis=-1)
        greedy = mx.all(chosen >= mx.max(logits, axis=-1))
        mx.eval(logprobs, greedy)
        values = [value if value > LEAST else LEAST for value in logprobs.tolist()]
        return values, bool(greedy.item())
