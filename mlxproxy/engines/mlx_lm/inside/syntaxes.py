"""The syntaxes in which models write tool calls, as rules of llguidance's Lark dialect.

Each function is the counterpart of the parser of the same name in `mlx_lm.tool_parsers`: what its
rules generate is what that parser reads, with the values that the schema allows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

MOST_CALLS = 16  # in one answer
_PLAIN_NAME = re.compile(r"[\w.:/-]{1,256}")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w{0,255}")
_SPEECH = frozenset({"type", "title", "description", "default", "examples", "deprecated"})
"""Keywords that do not limit a string."""
_FLAT = _SPEECH | {"properties", "required", "additionalProperties", "$defs", "definitions"}
"""Keywords of an object's schema that a call of separate arguments can honour."""
_JSON_TYPES = frozenset({"integer", "number", "boolean", "object", "array"})


class Refused(Exception):
    """A demand cannot be met; the message says which part of the request, and why.

    Attributes:
        param: the field of the request.
        why: what is wrong with it, as the rest of a sentence that begins with the field.
    """

    def __init__(self, param: str, why: str) -> None:
        super().__init__(f"{param} {why}")
        self.param = param
        self.why = why


def is_forced(choice: object) -> bool:
    """Return whether a checked `tool_choice` demands a call."""
    if isinstance(choice, dict):
        return bool(choice.get("allowed_tools", {}).get("mode") != "auto")
    return choice == "required"


def json_rule(schema: Mapping[str, Any], strict: bool) -> str:
    """Return the expression for the JSON values that a schema allows.

    Args:
        strict: whether a keyword that cannot be enforced is an error instead of being ignored.
    """
    # Without flexible white space: a small model would write blanks for ever.
    options = {
        "whitespace_flexible": False,
        "item_separator": ", ",
        "key_separator": ": ",
        "lenient": not strict,
    }
    return "%json " + json.dumps({**schema, "x-guidance": options})


class Function(NamedTuple):
    """A function that the model may call."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool

    @classmethod
    def of(cls, tool: Mapping[str, Any]) -> Function:
        """Return the function of a checked tool."""
        function = tool["function"]
        parameters = function.get("parameters") or {"properties": {}}
        # Without a type, numbers and texts would satisfy the schema, too.
        return cls(
            function["name"], {"type": "object", **parameters}, function.get("strict") is True
        )

    def refuse(self, why: str) -> Refused:
        """Return the error for this function."""
        return Refused("tools", f"cannot be enforced: in {self.name}, {why}")


@dataclass(frozen=True)
class Spelling:
    """The spelling of text in a grammar: a token of the vocabulary is named by its id.

    Attributes:
        tokens: the special tokens, by their text, which no other text of a grammar matches.
    """

    tokens: Mapping[str, int]

    def text(self, text: str) -> str:
        """Return the expression for exactly this text."""
        found = [token for token in self.tokens if token in text]
        if not found:
            return json.dumps(text, ensure_ascii=False) if text else ""
        longest_first = "|".join(map(re.escape, sorted(found, key=len, reverse=True)))
        return " ".join(
            f"<[{self.tokens[part]}]>" if part in self.tokens else json.dumps(part)
            for part in re.split(f"({longest_first})", text)
            if part
        )


Rules = Callable[[Spelling, Sequence[Function], int, str], str]
"""Returns the rules of `calls` for functions, a maximum number of calls, and a chat template."""


def _several(call: str, separator: str, most: int) -> str:
    """Return the expression for one to `most` calls."""
    return call if most == 1 else f"{call} ({separator} {call}){{0,{most - 1}}}"


def _any_of(functions: Sequence[Function], call: Callable[[int, Function], str]) -> str:
    """Return the rule `call`: a call of any of the functions."""
    rules = [f"f{number}: {call(number, function)}" for number, function in enumerate(functions)]
    return "\n".join(["call: " + " | ".join(f"f{n}" for n in range(len(functions))), *rules])


def _named_json(spelling: Spelling, functions: Sequence[Function]) -> str:
    def call(_: int, function: Function) -> str:
        start = spelling.text(f'{{"name": {json.dumps(function.name)}, "arguments": ')
        return f'{start} {json_rule(function.parameters, function.strict)} "}}"'

    return _any_of(functions, call)


def json_tools(spelling: Spelling, functions: Sequence[Function], most: int, _: str) -> str:
    """Qwen 2.5 and 3, Hermes, SmolLM: an object with name and arguments between two tags."""
    start, end = spelling.text("<tool_call>\n"), spelling.text("\n</tool_call>")
    calls = _several(f"{start} call {end}", '"\\n"', most)
    return f"calls: {calls}\n{_named_json(spelling, functions)}"


def mistral(spelling: Spelling, functions: Sequence[Function], most: int, template: str) -> str:
    """Mistral: a list of such objects, or since 2025 the name, `[ARGS]` and the arguments."""
    if "[ARGS]" not in template:
        calls = _several("call", '", "', most)
        start = spelling.text("[TOOL_CALLS][")
        return f'calls: {start} {calls} "]"\n{_named_json(spelling, functions)}'

    def call(_: int, function: Function) -> str:
        if not re.fullmatch(r"[\w-]{1,256}", function.name):
            raise function.refuse("this model's calls cannot contain its name")
        start = spelling.text(f"[TOOL_CALLS]{function.name}[ARGS]")
        return f"{start} {json_rule(function.parameters, function.strict)}"

    return f"calls: {_several('call', '', most)}\n{_any_of(functions, call)}"


def kimi_k2(spelling: Spelling, functions: Sequence[Function], most: int, _: str) -> str:
    """Kimi K2: a section of calls, each with a numbered name and arguments."""

    def call(_: int, function: Function) -> str:
        _require_plain(function)
        start = spelling.text(f"<|tool_call_begin|>functions.{function.name}:")
        middle = spelling.text("<|tool_call_argument_begin|>")
        end = spelling.text("<|tool_call_end|>")
        arguments = json_rule(function.parameters, function.strict)
        return f"{start} /[0-9]/ {middle} {arguments} {end}"

    start = spelling.text("<|tool_calls_section_begin|>")
    end = spelling.text("<|tool_calls_section_end|>")
    calls = _several("call", "", min(most, 10))
    return f"calls: {start} {calls} {end}\n{_any_of(functions, call)}"


def qwen3_coder(spelling: Spelling, functions: Sequence[Function], most: int, _: str) -> str:
    """Qwen3-Coder, Qwen 3.5, Nemotron 3: a tag for the function and one for each argument."""

    def call(_: int, function: Function) -> str:
        arguments = _arguments(
            function,
            lambda key: spelling.text(f"<parameter={key}>\n"),
            spelling.text("\n</parameter>\n"),
        )
        start = spelling.text(f"<tool_call>\n<function={function.name}>\n")
        end = spelling.text("</function>\n</tool_call>")
        return f"{start} {arguments} {end}"

    text = _text(spelling, "\n</parameter>\n", not_null=True)
    calls = _several("call", '"\\n"', most)
    return f"calls: {calls}\n{_any_of(functions, call)}\n{text}"


def glm47(spelling: Spelling, functions: Sequence[Function], most: int, _: str) -> str:
    """GLM 4.5 to 4.7: the name, then a pair of tags for each argument."""

    def call(_: int, function: Function) -> str:
        arguments = _arguments(
            function,
            lambda key: spelling.text(f"<arg_key>{key}</arg_key>\n<arg_value>"),
            spelling.text("</arg_value>\n"),
            reads_json=True,
        )
        start = spelling.text(f"<tool_call>{function.name}\n")
        end = spelling.text("</tool_call>")
        return f"{start} {arguments} {end}"

    text = _text(spelling, "</arg_value>\n", not_null=False)
    calls = _several("call", '"\\n"', most)
    return f"calls: {calls}\n{_any_of(functions, call)}\n{text}"


def minimax_m2(spelling: Spelling, functions: Sequence[Function], most: int, _: str) -> str:
    """MiniMax M2: a section of calls, with a tag for the function and one for each argument."""

    def call(_: int, function: Function) -> str:
        arguments = _arguments(
            function,
            lambda key: spelling.text(f'<parameter name="{key}">'),
            spelling.text("</parameter>\n"),
        )
        start = spelling.text(f'<invoke name="{function.name}">\n')
        end = spelling.text("</invoke>\n")
        return f"{start} {arguments} {end}"

    start = spelling.text("<minimax:tool_call>\n")
    calls = _several("call", "", most)
    end = spelling.text("</minimax:tool_call>")
    text = _text(spelling, "</parameter>\n", not_null=True)
    return f"calls: {start} {calls} {end}\n{_any_of(functions, call)}\n{text}"


SYNTAXES: Final[Mapping[str, Rules]] = {
    function.__name__: function
    for function in (json_tools, mistral, kimi_k2, qwen3_coder, glm47, minimax_m2)
}


def _require_plain(function: Function) -> None:
    if not _PLAIN_NAME.fullmatch(function.name):
        raise function.refuse("this model's calls cannot contain its name")


def _text(spelling: Spelling, end: str, not_null: bool) -> str:
    """Return the rules for `text`: text as it is, and what ends it.

    Args:
        not_null: the parser reads the text "null" as no value.
    """
    anything = r"/(.|\n)*/"
    null = r" & ~/[ \n\t]*[nN][uU][lL][lL][ \n\t]*/" if not_null else ""
    if any(token in end for token in spelling.tokens):
        return f"text: ANY {spelling.text(end)}\nANY: {anything}{null}"
    tag = re.escape(end.strip()).replace("/", r"\/")
    # One terminal, since the longest match counts, and text alone could go on into the end.
    tagged = rf"/(.|\n)*{tag}(.|\n)*/"
    return f"text: TEXT\nTEXT: ({anything} & ~{tagged}{null}) {spelling.text(end)}"


def _arguments(
    function: Function,
    start: Callable[[str], str],
    end: str,
    reads_json: bool = False,
) -> str:
    """Return the expression for the arguments, in the order of the schema.

    Args:
        start: returns the expression before the value of that name.
        end: the expression after a value.
        reads_json: the parser reads any value as JSON, unless the schema says that it is a string.
    """
    _require_plain(function)
    schema = function.parameters
    if function.strict and (odd := schema.keys() - _FLAT - {"$schema"}):
        raise function.refuse(f"this model's calls cannot honour {min(odd)} at the top")
    required = schema.get("required") or ()
    words = []
    for key, value in (schema.get("properties") or {}).items():
        if not _PLAIN_NAME.fullmatch(key):
            raise function.refuse(f"this model's calls cannot contain the name of {key[:64]!r}")
        written = _value(function, key, value, reads_json)
        argument = f"{start(key)} {'text' if written is None else f'{written} {end}'}"
        words.append(argument if key in required else f"({argument})?")
    return " ".join(words)


def _value(function: Function, key: str, schema: Mapping[str, Any], reads_json: bool) -> str | None:
    """Return the expression for the value of an argument, as the parser will read it; None: text.

    It looks at the property's own `type`, not at what the property refers to.
    """
    kind = schema.get("type")
    if kind != "string" and (reads_json or kind in _JSON_TYPES):
        root = function.parameters
        shared = {name: root[name] for name in ("$defs", "definitions") if name in root}
        return json_rule({**schema, **shared}, function.strict)
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if kind == "string" and isinstance(choices, list) and _are_words(choices):
        return "(" + " | ".join(json.dumps(it, ensure_ascii=False) for it in choices) + ")"
    if function.strict and (kind != "string" or (odd := schema.keys() - _SPEECH)):
        what = "the type" if kind != "string" else min(odd)
        raise function.refuse(f"this model's calls cannot honour {what} of {key}")
    return None


def _are_words(choices: Sequence[Any]) -> bool:
    return bool(choices) and all(
        isinstance(it, str) and it == it.strip() and it and it.lower() != "null" and "<" not in it
        for it in choices
    )
