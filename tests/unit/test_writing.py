"""Log lines are handed over, never waited for: not by a slow disk, a full one, or a pipe."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from pathlib import Path

import pytest

from mlxproxy.logfile import LogFile
from mlxproxy.writing import QUEUED_CHUNKS, Writer
from tests.support.waiting import until


def test_a_blocked_log_loses_lines_which_are_counted() -> None:
    stands, may_go_on = threading.Event(), threading.Event()
    written: list[str] = []

    def stuck(text: str) -> None:
        stands.set()
        may_go_on.wait(30)
        written.append(text)

    writer = Writer("a place", stuck)
    writer.put("first\n")
    assert stands.wait(10)
    begun = time.monotonic()
    for number in range(QUEUED_CHUNKS + 10):
        writer.put(f"{number}\n")
    writer.close()
    assert time.monotonic() - begun < 5
    assert not written
    may_go_on.set()
    until(lambda: len(written) == 2, what="the rest")
    text = "".join(written)
    assert text.startswith("first\n[mlxproxy: 10 blocks of log lines lost]\n0\n1\n")
    assert text.endswith(f"{QUEUED_CHUNKS - 1}\n")


def test_the_last_log_lines_are_written_at_the_end() -> None:
    written: list[str] = []
    writer = Writer("a place", written.append)
    for number in range(100):
        writer.put(f"{number}\n")
    writer.close()
    assert "".join(written) == "".join(f"{number}\n" for number in range(100))


def test_a_full_disk_is_reported_once_and_its_lost_lines_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    full = True
    tries: list[str] = []
    written: list[str] = []

    def write(text: str) -> None:
        tries.append(text)
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(text)

    writer = Writer("the log", write)
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            writer.put(f"{number}\n")
            until(lambda number=number: len(tries) > number, what="the try")
    full = False
    writer.put("at last\n")
    writer.close()
    assert written == ["[mlxproxy: 3 blocks of log lines lost]\nat last\n"]
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_log_blocks_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "backend.log"
    os.mkfifo(path)
    log = LogFile(path)
    log.put("lost\n")
    until(lambda: "cannot be written" in caplog.text, what="the warning")
    path.unlink()
    log.put("kept\n")
    log.close()
    assert path.read_text().endswith("kept\n")
