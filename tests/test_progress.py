"""What is seen of long work: a bar on a terminal, lines in a log file."""

import fcntl
import io
import logging
import os
import select
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator

import pytest

from pipelines import progress
from pipelines.progress import Console, progress_bar

Open = Callable[[int], int]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Make stderr a terminal of 80 columns and so many rows; return the end that a person looks at."""
    shown, written = os.openpty()
    file = os.fdopen(written, "w")

    def make(rows: int) -> int:
        fcntl.ioctl(written, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 80, 0, 0))
        patch.setattr(sys, "stderr", file)
        return shown

    with monkeypatch.context() as patch:
        patch.setattr(progress, "DELAY_S", 0.0)
        yield make
    file.close()
    os.close(shown)


def work() -> None:
    with progress_bar(400, "train-prior level 1", "steps") as bar:
        for _ in range(40):
            time.sleep(0.02)
            bar.update(10)
            bar.set_postfix_str("val nats/code 3.142", refresh=False)


def test_a_bar_fits_80_columns_and_leaves_nothing_behind(terminal: Open) -> None:
    shown = terminal(24)
    work()
    told = b""
    while select.select([shown], [], [], 0.5)[0]:  # a terminal hands on what it is given a little later
        told += os.read(shown, 4096)
    seen = told.decode()
    drawn = seen.split("\r")
    assert all(len(line) <= 80 for line in drawn) and "\n" not in seen and "\x1b" not in seen
    bar = next(line for line in reversed(drawn) if line.strip())
    assert "steps/s" in bar and "left" in bar and "val nats/code 3.142" in bar
    assert not drawn[-1] and not drawn[-2].strip()


@pytest.mark.parametrize("place", ["a terminal without rows", "a file"])
def test_where_no_bar_can_be_drawn_there_are_lines(
    place: str, terminal: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if place == "a file":
        monkeypatch.setattr(sys, "stderr", io.StringIO())
    else:
        terminal(0)
    monkeypatch.setattr(progress, "LOGGED_EVERY_S", 0.0)
    with caplog.at_level("INFO"):
        work()
    assert len(caplog.records) == 39 and "\r" not in caplog.text
    assert "train-prior level 1: 390 of 400 steps, " in caplog.messages[-1]
    assert caplog.messages[-1].endswith("left, val nats/code 3.142")


def test_a_line_says_who_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    Console().handle(logging.makeLogRecord({"name": "pipelines.run", "levelno": logging.INFO, "msg": "pack: done"}))
    Console().handle(logging.makeLogRecord({"name": "lightning", "levelno": logging.INFO, "msg": "Try it!"}))
    assert capsys.readouterr().err == "smalti: pack: done\n"
