"""Checks that this mlx-lm is as a feature expects, made before the feature touches it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

Names = Mapping[str, tuple[str, ...]]
"""Dotted names in a module, each with the parameters that a call relies on (none: it exists)."""


class Unexpected(Exception):
    """This mlx-lm is not as a feature expects; the message names the difference."""


def require_attributes(module: Any, name: str, attributes: tuple[str, ...]) -> None:
    """Check that the constructor of a class sets these attributes, or at least uses their names.

    Raises:
        Unexpected: it does not use one of them.
    """
    known = getattr(module, name).__init__.__code__.co_names
    for attribute in attributes:
        if attribute not in known:
            raise Unexpected(f"{module.__name__}.{name} has no {attribute}")


def require_uses(module: Any, dotted: str, names: tuple[str, ...]) -> None:
    """Check that a function uses these globals, attributes and methods by name.

    Raises:
        Unexpected: it does not use one of them.
    """
    require(module, {dotted: ()})
    function = module
    for name in dotted.split("."):
        function = getattr(function, name)
    known = inspect.unwrap(function).__code__.co_names
    for name in names:
        if name not in known:
            raise Unexpected(f"{module.__name__}.{dotted} does not use {name}")


def require(module: Any, names: Names) -> None:
    """Check that each name exists in `module` and takes these parameters, in this order.

    Raises:
        Unexpected: a name is missing, or takes other parameters.
    """
    for dotted, parameters in names.items():
        place = module
        for name in dotted.split("."):
            try:
                place = inspect.getattr_static(place, name)
            except AttributeError:
                raise Unexpected(f"{module.__name__} has no {dotted}") from None
        if not parameters:
            continue
        if not callable(place):
            raise Unexpected(f"{module.__name__}.{dotted} is not a function")
        taken = tuple(inspect.signature(place).parameters)
        if taken[: len(parameters)] != parameters:
            raise Unexpected(f"{module.__name__}.{dotted} takes ({', '.join(taken)})")
