"""A waitress that lacks what the proxy builds on is refused at the start, in a sentence."""

from __future__ import annotations

import configparser
import os
from pathlib import Path

import pytest
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.server import BaseWSGIServer
from waitress.task import Task, WSGITask

from mlxproxy import main
from mlxproxy.server import waitress_check
from mlxproxy.settings import Settings


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def test_the_installed_waitress_suits_and_the_check_leaves_nothing_open() -> None:
    before = descriptors()
    waitress_check.require_suitable()
    assert descriptors() == before


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (HTTPChannel, "_flush_some_if_lockable"),
        (HTTPChannel, "total_outbufs_len"),
        (Task, "build_response_header"),
        (WSGITask, "get_environment"),
        (HTTPRequestParser, "body_bytes_received"),
        (BaseWSGIServer, "pull_trigger"),
    ],
)
def test_a_waitress_that_lacks_a_name_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owner: type, name: str
) -> None:
    monkeypatch.setattr(main, "build", lambda _: pytest.fail("it started"))
    monkeypatch.delattr(owner, name)
    with pytest.raises(main.CannotServe, match=rf"has no {name}\. .*'waitress >= 3\.0\.1, < 4'"):
        main.serve(Settings(instance_path=tmp_path, models_root=(tmp_path,)))


def test_attributes_that_waitress_sets_per_connection_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin = HTTPChannel.__init__

    def without_lock(self: HTTPChannel, *given: object, **named: object) -> None:
        begin(self, *given, **named)
        del self.outbuf_lock

    monkeypatch.setattr(HTTPChannel, "__init__", without_lock)
    with pytest.raises(waitress_check.UnsuitableWaitress, match="HTTPChannel has no outbuf_lock"):
        waitress_check.require_suitable()


def test_the_error_names_the_waitress_versions_of_setup_cfg() -> None:
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    required = config["options"]["install_requires"].splitlines()
    assert f"waitress {waitress_check.SUITABLE}" in required
