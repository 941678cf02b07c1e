"""The tests of the core can fail: each deliberate fault is caught by them."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.faults_of_the_core import FAULTS, Fault
from tests.unit import test_plan, test_policy
from tests.unit.test_plan_machine import Histories

FEW = settings(
    max_examples=100,
    stateful_step_count=30,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)


def stories() -> list[object]:
    """Return the tests of the core that need no argument."""
    found = {**vars(test_plan), **vars(test_policy)}
    return [
        test
        for name, test in found.items()
        if name.startswith("test_") and callable(test) and not inspect.signature(test).parameters
    ]


def is_caught() -> bool:
    """Return whether a test of the core fails: a story, else a history of the machine."""
    try:
        for story in stories():
            story()  # type: ignore[operator]
        run_state_machine_as_test(Histories, settings=FEW)
    except BaseException as error:  # whatever fails, and pytest's own failures
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return True
    return False


def test_there_are_enough_deliberate_faults_in_the_core() -> None:
    assert len(FAULTS) >= 15


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_the_tests_of_the_core_catch_each_deliberate_fault(fault: Fault) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        assert is_caught(), fault.__doc__


def test_the_tests_of_the_core_pass_without_a_fault() -> None:
    for story in stories():
        story()  # type: ignore[operator]
