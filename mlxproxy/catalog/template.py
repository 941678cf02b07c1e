"""Analysis of what a chat template does with `enable_thinking`, without rendering it.

A template is a program, and one found in a folder may loop forever or exhaust the memory. So it is
only walked: each statement once, with everything unknown except the switch itself and what the
first message to an assistant always has. The outputs under each setting of the switch are then
compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

SWITCH = "enable_thinking"
MAX_LENGTH = 100_000  # characters; the longest in use have a third of that


class _Mark:
    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


UNKNOWN: Final = _Mark("UNKNOWN")
UNDEFINED: Final = _Mark("UNDEFINED")

# What the backend or transformers passes to every template. All other names are undefined there.
_GIVEN = ("messages", "bos_token", "eos_token", "pad_token", "unk_token")

Scope = dict[str, Any]
Written = tuple[int, object]  # a node of the tree, and what it writes


class _Generation(Extension):
    """transformers' own block, which marks the assistant's text; its content is written as is."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=32)
def thinking_switch(template: str) -> tuple[bool, bool | None]:
    """Return whether `enable_thinking` changes what the template writes, and its default.

    Returns:
        Whether it is a switch; and the setting that the template behaves as if it is not set; None
        if that is neither, or cannot be determined.
    """
    if len(template) > MAX_LENGTH:
        return False, None
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols", _Generation]).parse(template)
        on, off, unset = (_Walk(value).written(parsed.body) for value in (True, False, UNDEFINED))
    except (TemplateSyntaxError, ValueError, RecursionError):
        return False, None
    if on == off:
        return False, None
    return True, True if unset == on else False if unset == off else None


class _Walk:
    """One walk through a template, with one setting of the switch."""

    def __init__(self, switch: object) -> None:
        self._scope: Scope = dict.fromkeys(_GIVEN, UNKNOWN)
        self._scope |= {"add_generation_prompt": True, "tools": None, SWITCH: switch}
        self._written: list[Written] = []
        self._certain = True

    def written(self, body: Sequence[nodes.Node]) -> list[Written]:
        for node in body:
            self._statement(node)
        return self._written

    def _statement(self, node: nodes.Node) -> None:
        if isinstance(node, nodes.Output):
            for part in node.nodes:
                self._write(part)
        elif isinstance(node, nodes.If):
            self._branch(node)
        elif isinstance(node, nodes.Assign):
            self._assign(node.target, node.node)
        elif isinstance(node, nodes.For):
            self._maybe([*node.body, *node.else_], binds=[node.target])
        elif isinstance(node, nodes.Macro):
            self._maybe(node.body, binds=node.args)
        else:
            for child in node.iter_child_nodes():
                if isinstance(child, nodes.Stmt):
                    self._statement(child)

    def _branch(self, node: nodes.If) -> None:
        for case in (node, *node.elif_):
            outcome = self._truth(case.test)
            if outcome is True:
                self.written(case.body)
                return
            if outcome is UNKNOWN:
                self._maybe(case.body)
        self.written(node.else_)

    def _maybe(self, body: Sequence[nodes.Node], binds: Sequence[nodes.Node] = ()) -> None:
        """Walk statements that may or may not run: they write, but change no known value."""
        certain, self._certain = self._certain, False
        for target in binds:
            for name in [target, *target.find_all(nodes.Name)]:
                if isinstance(name, nodes.Name):
                    self._set(name.name, UNKNOWN)
        self.written(body)
        self._certain = certain

    def _assign(self, target: nodes.Node, value: nodes.Node) -> None:
        name = _name(target)
        if name is None:
            return
        if _called(value) == "namespace" and isinstance(value, nodes.Call):
            for pair in value.kwargs:
                self._set(f"{name}.{pair.key}", self._value(pair.value))
        else:
            self._set(name, self._value(value))

    def _set(self, name: str, value: object) -> None:
        if self._certain:
            self._scope[name] = value
        else:
            self._scope.setdefault(name, UNKNOWN)

    def _write(self, node: nodes.Node) -> None:
        if isinstance(node, nodes.TemplateData):
            if node.data.strip():
                self._written.append((id(node), None))
            return
        value = self._value(node)
        if value is not UNKNOWN:
            self._written.append((id(node), value))
            return
        for part in node.iter_child_nodes():
            self._write(part)

    def _truth(self, node: nodes.Node) -> object:
        """Return True, False or UNKNOWN."""
        value = self._value(node)
        if value is UNKNOWN:
            return UNKNOWN
        return value is not UNDEFINED and bool(value)

    def _value(self, node: nodes.Node) -> Any:
        """Return a constant, UNDEFINED, or UNKNOWN if it depends on more than the switch."""
        if isinstance(node, nodes.Const):
            return node.value
        if isinstance(node, nodes.Name | nodes.Getattr):
            return self._lookup(node)
        if isinstance(node, nodes.Not):
            truth = self._truth(node.node)
            return UNKNOWN if truth is UNKNOWN else not truth
        if isinstance(node, nodes.And):
            return self._joined(node, decisive=False)
        if isinstance(node, nodes.Or):
            return self._joined(node, decisive=True)
        if isinstance(node, nodes.CondExpr):
            truth = self._truth(node.test)
            if truth is UNKNOWN:
                return UNKNOWN
            chosen = node.expr1 if truth else node.expr2
            return UNDEFINED if chosen is None else self._value(chosen)
        if isinstance(node, nodes.Test):
            return self._tested(node)
        if isinstance(node, nodes.Compare):
            return self._compared(node)
        if isinstance(node, nodes.Filter) and node.name in ("default", "d"):
            return self._defaulted(node)
        return UNKNOWN

    def _lookup(self, node: nodes.Node) -> Any:
        name = _name(node)
        if name is None:
            return UNKNOWN
        return self._scope.get(name, UNKNOWN if "." in name else UNDEFINED)

    def _joined(self, node: nodes.And | nodes.Or, *, decisive: bool) -> object:
        """Return the value of `and` or `or`: one decisive side settles it, whatever the other."""
        sides = [self._truth(node.left), self._truth(node.right)]
        if decisive in sides:
            return decisive
        return UNKNOWN if UNKNOWN in sides else not decisive

    def _tested(self, node: nodes.Test) -> object:
        value = self._value(node.node)
        if value is UNKNOWN:
            return UNKNOWN
        if node.name in ("defined", "undefined"):
            return (value is UNDEFINED) == (node.name == "undefined")
        if node.name in ("true", "false", "none"):
            return value is {"true": True, "false": False, "none": None}[node.name]
        if node.name in ("sameas", "eq", "equalto", "==") and node.args:
            other = self._value(node.args[0])
            return UNKNOWN if other is UNKNOWN else value == other
        return UNKNOWN

    def _compared(self, node: nodes.Compare) -> object:
        operation = node.ops[0]
        if len(node.ops) > 1 or operation.op not in ("eq", "ne"):
            return UNKNOWN
        value, other = self._value(node.expr), self._value(operation.expr)
        if UNKNOWN in (value, other):
            return UNKNOWN
        return (value == other) == (operation.op == "eq")

    def _defaulted(self, node: nodes.Filter) -> Any:
        value = UNKNOWN if node.node is None else self._value(node.node)
        if value is UNKNOWN or not node.args:
            return UNKNOWN
        falsy_too = len(node.args) > 1 and self._truth(node.args[1]) is True
        missing = value is UNDEFINED or (falsy_too and not value)
        return self._value(node.args[0]) if missing else value


def _name(node: nodes.Node) -> str | None:
    """Return the name of a variable, or of an attribute of one, as it is written."""
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.NSRef):
        return f"{node.name}.{node.attr}"
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
        return f"{node.node.name}.{node.attr}"
    return None


def _called(node: nodes.Node) -> str | None:
    return _name(node.node) if isinstance(node, nodes.Call) else None
