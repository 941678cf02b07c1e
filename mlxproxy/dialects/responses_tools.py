"""The tools of a Responses request, converted to functions that a model can call, and back.

Codex offers each MCP server as a namespace of functions, and some tools that take text in a grammar
of their own. The model sees only functions; the client gets each call as a call of the tool that it
offered.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from mlxproxy.dialects import fields
from mlxproxy.dialects.form import Json

LONGEST_NAME = 64
_ODD = re.compile(r"[^A-Za-z0-9_-]")
_INPUT = {
    "type": "object",
    "properties": {"input": {"type": "string", "description": "The whole input of the tool."}},
    "required": ["input"],
}


class Origin(NamedTuple):
    """The client's name for a function."""

    kind: Literal["function", "custom"]
    name: str
    namespace: str | None = None


class Tools:
    """The functions among the tools of a request.

    Attributes:
        functions: in chat's form.
    """

    def __init__(self) -> None:
        self.functions: list[Json] = []
        self._origins: dict[str, Origin] = {}
        self._names: dict[tuple[str | None, str], str] = {}

    def add(self, tools: Sequence[Any], place: str, namespace: str | None = None) -> None:
        """Add the tools that a model can call, without those that only OpenAI's servers can run.

        Raises:
            InvalidRequest: a tool has no name.
        """
        for index, tool in enumerate(tools):
            where = f"{place}[{index}]"
            tool = fields.an_object(tool, where)
            kind = tool.get("type")
            if kind == "namespace":
                name = fields.a_text(tool.get("name"), f"{where}.name")
                inner = fields.a_list(tool.get("tools") or [], f"{where}.tools")
                self.add(inner, f"{where}.tools", name)
            elif kind == "function":
                parameters = tool.get("parameters") or {"type": "object", "properties": {}}
                fields.an_object(parameters, f"{where}.parameters")
                self._offer("function", tool, where, namespace, parameters)
            elif kind == "custom":
                self._offer("custom", tool, where, namespace, _INPUT)

    def origin(self, name: str) -> Origin:
        """Return the client's name for the function that the model calls by this name."""
        return self._origins.get(name) or Origin("function", name)

    def name(self, name: str, namespace: str | None = None) -> str:
        """Return the model's name for a client's tool, whether offered now or in an old call."""
        known = self._names.get((namespace, name))
        return known or (name if namespace is None else _flat(namespace, name))

    def choice(self, choice: Any) -> Any:
        """Return chat's `tool_choice`; None leaves it to the model.

        A choice among some of the tools removes the others.

        Raises:
            InvalidRequest: it is not a valid choice.
        """
        if choice is None or choice in ("auto", "none", "required"):
            return choice
        choice = fields.an_object(choice, "tool_choice")
        kind = choice.get("type")
        if kind == "allowed_tools":
            allowed = fields.a_list(choice.get("tools"), "tool_choice.tools")
            names = {self._chosen(tool) for tool in allowed}
            self.functions = [tool for tool in self.functions if tool["function"]["name"] in names]
            return choice.get("mode")
        if kind in ("function", "custom"):
            name = self._chosen(choice)
            if any(tool["function"]["name"] == name for tool in self.functions):
                return {"type": "function", "function": {"name": name}}
        return None

    def _chosen(self, tool: Any) -> str | None:
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
            return None
        return self.name(tool["name"], tool.get("namespace"))

    def _offer(
        self,
        kind: Literal["function", "custom"],
        tool: Json,
        place: str,
        namespace: str | None,
        parameters: Json,
    ) -> None:
        name = fields.a_text(tool.get("name"), f"{place}.name")
        unique = name if namespace is None else _flat(namespace, name)
        if unique in self._origins:
            unique = _flat(namespace or "", name, hashed=True)
        self._origins[unique] = Origin(kind, name, namespace)
        self._names[namespace, name] = unique
        function: Json = {"name": unique}
        if description := _description(tool, place):
            function["description"] = description
        function["parameters"] = parameters
        if tool.get("strict") is True:
            function["strict"] = True
        self.functions.append({"type": "function", "function": function})


def _description(tool: Json, place: str) -> str:
    text = fields.a_text(tool.get("description") or "", f"{place}.description")
    form = tool.get("format")
    if isinstance(form, dict) and isinstance(form.get("definition"), str):
        text = f"{text}\nGrammar:\n{form['definition']}"
    return text


def _flat(namespace: str, name: str, hashed: bool = False) -> str:
    """Return one name for a namespace and a name; it is stable, and models can write it."""
    full = f"{namespace}__{name}"
    plain = _ODD.sub("_", full)
    if plain == full and len(plain) <= LONGEST_NAME and not hashed:
        return plain
    digest = hashlib.sha256(f"{namespace}\0{name}".encode()).hexdigest()[:8]
    return f"{plain[: LONGEST_NAME - 9]}_{digest}"
