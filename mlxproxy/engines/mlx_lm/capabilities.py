"""The capabilities of a model, decided as ``mlx_lm.tokenizer_utils`` does when it loads the model.

The tables below follow that module; a test compares them with the installed version.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mlxproxy.catalog.layout import TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from mlxproxy.catalog.model import Capabilities
from mlxproxy.catalog.template import SWITCH, thinking_switch
from mlxproxy.files import MB, Unreadable, open_regular, read_object, read_text

# Any one of these makes a tokenizer; without one, the first chat crashes the backend's generation
# thread.
_VOCABULARY = re.compile(
    r"tokenizer\.json|tokenizer\.model|tekken\.json|vocab\.(json|txt)|spiece\.model|"
    r"sentencepiece.*\.model|.*\.tiktoken|tiktoken\.model|qwen\.tiktoken"
)

# The backend reads tool calls from an answer if the template contains all strings of one line.
_TOOL_CALLS = (
    ("<minimax:tool_call>",),
    ("<|tool_call>", "<tool_call|>"),
    ("<start_function_call>",),
    ("<longcat_tool_call>",),
    ("<arg_key>",),
    ("<|tool_list_start|>",),
    ("<|tool_call_start|>",),
    ("<tool_call>\\n<function=",),
    ("<tool_call>\n<function=",),
    ("<|tool_calls_section_begin|>",),
    ('<function name="', '<param name="'),
    ("[TOOL_CALLS]",),
    ("<atem:function_calls>",),
    ("<tool_call>", "tool_call.name"),
)
_MESSAGE_TOKENS = ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")
# If no template says so: all tokens of one line must be in the vocabulary.
_TOOL_TOKENS = (_MESSAGE_TOKENS, ("<|tool_call_start|>", "<|tool_call_end|>"))
_THINK_TOKENS = (
    ("<think>", "</think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
    ("<|channel>", "<channel|>"),
    _MESSAGE_TOKENS,
)
_TOKENS = frozenset(token for group in (*_TOOL_TOKENS, *_THINK_TOKENS) for token in group)
_QUOTED = re.compile(b"|".join(re.escape(json.dumps(it).encode()) for it in sorted(_TOKENS)))
_OTHER_SWITCH = re.compile(r"\bthinking\b")  # in templates that the backend cannot switch
_BYTE_PAIR = re.compile(rb'"model":\s*\{\s*"type":\s*"BPE"')
_CHUNK = 1 << 20
_LONGEST = max(map(len, _TOKENS)) + 2


@dataclass(frozen=True)
class TokenizerFiles:
    """The contents of a model's tokenizer files, as far as they matter here."""

    folder: str
    files: Collection[str]
    config: Mapping[str, Any]
    template: str | None
    templates: Mapping[Any, Any] | None  # by name, if the model has several

    @classmethod
    def read(cls, folder: str, files: Collection[str]) -> TokenizerFiles:
        """Read the tokenizer files of a folder.

        Raises:
            Unreadable: one of them would make the backend fail or hang.
        """
        config: dict[str, Any] = {}
        if TOKENIZER_CONFIG in files:
            config = read_object(f"{folder}/{TOKENIZER_CONFIG}", 16 * MB)
        if not any(map(_VOCABULARY.fullmatch, files)):
            raise Unreadable("the tokenizer is missing")
        if TOKENIZER in files:
            _check_whole(f"{folder}/{TOKENIZER}")
        template: Any = config.get("chat_template")
        if TEMPLATE in files:
            template = read_text(f"{folder}/{TEMPLATE}", 1 * MB)
        templates = None
        if isinstance(template, list):
            templates = {str(it.get("name")): it.get("template") for it in map(_dict, template)}
        elif isinstance(template, dict):
            templates = template
        if templates is not None:
            template = templates.get("default")
        return cls(
            folder, files, config, template if isinstance(template, str) else None, templates
        )

    def is_byte_pair(self) -> bool:
        """Return whether it is of the one kind for which a grammar can be enforced."""
        if TOKENIZER not in self.files:
            return False
        try:
            with open_regular(f"{self.folder}/{TOKENIZER}") as (file, _):
                return bool(_BYTE_PAIR.search(os.pread(file, _CHUNK, 0)))
        except Unreadable:
            return False

    def vocabulary(self) -> set[str]:
        """Return those of the tokens above that are in the vocabulary."""
        added = map(_dict, _dict(self.config.get("added_tokens_decoder")).values())
        found = {token for it in added if isinstance(token := it.get("content"), str)} & _TOKENS
        for file in (TOKENIZER, "added_tokens.json"):
            if file in self.files:
                found |= _tokens_in(f"{self.folder}/{file}")
        return found


def capabilities(
    tokenizer: TokenizerFiles, defaults: Mapping[str, Any], *, vision: bool
) -> Capabilities:
    """Return what a model can do.

    Args:
        tokenizer: its tokenizer files.
        defaults: its architecture's settings for tokenizers that have none of their own.
        vision: the backend passes images to it.
    """
    template = tokenizer.template
    parser = tokenizer.config.get("tool_parser_type") or defaults.get("tool_parser_type")
    renderer = tokenizer.config.get("chat_template_type") or (
        defaults.get("chat_template_type") if template is None else None
    )
    # mlx-lm looks into a template only if it is the only one.
    searched = template if tokenizer.templates is None else None
    tools = parser is not None or _any_in(_TOOL_CALLS, searched or "")
    may_think = renderer is not None or "think" in (template or "") or "channel" in (template or "")
    vocabulary = tokenizer.vocabulary() if may_think or not tools else set()
    tools = tools or _any_in(_TOOL_TOKENS, vocabulary)
    tokens = next((it for it in _THINK_TOKENS if vocabulary.issuperset(it)), None)
    if tokens is None or not may_think:
        return Capabilities(tools=tools, vision=vision)
    if renderer is not None or template is None:  # rendered by a function of mlx-lm
        return Capabilities(tools=tools, vision=vision, thinking=True, thinking_switch=True)
    if SWITCH not in template:
        # Many vocabularies have these tokens only for related models that do think.
        thinks = any(token in template for token in tokens)
        told = thinks and not _OTHER_SWITCH.search(template)
        return Capabilities(
            tools=tools, vision=vision, thinking=thinks, thinking_default=True if told else None
        )
    switch, default = thinking_switch(template)
    return Capabilities(
        tools=tools, vision=vision, thinking=True, thinking_default=default, thinking_switch=switch
    )


def _any_in(groups: Collection[Collection[str]], place: Collection[str]) -> bool:
    return any(all(marker in place for marker in group) for group in groups)


def _dict(value: object) -> Mapping[Any, Any]:
    return value if isinstance(value, dict) else {}


def _check_whole(path: str) -> None:
    """Raise Unreadable if the file does not begin and end like a JSON object.

    Parsing the largest tokenizers takes most of a second, and a truncated file shows at its end.
    """
    with open_regular(path) as (file, size):
        start, end = os.pread(file, 64, 0), os.pread(file, 64, max(0, size - 64))
        if not start.lstrip().startswith(b"{") or not end.rstrip().endswith(b"}"):
            raise Unreadable("tokenizer.json is truncated or not JSON")


def _tokens_in(path: str) -> set[str]:
    """Return those of the tokens above that occur, quoted, in a JSON file of any size."""
    found: set[bytes] = set()
    try:
        with open_regular(path) as (file, _):
            rest = b""
            while chunk := os.read(file, _CHUNK):
                found.update(_QUOTED.findall(rest + chunk))
                rest = chunk[-_LONGEST:]
    except Unreadable:
        return set()
    return {json.loads(token) for token in found}
