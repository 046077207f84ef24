"""Standard output that goes away: the program goes on, and says so once."""

import subprocess
import sys

PROGRAM = """
import sys
from deepsc_jax.runtime.output import tell
from deepsc_jax.runtime.progress import Progress

tell("first")
sys.stdin.readline()
with Progress("train", 3, lines=True) as progress:
    for step in range(3):
        tell(f"step {step}")
        progress.advance(loss=1.0)
print("at its end", file=sys.stderr)
"""


def test_a_pipe_that_is_closed_ends_nothing() -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdin is not None
    assert run.stdout is not None
    assert run.stderr is not None
    assert run.stdout.readline() == "first\n"
    run.stdout.close()
    run.stdin.close()
    said = run.stderr.read().splitlines()
    run.stderr.close()
    assert run.wait(timeout=30) == 0
    assert said[0].startswith("standard output is gone (Broken pipe): going on without it")
    assert said[1:] == ["at its end"]


def test_a_full_disk_below_the_output_ends_nothing() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input="\n",
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            check=False,
        )
    assert done.returncode == 0
    said = done.stderr.splitlines()
    assert said[0].startswith("standard output is gone (No space left on device)")
    assert said[1:] == ["at its end"]
