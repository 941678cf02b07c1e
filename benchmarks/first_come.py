"""The proxy without its turn rule, to compare with it.

``python -m benchmarks.first_come serve`` is ``python -m mlxproxy serve``, but a turn is over when
it begins: a model is swapped out for each request that names another one, in order of arrival.
"""

from __future__ import annotations

from mlxproxy.cli import main
from mlxproxy.controller import policy


def take_the_rule_out() -> None:
    """Let every turn end when it begins."""
    policy.turn_ends = lambda slot: slot.ready_at


if __name__ == "__main__":
    take_the_rule_out()
    main()
