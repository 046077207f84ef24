"""A process that hangs ends with a line and a code of its own."""

import pathlib
import subprocess
import sys

import pytest

from deepsc_jax.runtime import exit_codes

PROGRAM = """
import pathlib, sys, time
from deepsc_jax.runtime.watchdog import Watchdog

def hangs_here():
    time.sleep(20)

with Watchdog(float(sys.argv[1]), pathlib.Path(sys.argv[3])) as watchdog:
    if sys.argv[2] == "compiles":
        time.sleep(1)
    watchdog.beat(1)
    with watchdog.paused():
        time.sleep(1)
    for step in range(2, 8):
        time.sleep(0.1)
        watchdog.beat(step)
    if sys.argv[2] == "hangs":
        hangs_here()
print("done")
"""


def run(seconds: float, what: str, folder: pathlib.Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM, str(seconds), what, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)


def test_what_hangs_ends_with_a_line_and_its_stack_in_the_folder(tmp_path: pathlib.Path) -> None:
    done = run(0.6, "hangs", tmp_path)
    assert done.returncode == exit_codes.WATCHDOG
    assert done.stderr.startswith("error: no step ended in 0.6 s after step 7 (--step_timeout)")
    assert len(done.stderr.splitlines()) == 1
    assert "in hangs_here" in (tmp_path / "hung-0.txt").read_text()


def test_a_folder_that_is_gone_hides_nothing(tmp_path: pathlib.Path) -> None:
    done = run(0.6, "hangs", tmp_path / "gone")
    assert done.returncode == exit_codes.WATCHDOG
    assert "stacks could not be written" in done.stderr


@pytest.mark.parametrize(("seconds", "what"), [(0.6, "compiles"), (0, "ends")])
def test_steps_in_time_compiling_and_other_work_are_left_alone(
    tmp_path: pathlib.Path, seconds: float, what: str
) -> None:
    done = run(seconds, what, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert not any(tmp_path.iterdir())
