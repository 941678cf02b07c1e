"""Generated JSON schemas, of all that llguidance claims to enforce, and a judge of the answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema

Schema = dict[str, Any]

KEYS = ("name", "größe", 'a "quoted" key', "日本", "x y", "back\\slash", "n", "tags", "</think>")
WORDS = ("red", "green", "weiß", "日本", 'say "no"', "", "</tool_call>")
PATTERNS = ("^[a-z]{2,5}$", "^(ab|cd)+$", "^[A-Z][0-9]{3}$", r"^\d{4}-\d{2}$")
FORMATS = ("date", "date-time", "email", "ipv4", "uuid", "uri")


def generate(seed: int, depth: int = 3) -> Schema:
    """Return a schema of an object; the same for the same seed."""
    make = _Maker(random.Random(seed))
    schema = make.object(depth)
    if seed % 5 == 0:  # one that refers to itself
        schema["$defs"] = {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        }
        schema["properties"]["list"] = {"$ref": "#/$defs/node"}
        schema["required"] = [*schema["required"], "list"]
    return schema


def is_valid(text: str, schema: Schema) -> bool:
    """Return whether a text is JSON that a schema allows, according to another library."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    return bool(jsonschema.Draft202012Validator(schema, format_checker=checker).is_valid(value))


class _Maker:
    def __init__(self, random_: random.Random) -> None:
        self._random = random_

    def any(self, depth: int) -> Schema:
        leaves: list[Callable[[int], Schema]] = [
            self.integer,
            self.number,
            self.string,
            self.choice,
            lambda _: {"type": "boolean"},
            lambda _: {"type": "null"},
            lambda _: {"const": self._random.choice(WORDS)},
        ]
        if depth > 0:
            leaves += [self.object, self.array, self.tuple, self.union]
        return self._random.choice(leaves)(depth - 1)

    def object(self, depth: int) -> Schema:
        keys = self._random.sample(KEYS, self._random.randint(1, 4))
        return {
            "type": "object",
            "properties": {key: self.any(depth) for key in keys},
            "required": [key for key in keys if self._random.random() < 0.7],
            "additionalProperties": False,
        }

    def array(self, depth: int) -> Schema:
        least = self._random.randint(0, 2)
        most = least + self._random.randint(0, 2)
        return {"type": "array", "items": self.any(depth), "minItems": least, "maxItems": most}

    def tuple(self, depth: int) -> Schema:
        items = [self.any(depth) for _ in range(self._random.randint(1, 3))]
        size = len(items)
        return {"type": "array", "prefixItems": items, "minItems": size, "maxItems": size}

    def union(self, depth: int) -> Schema:
        return {"anyOf": [self.any(depth) for _ in range(self._random.randint(2, 3))]}

    def integer(self, _: int) -> Schema:
        low = self._random.randint(-100, 100)
        return {"type": "integer", "minimum": low, "maximum": low + self._random.randint(0, 1000)}

    def number(self, _: int) -> Schema:
        return {"type": "number", "minimum": -5, "exclusiveMaximum": self._random.randint(1, 50)}

    def string(self, _: int) -> Schema:
        kind = self._random.randrange(4)
        if kind == 0:
            return {"type": "string", "pattern": self._random.choice(PATTERNS)}
        if kind == 1:
            return {"type": "string", "format": self._random.choice(FORMATS)}
        if kind == 2:
            least = self._random.randint(0, 4)
            return {"type": "string", "minLength": least, "maxLength": least + 6}
        return {"type": "string"}

    def choice(self, _: int) -> Schema:
        values = [*self._random.sample(WORDS, 3), self._random.randint(0, 9), None, True]
        return {"enum": self._random.sample(values, 3)}
