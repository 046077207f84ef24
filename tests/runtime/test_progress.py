"""Progress: a bar on a terminal; lines elsewhere, if they are asked for, and not too many."""

import os
import re
import subprocess
import sys
import time

import pytest

from deepsc_jax.runtime.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, as a list of one number to be changed."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_lines_come_every_ten_seconds_and_at_the_end(clock, capsys):
    with Progress("train", 8, 2, lines=True) as progress:
        for step in range(3, 9):
            clock[0] += 4
            progress.show(step, loss=0.12345)
    assert capsys.readouterr().out.splitlines() == [
        "train 3/8  loss 0.1235",
        "train 6/8  loss 0.1235  0:08 left",
        "train 8/8  loss 0.1235  0:00 left",
    ]


def test_what_comes_before_the_first_report_is_no_measure_of_the_time_left(clock, capsys):
    with Progress("train", 100, lines=True) as progress:
        clock[0] += 300  # compiling
        progress.show(10)
        clock[0] += 20
        progress.show(20)
    assert capsys.readouterr().out.splitlines() == ["train 10/100  ", "train 20/100    2:40 left"]


def test_steps_may_be_counted_here(clock, capsys):
    with Progress("train", 2, lines=True) as progress:
        progress.advance(loss=1, dsc=0.5)
        clock[0] += 60
        progress.advance()
    assert capsys.readouterr().out.splitlines() == [
        "train 1/2  loss 1  dsc 0.5",
        "train 2/2    0:00 left",
    ]


@pytest.mark.parametrize("options", [{}, {"lines": True, "quiet": True}])
def test_nothing_is_shown_where_nothing_is_asked_for(capsys, options):
    with Progress("train", 2, **options) as progress:
        progress.advance(loss=1)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


SCRIPT = """
import sys
from deepsc_jax.runtime.progress import Progress
with Progress("train [bold]", 3, 1, lines=True, quiet=len(sys.argv) > 1) as progress:
    progress.advance(loss=0.25)
    print("note: between", file=sys.stderr)
    progress.advance(loss=0.125)
"""


def on_a_terminal(tmp_path, *arguments: str) -> tuple[str, str]:
    """What the script shows on a terminal, and its stderr, which is a file."""
    ours, theirs = os.openpty()
    errors = tmp_path / "stderr"
    with errors.open("w") as stderr:
        subprocess.run(
            [sys.executable, "-c", SCRIPT, *arguments],
            stdout=theirs,
            stderr=stderr,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
            check=True,
        )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the terminal's other side is closed, and all is read
            break
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()), errors.read_text()


def test_a_terminal_gets_a_bar_and_a_file_what_was_meant_for_it(tmp_path):
    shown, errors = on_a_terminal(tmp_path)
    assert errors == "note: between\n"
    last = [line for line in re.split(r"[\r\n]+", shown) if line.strip()][-1]
    assert last.startswith("train [bold] ")
    assert "3/3 loss 0.125 0:00:00" in last
    assert "left" not in shown


def test_a_quiet_one_leaves_the_terminal_alone(tmp_path):
    shown, _ = on_a_terminal(tmp_path, "quiet")
    assert shown == ""
