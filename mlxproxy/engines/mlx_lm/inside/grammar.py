"""Answers that keep to a schema, and calls that are forced, enforced token by token.

`response_format` and `tool_choice` become a grammar for llguidance. Before each token, its matcher
tells which tokens the grammar allows, and the others become impossible. The grammar is compiled on
the thread of the request's own handler: the generation thread serves everybody.

A thought comes first and is free. A model may open one itself, too.
"""

from __future__ import annotations

import collections
import copy
import functools
import json
import logging
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, NamedTuple

from . import gate
from .gate import Unexpected
from .syntaxes import MOST_CALLS, SYNTAXES, Function, Refused, Spelling, is_forced, json_rule

CACHED = 64  # compiled grammars
MESSAGE_CHARACTERS = 300
TOKENIZER_SECONDS = 60.0  # the tokenizer is ready about a second after the model
TAIL = 11  # tokens at the end of a prompt that may be an empty thought, as in mlx-lm
HEADER = "%llguidance {}\n"
PRIVATE_USE = "\U000f0000"
FORMAT = "response_format"
CHOICE = "tool_choice"

NAMES: gate.Names = {
    "APIHandler.handle_completion": ("self", "request", "stop_words"),
    "ResponseGenerator.generate": ("self", "request", "generation_args"),
    "ResponseGenerator._tokenize": ("self", "tokenizer", "request", "args"),
    "ResponseGenerator._make_state_machine": ("self", "model_key", "tokenizer", "stop_words"),
    "ModelProvider._load": ("self",),
    "TextStateMachine.__init__": ("self", "transitions"),
    "_make_logits_processors": ("args",),
}


def arm(server: Any, mx: Any) -> None:
    """Patch `mlx_lm.server`.

    Raises:
        Unexpected: it generates in another way, or llguidance is not installed.
    """
    gate.require(server, NAMES)
    gate.require_uses(server, "APIHandler.do_POST", ("body",))
    gate.require_uses(server, "ResponseGenerator._tokenize", ("rfind_think_end",))
    gate.require_attributes(server, "ModelProvider", ("tokenizer", "draft_model"))
    try:
        import llguidance
        import llguidance.numpy
    except ImportError:
        why = "llguidance is not installed"
        raise Unexpected(f"{why}: run {sys.executable} -m pip install llguidance") from None
    Enforcement(server, mx, Compiler(llguidance)).arm()


class Wanted(NamedTuple):
    """What a request demands of its answer.

    Attributes:
        text: the grammar.
        parts: the schemas in it: the field that has each one, where in it, and its expression.
        is_text: the answer is text, whatever it contains: it is not searched for calls.
    """

    text: str
    parts: Sequence[tuple[str, str, str]]
    is_text: bool


class Speech(NamedTuple):
    """How a model writes: what of it matters to a grammar.

    Attributes:
        spelling: of its special tokens.
        syntax: the name of mlx-lm's parser of its calls; None if it has none.
        template: its chat template.
    """

    spelling: Spelling
    syntax: str | None
    template: str


def wanted(body: Mapping[str, Any], speech: Speech) -> Wanted | None:
    """Return what a checked request demands of its answer; None if it demands nothing.

    Raises:
        Refused: it cannot be enforced.
    """
    tools = [Function.of(tool) for tool in body.get("tools") or ()]
    form = _schema(body.get(FORMAT))
    answer = None if form is None else json_rule(*form)
    parts = [] if answer is None else [(FORMAT, "", answer)]
    forced = demanding_field(body) == CHOICE
    if not forced and (answer is None or not tools) and not any(tool.strict for tool in tools):
        return None if answer is None else Wanted(f"{HEADER}start: {answer}", parts, is_text=True)
    rules = SYNTAXES.get(speech.syntax or "")
    if rules is None and not forced and answer is None:
        return None  # a strict tool that the model is free to call or not; see the documentation
    if rules is None and forced:
        raise Refused(CHOICE, "is not supported for this model; only auto and none are.")
    if rules is None:
        raise Refused(
            FORMAT, "cannot be combined with tools for this model; leave one of them out."
        )
    named = isinstance(body[CHOICE], dict) if forced else False
    most = 1 if named or body.get("parallel_tool_calls") is False else MOST_CALLS
    calls = rules(speech.spelling, tools, most, speech.template)
    for tool in tools:
        rule = json_rule(tool.parameters, tool.strict)
        parts.append(("tools", f"in {tool.name}, ", rule))
    if forced:
        start = "start: calls"
        parts = [part for part in parts if part[0] != FORMAT]
    elif answer is not None:
        start = f"start: calls | answer\nanswer: {answer}"
    else:
        start = "start: FREE calls?\nFREE: /(.|\\n)*/"
    return Wanted(f"{HEADER}{start}\n{calls}", parts, is_text=False)


def demanding_field(body: Mapping[str, Any]) -> str | None:
    """Return the field of a checked request that demands a grammar; None if none does."""
    if body.get("tools") and is_forced(body.get(CHOICE)):
        return CHOICE
    return None if _schema(body.get(FORMAT)) is None else FORMAT


def _schema(form: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], bool] | None:
    """Return the schema of a checked `response_format`, and whether all of it must hold."""
    if not form or form["type"] == "text":
        return None
    if form["type"] == "json_object":
        return {"type": "object"}, True
    asked = form["json_schema"]
    return asked["schema"], asked.get("strict") is not False


class Unsupported(Exception):
    """No grammar can be enforced for this tokenizer; the message says why."""


class Compiler:
    """Compiles grammars for the tokenizer of the loaded model, and keeps them.

    Args:
        llguidance: the library.
    """

    def __init__(self, llguidance: Any) -> None:
        self._library = llguidance
        self._lock = threading.Lock()
        self._ready: Future[tuple[Any, Speech]] = Future()
        self._kept: collections.OrderedDict[str, Any] = collections.OrderedDict()

    def prepare(self, tokenizer: Any) -> None:
        """Begin to read a tokenizer, on a thread of its own: it takes about a second."""
        ready: Future[tuple[Any, Speech]] = Future()
        with self._lock:
            self._ready = ready
            self._kept.clear()
        work = functools.partial(self._read, tokenizer, ready)
        threading.Thread(target=work, name="grammar", daemon=True).start()

    def speech(self) -> Speech:
        """Return how the loaded model writes.

        Raises:
            Unsupported: its tokenizer cannot be used.
        """
        return self._tokenizer()[1]

    def matcher(self, grammar: Wanted) -> Any:
        """Return a matcher of its own for an answer.

        Raises:
            Refused: the grammar is impossible or too large.
            Unsupported: the tokenizer cannot be used.
        """
        tokenizer, _ = self._tokenizer()
        with self._lock:
            if grammar.text in self._kept:
                self._kept.move_to_end(grammar.text)
                return self._kept[grammar.text].deep_copy()
        made, why = self._compile(tokenizer, grammar.text)
        if why is not None:
            raise self._refusal(tokenizer, grammar, why)
        with self._lock:
            self._kept[grammar.text] = made
            while len(self._kept) > CACHED:
                self._kept.popitem(last=False)
        return made.deep_copy()

    def _compile(self, tokenizer: Any, text: str) -> tuple[Any, str | None]:
        """Return a matcher, and why it cannot be used; None if it can."""
        kind = self._library.LLMatcher
        matcher = kind(tokenizer, kind.grammar_from_lark(text), log_level=0)
        if matcher.is_error():
            return matcher, reason(matcher.get_error())
        try:
            matcher.compute_bitmask()  # an endless reference shows only here
        except BaseException:  # a panic is no Exception
            return matcher, "it is too complex"
        if matcher.is_error():
            return matcher, reason(matcher.get_error()) or "no answer is possible"
        return matcher, None

    def _refusal(self, tokenizer: Any, grammar: Wanted, why: str) -> Refused:
        for param, what, rule in grammar.parts:
            _, found = self._compile(tokenizer, f"{HEADER}start: {rule}")
            if found is not None:
                why = f"cannot be enforced: {what}{found}"
                return Refused(param, why[:MESSAGE_CHARACTERS])
        param = grammar.parts[0][0] if grammar.parts else CHOICE
        return Refused(param, f"cannot be enforced: {why}"[:MESSAGE_CHARACTERS])

    def _tokenizer(self) -> tuple[Any, Speech]:
        with self._lock:
            ready = self._ready
        try:
            return ready.result(TOKENIZER_SECONDS)
        except FutureTimeout:
            raise Unsupported("its tokenizer is still being read; try again") from None

    def _read(self, tokenizer: Any, ready: Future[tuple[Any, Speech]]) -> None:
        try:
            ready.set_result(self._read_tokenizer(tokenizer))
        except BaseException as error:  # the library's panics are no Exceptions
            logging.warning("structured output is off for this model: %s", error)
            ready.set_exception(Unsupported(str(error)[:MESSAGE_CHARACTERS]))

    def _read_tokenizer(self, tokenizer: Any) -> tuple[Any, Speech]:
        fast = getattr(tokenizer._tokenizer, "backend_tokenizer", None)
        if fast is None:
            raise Unsupported("only fast tokenizers are supported")
        from tokenizers import AddedToken

        own = copy.copy(fast)  # one that two threads share may raise
        own.no_padding()
        own.no_truncation()
        # A marker in the middle of a text would end it: as special tokens, they are no text.
        for marker in _markers(tokenizer):
            if (number := own.token_to_id(marker)) is not None:
                own.add_special_tokens([AddedToken(marker, special=True, normalized=False)])
                if own.token_to_id(marker) != number:
                    raise Unsupported(f"{marker} is ambiguous")
        written = json.loads(own.to_str())
        _rename_special(written)
        made = self._library.LLTokenizer(
            json.dumps(written), eos_token=sorted(tokenizer.eos_token_ids)
        )
        special = {
            token.content: number
            for number, token in own.get_added_tokens_decoder().items()
            if token.special
        }
        _, why = self._compile(made, f"{HEADER}start: {json_rule({'type': 'object'}, True)}")
        if why is not None:
            raise Unsupported(why)
        parser = tokenizer.tool_parser
        syntax = None if parser is None else parser.__module__.rpartition(".")[2]
        template = tokenizer.chat_template
        return made, Speech(
            Spelling(special), syntax, template if isinstance(template, str) else ""
        )


def _rename_special(tokenizer: dict[str, Any]) -> None:
    """Rename the special tokens in the JSON of a tokenizer.

    A schema may contain the text of one ("<|im_end|>"), which has to be written in other tokens. A
    grammar names a special token by its id.
    """
    model = tokenizer["model"]
    vocabulary, unknown = model.get("vocab"), model.get("unk_token")
    for token in tokenizer["added_tokens"]:
        name = token["content"]
        if not token["special"] or name == unknown:
            continue
        token["content"] = f"{PRIVATE_USE}{token['id']}"
        if isinstance(vocabulary, dict) and name in vocabulary:
            vocabulary[token["content"]] = vocabulary.pop(name)
    tokenizer["post_processor"] = None  # it may refer to them


def _markers(tokenizer: Any) -> Iterator[str]:
    for name in ("think_start", "think_end", "tool_call_start", "tool_call_end"):
        marker = getattr(tokenizer, name, None)
        if isinstance(marker, str) and marker:
            yield marker


def reason(error: str) -> str:
    """Return what an error of llguidance says, without the grammar that it quotes."""
    words = error.partition("failed to compile JSON schema: ")[2] or error
    return " ".join(words.partition("\n   1 | ")[0].split())


class Thought(NamedTuple):
    """The thought of a model before its answer.

    Attributes:
        start: the tokens that begin it.
        end: the tokens that end it.
        is_open: the prompt has begun it; otherwise the model may.
    """

    start: Sequence[int]
    end: Sequence[int]
    is_open: bool


class Guide:
    """The guidance of one answer. Used by the handler's thread, then by the generation thread.

    Attributes:
        failed: the matcher has failed, which it should not; the answer is worth nothing.
    """

    def __init__(
        self, matcher: Any, end: Sequence[int], is_text: bool, mx: Any, numpy: Any
    ) -> None:
        self.is_text = is_text
        self.failed = False
        self.may_think = False
        self._matcher = matcher
        self._end = end
        self._mx = mx
        self._numpy = numpy
        self._thought: Thought | None = None
        self._thinks = False
        self._recent: list[int] = []
        self._may_open = False
        self._begun = False
        self._ended = False
        self._bits: Any = None

    def begin(self, thought: Thought | None) -> None:
        """Set what may come before the answer."""
        self._thought = thought
        self._thinks = thought is not None and thought.is_open
        self._may_open = thought is not None and not thought.is_open
        self.may_think = self._may_open

    def __call__(self, tokens: Any, logits: Any) -> Any:
        """Return the logits of the next token, of which only the allowed ones are possible.

        Args:
            tokens: those so far; the last of them is new. At first it belongs to the prompt.
        """
        try:
            self._mx.async_eval(logits)  # the model computes while the mask is made
            if self._begun:
                self._take(int(tokens[-1].item()))
            self._begun = True
            return self._masked(logits)
        except BaseException:  # it would end everybody's answers; a panic is no Exception
            self._fail()
            return logits

    def _take(self, token: int) -> None:
        if self._thinks:
            assert self._thought is not None
            end = list(self._thought.end)
            self._recent = [*self._recent, token][-len(end) :]
            self._thinks = self._recent != end
        elif self._may_open and self._thought and token == self._thought.start[0]:
            self._thinks, self._may_open = True, False
        elif token in self._end:
            self._ended = True
        elif not self._ended:
            self._may_open = False
            if not self._matcher.consume_token(token):
                self._fail()

    def _masked(self, logits: Any) -> Any:
        if self._ended:  # a batch computes one token more
            return logits
        width = logits.shape[-1]
        if self._thinks:
            allowed = self._numpy.ones(width, dtype=bool)
            allowed[list(self._end)] = False  # or the answer would end within the thought
        elif self.failed:
            allowed = self._numpy.zeros(width, dtype=bool)
            allowed[list(self._end)] = True
        else:
            allowed = self._allowed(width)
        mx = self._mx
        # No infinity: it would appear among the log probabilities, and JSON has none.
        low = mx.array(mx.finfo(logits.dtype).min / 2, logits.dtype)
        return mx.where(mx.array(allowed), logits, low)

    def _allowed(self, width: int) -> Any:
        numpy = self._numpy
        bits = numpy.frombuffer(self._matcher.compute_bitmask(), dtype=numpy.uint8)
        if self._matcher.is_error():
            self._fail()
        allowed = numpy.zeros(width, dtype=bool)
        known = numpy.unpackbits(bits, bitorder="little")[:width]
        allowed[: len(known)] = known
        if self._may_open and self._thought:
            allowed[self._thought.start[0]] = True
        if self.failed or not allowed.any():
            self._fail()
            allowed[:] = False
            allowed[list(self._end)] = True
        return allowed

    def _fail(self) -> None:
        if not self.failed:
            self.failed = True
            logging.warning("An answer could not be kept to its schema; it is aborted.")


class Enforcement:
    """The enforcement of grammars in one server."""

    def __init__(self, server: Any, mx: Any, compiler: Compiler) -> None:
        import numpy

        self._server = server
        self._mx = mx
        self._numpy = numpy
        self._compiler = compiler
        self._handler = threading.local()  # .guide: of the request that this HTTP thread serves
        self._taken: Guide | None = None  # of the last request; for the generation thread only

    def arm(self) -> None:
        """Patch the server."""
        self._arm_load()
        self._arm_handler()
        self._arm_generation()

    def _arm_load(self) -> None:
        provider = self._server.ModelProvider
        load = provider._load

        @functools.wraps(load)
        def load_model(this: Any, *arguments: Any, **named: Any) -> Any:
            result = load(this, *arguments, **named)
            self._compiler.prepare(this.tokenizer)
            return result

        provider._load = load_model

    def _arm_handler(self) -> None:
        handler, generator = self._server.APIHandler, self._server.ResponseGenerator
        handle, generate = handler.handle_completion, generator.generate

        @functools.wraps(handle)
        def handle_completion(this: Any, request: Any, stop_words: Any) -> None:
            try:
                self._handler.guide = self._guide(this.body, this.response_generator)
            except Refused as refused:
                this._set_completion_headers(400)
                this.end_headers()
                answer = {"error": str(refused), "param": refused.param}
                this.wfile.write(json.dumps(answer).encode())
                return
            try:
                handle(this, request, stop_words)
            finally:
                self._handler.guide = None

        @functools.wraps(generate)
        def generate_guided(
            this: Any, request: Any, generation_args: Any, *rest: Any, **named: Any
        ) -> Any:
            guide = getattr(self._handler, "guide", None)
            if guide is None:
                return generate(this, request, generation_args, *rest, **named)
            generation_args.guide = guide
            context, answer = generate(this, request, generation_args, *rest, **named)
            return context, _checked(guide, answer)

        handler.handle_completion = handle_completion
        generator.generate = generate_guided

    def _guide(self, body: Mapping[str, Any], generator: Any) -> Guide | None:
        """Return the guide of a request; None if it needs none.

        Raises:
            Refused: its demands cannot be met.
        """
        field = demanding_field(body)
        strict = any(tool["function"].get("strict") for tool in body.get("tools") or ())
        if field is None and not strict:
            return None
        try:
            return self._guide_for(field or "tools", body, generator)
        except Refused:
            if field is None:  # the model may call the tool, or not: nothing is promised
                return None
            raise

    def _guide_for(self, field: str, body: Mapping[str, Any], generator: Any) -> Guide | None:
        provider = generator.model_provider
        if provider.draft_model is not None:
            raise Refused(field, "is impossible with a draft model; load the model without one.")
        if generator._is_distributed:
            raise Refused(field, "is impossible with several machines.")
        try:
            asked = wanted(body, self._compiler.speech())
        except Unsupported as error:
            raise Refused(field, f"cannot be enforced for this model: {error}.") from None
        if asked is None:
            return None
        matcher = self._compiler.matcher(asked)
        end = sorted(provider.tokenizer.eos_token_ids)
        return Guide(matcher, end, asked.is_text, self._mx, self._numpy)

    def _arm_generation(self) -> None:
        server = self._server
        generator, machine = server.ResponseGenerator, server.TextStateMachine
        tokenize, make = generator._tokenize, generator._make_state_machine
        processors = server._make_logits_processors

        @functools.wraps(tokenize)
        def _tokenize(this: Any, tokenizer: Any, request: Any, args: Any) -> Any:
            self._taken = None
            result = tokenize(this, tokenizer, request, args)
            guide = getattr(args, "guide", None)
            if guide is not None:
                settings = dict(this.model_provider.cli_args.chat_template_args or {})
                settings.update(args.chat_template_kwargs or {})
                guide.begin(_thought(tokenizer, request, result[0], result[3], settings))
                self._taken = guide
            return result

        @functools.wraps(make)
        def make_state_machine(this: Any, model_key: Any, tokenizer: Any, stop_words: Any) -> Any:
            sequences, found = make(this, model_key, tokenizer, stop_words)
            guide = self._taken
            if guide is not None and guide.is_text and not guide.may_think:
                found = machine(_text_only(tokenizer, stop_words))
            return sequences, found

        @functools.wraps(processors)
        def _make_logits_processors(args: Any) -> Any:
            made = processors(args)
            guide = getattr(args, "guide", None)
            return made if guide is None else [*(made or ()), guide]  # the mask comes last

        generator._tokenize = _tokenize
        generator._make_state_machine = make_state_machine
        server._make_logits_processors = _make_logits_processors


def _checked(guide: Guide, answer: Iterator[Any]) -> Iterator[Any]:
    """Yield the responses of an answer, as long as its guide has not failed."""
    for response in answer:
        if guide.failed:
            raise ConnectionAbortedError("the answer is not what was asked for")
        yield response


def _thought(
    tokenizer: Any, request: Any, prompt: Sequence[int], state: str, settings: Mapping[str, Any]
) -> Thought | None:
    """Return the thought that comes or may come before an answer; None if none may."""
    if request.request_type != "chat" or not tokenizer.has_thinking:
        return None
    start, end = tokenizer.think_start_tokens, tokenizer.think_end_tokens
    if not start or not end:
        return None
    if state == "reasoning":
        return Thought(start, end, is_open=True)
    is_over = tokenizer.rfind_think_end(prompt, start=max(0, len(prompt) - TAIL)) >= 0
    off = any(settings.get(name) is False for name in ("enable_thinking", "thinking"))
    return None if is_over or off else Thought(start, end, is_open=False)


def _text_only(tokenizer: Any, stop_words: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Return the transitions of an answer whose text may contain what looks like a marker."""
    states: dict[str, list[tuple[str, str]]] = {"normal": []}
    if tokenizer.has_thinking:
        states["reasoning"] = [(tokenizer.think_end, "normal")]
    for name, edges in states.items():
        edges.extend((word, name) for word in stop_words)
    return states
