"""A log file is followed through its rotations."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mlxproxy.logfile import LogFile
from mlxproxy.observability.logtail import LogTail


def test_no_log_line_is_lost_or_doubled_by_a_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxproxy.logfile.FILE_BYTES", 2000)
    path = tmp_path / "logs" / "backend.log"
    file = LogFile(path)
    with LogTail(path, 10) as tail:
        seen = tail.read()
        for number in range(300):
            file.put(f"line {number}\n")
            wanted = f"line {number}\n"
            deadline = time.monotonic() + 5
            while wanted not in seen and time.monotonic() < deadline:
                seen += tail.read()
    file.close()
    assert path.with_name("backend.log.1").exists()
    assert seen.splitlines() == [f"line {number}" for number in range(300)]


def test_a_logs_history_reaches_back_beyond_its_last_rotation(tmp_path: Path) -> None:
    path = tmp_path / "proxy.log"
    path.with_name("proxy.log.1").write_text("one\ntwo\n")
    path.write_text("three\nbegun")
    with LogTail(path, 2) as tail:
        assert tail.read() == "three\n"
        with path.open("a") as file:
            file.write(" and ended\n")
        assert tail.read() == "begun and ended\n"
    with LogTail(path, 3) as tail:
        assert tail.read() == "two\nthree\nbegun and ended\n"
