"""The standby: when there is one, and what becomes of it; its process is a fake one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlxproxy.backend import standby as module
from mlxproxy.backend.launch import Launched
from mlxproxy.backend.orphan import ChildRecord, Record
from mlxproxy.backend.processes import MARK, Mark
from mlxproxy.backend.protocol import Command, StandbyCommand
from mlxproxy.backend.standby import NEEDED_BYTES, Standby
from mlxproxy.errors import LoadFailed
from tests.support.waiting import until

LOAD = Command(("program", "--model", "a"), remedy="")
LOOKS = 5  # more than it takes to act


class FakeLink:
    """The channel to a process that takes its command line, or does not."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.prepared: list[str] = []
        self.taken: list[Command] = []

    def is_waiting(self) -> bool:
        return self.world.imports

    def prepare(self, path: str) -> None:
        self.prepared.append(path)

    def hand_over(self, command: Command, seconds: float) -> bool:
        self.taken.append(command)
        return self.world.answers


@dataclass
class FakeProcess:
    """A process that lives until it is killed."""

    pid: int
    status: int | None = None

    def poll(self) -> int | None:
        return self.status

    def kill(self) -> None:
        if self.status is None:
            self.status = -9

    def wait(self, seconds: float) -> int | None:
        return self.status


@dataclass(eq=False)
class World:
    """An engine that has standbys, and the processes that were started for it."""

    folder: Path
    name = "fake"
    version = "1"
    can_wait = True
    idle = True
    imports = True
    answers = True
    room = 10 * NEEDED_BYTES
    looks = 0
    may_start: threading.Event = field(default_factory=threading.Event)
    starting: threading.Event = field(default_factory=threading.Event)
    started: list[Launched] = field(default_factory=list)
    standby_: Standby = field(default_factory=Standby)

    def __post_init__(self) -> None:
        self.may_start.set()
        self.record = ChildRecord(self.folder, 1, slot=None)

    def standby(self) -> StandbyCommand | None:
        if not self.can_wait:
            return None
        return StandbyCommand(("program", "--wait"), {}, self.link, self.version)

    def link(self, on_death: Callable[[str], None]) -> Any:
        return FakeLink(self)

    def launch(
        self, argv: Sequence[str], environment: Mapping[str, str], mark: Mark, link: Any
    ) -> Launched:
        self.recorded = Record.read(self.folder / "standby-1.json")
        self.starting.set()
        self.may_start.wait(10)
        read_end, write_end = os.pipe()
        os.close(write_end)
        process: Any = FakeProcess(100 + len(self.started))
        self.started.append(Launched(tuple(argv), mark, process, read_end, link))
        return self.started[-1]

    # -- what a proxy does

    def watch(self) -> None:
        self.standby_.watch(self.record, self._is_idle, lambda: self.room)

    def _is_idle(self) -> bool:
        self.looks += 1
        return self.idle

    def succeed(self, engine: Any = None) -> None:
        self.standby_.renew(engine or self)

    def take(self, engine: Any = None) -> Launched | None:
        return self.standby_.take(engine or self, LOAD, lambda reason: None)

    def pass_time(self) -> None:
        seen = self.looks
        until(lambda: self.looks > seen + LOOKS, what="some looks")

    def wait_for(self, number: int) -> Launched:
        """Wait until that standby, counted from 1, is there."""
        until(
            lambda: len(self.started) == number and self.standby_.pid is not None,
            what=f"standby {number}",
        )
        return self.started[-1]

    def lives(self, launched: Launched) -> bool:
        return launched.process.poll() is None


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(tmp_path)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.002)
    monkeypatch.setattr(module, "launch", world.launch)
    monkeypatch.setattr(module.memory, "footprint", lambda pid: 75_000_000)
    world.watch()
    yield world
    world.may_start.set()
    world.standby_.close()


# -- when there is one


def test_there_is_none_until_a_load_has_succeeded(world: World) -> None:
    world.pass_time()
    assert not world.started
    world.succeed()
    world.wait_for(1)


def test_a_busy_proxy_starts_none(world: World) -> None:
    world.idle = False
    world.succeed()
    world.pass_time()
    assert not world.started
    world.idle = True
    world.wait_for(1)


def test_one_waits_never_two(world: World) -> None:
    world.succeed()
    world.wait_for(1)
    world.succeed()
    world.pass_time()
    assert len(world.started) == 1


def test_a_load_takes_it_and_its_success_brings_the_next_one(world: World) -> None:
    world.succeed()
    first = world.wait_for(1)
    assert world.take() is first
    assert first.link.taken == [LOAD]
    world.pass_time()
    assert len(world.started) == 1
    world.succeed()
    assert world.wait_for(2) is not first
    assert world.lives(first)


def test_a_failed_load_brings_none(world: World) -> None:
    """The load may have failed because of it, so the next one starts a process of its own."""
    world.succeed()
    world.wait_for(1)
    assert world.take() is not None
    world.pass_time()
    assert world.take() is None
    assert len(world.started) == 1


def test_an_engine_that_knows_no_standby_has_none(world: World) -> None:
    world.succeed(SimpleNamespace(name="other"))
    world.pass_time()
    assert not world.started


def test_a_wrapper_that_cannot_wait_has_none(world: World) -> None:
    world.can_wait = False
    world.succeed()
    world.pass_time()
    assert not world.started


# -- when it is of no use


def without(world: World) -> None:
    assert world.take() is None
    assert not world.lives(world.started[0])


def test_a_load_does_not_wait_for_one_that_is_not_ready(world: World) -> None:
    world.imports = False
    world.succeed()
    world.wait_for(1)
    without(world)


def test_a_load_goes_on_without_one_that_does_not_answer(world: World) -> None:
    world.answers = False
    world.succeed()
    world.wait_for(1)
    without(world)


def test_a_model_of_another_engine_does_not_get_it(world: World) -> None:
    world.succeed()
    first = world.wait_for(1)
    assert world.take(SimpleNamespace(name="other")) is None
    assert not world.lives(first)
    assert first.link.taken == []


def lose(world: World, how: str) -> None:
    if how == "killed":
        world.started[-1].process.kill()
    else:
        world.version = "2"


@pytest.mark.parametrize("imports", [True, False])
@pytest.mark.parametrize("how", ["killed", "program upgraded"])
def test_one_that_is_lost_is_replaced_after_the_next_load(
    world: World, how: str, imports: bool
) -> None:
    """Not earlier: whatever takes it away may do so again and again."""
    world.imports = imports
    world.succeed()
    first = world.wait_for(1)
    lose(world, how)
    until(lambda: world.standby_.pid is None, what="its dismissal")
    assert not world.lives(first)
    world.pass_time()
    assert len(world.started) == 1
    assert world.take() is None
    world.succeed()
    world.wait_for(2)


def test_an_upgrade_just_before_a_load_is_noticed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.succeed()
    world.wait_for(1)
    monkeypatch.setattr(world.standby_, "_look", lambda *_: None)
    world.pass_time()
    world.version = "2"
    without(world)


def test_while_memory_is_short_there_is_none(world: World) -> None:
    world.succeed()
    first = world.wait_for(1)
    world.room = -1
    until(lambda: world.standby_.pid is None, what="its dismissal")
    assert not world.lives(first)
    world.room = NEEDED_BYTES - 1
    world.pass_time()
    assert len(world.started) == 1
    world.room = NEEDED_BYTES
    world.wait_for(2)


def test_its_memory_is_told(world: World) -> None:
    assert world.standby_.memory() == 0
    world.succeed()
    world.wait_for(1)
    assert world.standby_.memory() == 75_000_000


# -- the next model


def test_it_is_told_which_model_comes_next_once_it_can_hear_that(world: World) -> None:
    world.imports = False
    world.standby_.prepare(world, "/models/a")
    world.succeed()
    link: Any = world.wait_for(1).link
    world.standby_.prepare(world, "/models/b")
    world.imports = True
    other: Any = SimpleNamespace(name="other")
    world.standby_.prepare(other, "/models/c")
    world.standby_.prepare(world, "/models/d")
    assert link.prepared == ["/models/d"]


# -- its end, and its record


def begun(world: World) -> None:
    """Let a start of one begin and not end."""
    world.may_start.clear()
    world.succeed()
    assert world.starting.wait(10)


@pytest.mark.parametrize("act", [World.take, lambda world: world.standby_.close()])
def test_neither_a_load_nor_a_stop_waits_for_its_start_and_it_does_not_survive_them(
    world: World, act: Callable[[World], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KILL_SECONDS", 0.01)
    begun(world)
    assert act(world) is None
    world.may_start.set()
    until(lambda: world.started and not world.lives(world.started[0]), what="its end")
    assert world.standby_.pid is None


def test_a_stop_ends_it_for_good(world: World) -> None:
    world.succeed()
    first = world.wait_for(1)
    assert (world.folder / "standby-1.json").exists()
    world.standby_.close()
    assert not world.lives(first)
    world.succeed()
    assert world.take() is None
    assert len(world.started) == 1
    assert not (world.folder / "standby-1.json").exists()


def test_it_is_recorded_before_it_starts_by_a_command_line_that_is_only_its_own(
    world: World,
) -> None:
    world.succeed()
    first = world.wait_for(1)
    until(lambda: Record.read(world.folder / "standby-1.json").pid, what="the pid in the record")
    assert world.recorded.command == first.argv
    assert world.recorded.pid is None
    assert world.take() is first
    world.succeed()
    assert world.wait_for(2).argv != first.argv


def test_one_that_cannot_be_recorded_is_not_started(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(command: Sequence[str]) -> None:
        raise LoadFailed("No backend was started: the disk is full.")

    monkeypatch.setattr(world.record, "starting", full)
    world.succeed()
    world.pass_time()
    assert not world.started


def test_its_mark_tells_it_from_the_backends_and_leads_to_its_proxy() -> None:
    process: Any = SimpleNamespace()
    own = Mark.own(18080, Path("/instance:1"))
    marks = [own, replace(own, slot=2), replace(own, standby=3), replace(own, standby=4)]
    for mark in marks:
        process.environ = mark.environment
        assert Mark.of(process) == mark
    assert len({mark.environment()[MARK] for mark in marks}) == 4
