"""Detection of a disconnect in every phase of a request, to release the request immediately.

`mlx_lm.server` notices a disconnect only when a write fails. It writes nothing while a request is
queued, a prompt is read, a tool call is generated, or a non-streamed answer is made. So a watcher
checks each connection five times a second. The request of a client that has disconnected is removed
from wherever it is, and only then is its connection closed. So a peer that has half-closed the
connection can tell by the end of file that the place in the backend is free again.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from . import gate
from .report import Pulse

INTERVAL_SECONDS = 0.2
LET_GO_SECONDS = 60.0  # longer than any step; detecting a thread that hangs is the proxy's task

SERVER_NAMES: gate.Names = {
    "APIHandler.handle_completion": ("self", "request", "stop_words"),
    "GenerationContext._should_stop": (),
    "ResponseGenerator.generate": ("self", "request", "generation_args", "progress_callback"),
    "ResponseGenerator._await_response": ("self", "response_queue"),
    "ResponseGenerator._next_request": ("self", "timeout"),
    "ResponseGenerator._tokenize": ("self", "tokenizer", "request", "args"),
    "ResponseGenerator._serve_single": ("self", "request"),
    "ModelProvider.load": ("self",),
    "stream_generate": (),
}
GENERATE_NAMES: gate.Names = {
    "BatchGenerator.next": ("self",),
    "BatchGenerator.remove": ("self", "uids"),
    "BatchGenerator.insert_segments": ("self", "segments"),
    "PromptProcessingBatch.Response": ("uid", "progress", "end_of_segment", "end_of_prompt"),
}


class ClientLeft(ConnectionError):
    """The client of this request has left."""


class Call:
    """One request, from its handler's start until the generation thread has released it."""

    def __init__(self, connection: socket.socket) -> None:
        self.left = False
        self.released = threading.Event()
        self._connection = connection
        self._lock = threading.Lock()
        self._queue: Any = None

    def waits_on(self, queue: Any) -> None:
        """Remember the queue that the handler waits on.

        Raises:
            ClientLeft: the client has disconnected already.
        """
        with self._lock:
            self._queue = queue
            if self.left:
                raise ClientLeft

    def look(self) -> None:
        """Check whether the client is still there; if not, wake the handler to end the request."""
        try:
            gone = not self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            gone = True
        if gone:
            with self._lock:
                self.left = True
                if self._queue is not None:
                    self._queue.put(ClientLeft())


class Departures:
    """The calls of one server, watched for disconnects."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self._lock = threading.Lock()
        self._watched: set[Call] = set()
        self._any = threading.Event()
        self._handler = threading.local()  # .call: the call that this HTTP thread serves
        # Used by the generation thread only:
        self._taken: Call | None = None  # the last call: tokenized, then inserted or served alone
        self._in_batch: dict[int, Call] = {}

    def look(self) -> None:
        """Wait until there are calls, then check each of them once."""
        self._any.wait()
        with self._lock:  # meanwhile no connection is closed and no descriptor number is reused
            for call in self._watched:
                if not call.left:
                    call.look()

    def check_client(self) -> None:
        """Raise ClientLeft if the client that this thread serves has left."""
        call = getattr(self._handler, "call", None)
        if call is not None and call.left:
            raise ClientLeft

    @contextlib.contextmanager
    def _watch(self, connection: socket.socket) -> Iterator[Call]:
        call = self._handler.call = Call(connection)
        with self._lock:
            self._watched.add(call)
            self._any.set()
        try:
            yield call
        finally:
            self._handler.call = None
            with self._lock:
                self._watched.discard(call)
                if not self._watched:
                    self._any.clear()

    def _release(self, call: Call | None) -> None:
        if call is not None and not call.released.is_set():
            call.released.set()
            self._pulse.active -= 1

    def arm(self, server: Any, generate: Any) -> None:
        """Patch `mlx_lm.server` and `mlx_lm.generate`.

        Raises:
            Unexpected: requests are processed in another way there.
        """
        gate.require(server, SERVER_NAMES)
        gate.require(generate, GENERATE_NAMES)
        gate.require_attributes(generate, "BatchGenerator", ("_unprocessed_sequences",))
        self._arm_handler(server)
        self._arm_context(server)
        self._arm_queue(server)
        self._arm_batch(generate)
        self._arm_single(server)

    def _arm_handler(self, server: Any) -> None:
        handler, generator = server.APIHandler, server.ResponseGenerator
        handle, generate = handler.handle_completion, generator.generate
        await_response = generator._await_response

        @functools.wraps(handle)
        def handle_completion(this: Any, request: Any, stop_words: Any) -> None:
            with self._watch(this.connection) as call:
                call.released.set()  # until it is submitted
                with contextlib.suppress(ConnectionError):
                    handle(this, request, stop_words)
                if call.left:
                    call.released.wait(LET_GO_SECONDS)

        @functools.wraps(generate)
        def submit(
            this: Any, request: Any, generation_args: Any, progress_callback: Any = None
        ) -> Any:
            call = getattr(self._handler, "call", None)
            # A group of several machines passes the arguments on, so they must not be changed.
            if call is None or this._is_distributed:
                return generate(this, request, generation_args, progress_callback)
            generation_args.call = call
            return generate(this, request, generation_args, progress_callback)

        @functools.wraps(await_response)
        def wait(this: Any, response_queue: Any) -> Any:
            call = getattr(self._handler, "call", None)
            if call is not None:
                call.waits_on(response_queue)
            return await_response(this, response_queue)

        handler.handle_completion = handle_completion
        generator.generate = submit
        generator._await_response = wait

    def _arm_context(self, server: Any) -> None:
        """Make generations stop once their client has left, whichever thread has noticed it."""

        class Context(server.GenerationContext):  # type: ignore[misc]
            def __init__(this, *arguments: Any, **named: Any) -> None:  # noqa: N805
                this._call = self._taken
                super().__init__(*arguments, **named)

            @property
            def _should_stop(this) -> bool:  # noqa: N805
                return this._stopped or (this._call is not None and this._call.left)

            @_should_stop.setter
            def _should_stop(this, value: bool) -> None:  # noqa: N805
                this._stopped = value

        server.GenerationContext = Context

    def _arm_queue(self, server: Any) -> None:
        generator, provider = server.ResponseGenerator, server.ModelProvider
        take, tokenize, load = generator._next_request, generator._tokenize, provider.load

        @functools.wraps(load)
        def load_for_request(this: Any, *arguments: Any, **named: Any) -> Any:
            try:
                if self._taken is not None and self._taken.left:  # left while it waited for a drain
                    raise ClientLeft
                return load(this, *arguments, **named)
            except BaseException:
                self._release(self._taken)
                raise

        @functools.wraps(take)
        def next_request(this: Any, timeout: Any = None) -> Any:
            while (taken := take(this, timeout)) is not None:
                call = self._taken = getattr(taken[2], "call", None)
                if call is None:
                    break
                if not call.left:
                    call.released.clear()
                    self._pulse.active += 1
                    break
                timeout = None  # its client has left; take another request if one is queued already
            return taken

        @functools.wraps(tokenize)
        def tokenized(this: Any, tokenizer: Any, request: Any, args: Any) -> Any:
            call = self._taken = getattr(args, "call", None)
            try:
                with self._pulse.at("tokenize"):
                    return tokenize(this, tokenizer, request, args)
            except BaseException:
                self._release(call)
                raise

        provider.load = load_for_request
        generator._next_request = next_request
        generator._tokenize = tokenized

    def _arm_batch(self, generate: Any) -> None:
        batch, response = generate.BatchGenerator, generate.PromptProcessingBatch.Response
        insert, advance, remove = batch.insert_segments, batch.next, batch.remove

        @functools.wraps(insert)
        def insert_segments(this: Any, *arguments: Any, **named: Any) -> Any:
            uids = insert(this, *arguments, **named)
            call, self._taken = self._taken, None
            if call is not None:
                self._in_batch[uids[0]] = call
            return uids

        @functools.wraps(advance)
        def advance_once(this: Any) -> Any:
            with self._pulse.at("step"):
                prompts, tokens = advance(this)
            for token in tokens:
                if token.finish_reason is not None:
                    self._release(self._in_batch.pop(token.uid, None))
            # The server checks only the requests for which something is reported.
            for uid in [sequence[0] for sequence in this._unprocessed_sequences]:
                call = self._in_batch.get(uid)
                if call is not None and call.left:
                    prompts.append(response(uid, (0, 0), False, False))
            return prompts, tokens

        @functools.wraps(remove)
        def remove_some(this: Any, uids: Any, *arguments: Any, **named: Any) -> Any:
            removed = remove(this, uids, *arguments, **named)
            for uid in uids:
                self._release(self._in_batch.pop(uid, None))
            return removed

        batch.insert_segments = insert_segments
        batch.next = advance_once
        batch.remove = remove_some

    def _arm_single(self, server: Any) -> None:
        serve, stream = server.ResponseGenerator._serve_single, server.stream_generate

        @functools.wraps(serve)
        def serve_single(this: Any, request: Any, *arguments: Any) -> None:
            call = getattr(request[2], "call", None)
            try:
                with self._pulse.at("step"):  # it reads images before there is a token to count
                    serve(this, request, *arguments)
            finally:
                self._release(call)

        @functools.wraps(stream)
        def stream_generate(*arguments: Any, **named: Any) -> Iterator[Any]:
            call, report = self._taken, named.get("prompt_progress_callback")
            if report is not None:
                named["prompt_progress_callback"] = self._checked(call, report)
            for token in stream(*arguments, **named):
                self._pulse.step()
                yield token

        server.ResponseGenerator._serve_single = serve_single
        server.stream_generate = stream_generate

    def _checked(self, call: Call | None, report: Callable[..., Any]) -> Callable[..., Any]:
        def progress(*counts: Any) -> Any:
            self._pulse.step()
            if call is not None and call.left:
                raise ClientLeft
            return report(*counts)

        return progress
