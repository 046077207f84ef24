"""Runs that are killed end, after a restart, as if nothing had happened."""

import pathlib
import random
import signal
import subprocess

import numpy as np
import pytest
import runs
from runs import STEPS, Runs


def kill_at(run_of: Runs, name: str, step: int, *, saving: bool) -> None:
    """Start a run, and `kill -9` it at a step: somewhere in it, or while it saves."""
    run, workdir = run_of.start(name), run_of.folder / name
    stage = workdir / runs.STAGE
    run_of.wait_until(lambda: runs.reached(workdir) >= step, run, name)
    while saving:
        run_of.wait_until(lambda: any(stage.glob("*-tmp*")), run, name)
        run.send_signal(signal.SIGSTOP)
        if any(stage.glob("*-tmp*")):
            break
        run.send_signal(signal.SIGCONT)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    assert not saving or any(stage.glob("*-tmp*"))


def assert_as_never_stopped(never_stopped: Runs, workdir: pathlib.Path) -> None:
    reference = never_stopped.folder / "reference"
    expected, found = runs.final_state(reference), runs.final_state(workdir)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    steps = [line["step"] for line in runs.lines(workdir) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    assert runs.losses(workdir) == runs.losses(reference)


def test_a_run_killed_while_saving_and_its_newest_checkpoint_damaged_ends_the_same(
    never_stopped: Runs,
) -> None:
    kill_at(never_stopped, "killed", 5, saving=True)
    stage = never_stopped.folder / "killed" / runs.STAGE
    newest = max(int(path.name) for path in stage.iterdir() if path.name.isdecimal())
    state = stage / str(newest) / "state" / "d"
    data = max(state.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    workdir = never_stopped.finish("killed")
    text = never_stopped.said("killed")
    (said,) = (line for line in text.splitlines() if "is not as it was written" in line)
    assert str(stage / str(newest)) in said
    assert said.endswith(f"set aside as damaged-{newest}, the one before it is used")
    assert f"resumed at step {newest - 1}" in text
    assert_as_never_stopped(never_stopped, workdir)


@pytest.mark.slow
@pytest.mark.scale
def test_ten_kills_at_random_moments_change_nothing(never_stopped: Runs) -> None:
    draw = random.Random(0)
    # The first before there is anything, and of the others every second one while it saves.
    run = never_stopped.start("killed-ten-times")
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(timeout=draw.uniform(0.5, 3))
    run.kill()
    run.wait()
    for i, step in enumerate(sorted(draw.sample(range(STEPS - 2), 9))):
        kill_at(never_stopped, "killed-ten-times", step, saving=i % 2 == 0)
    assert_as_never_stopped(never_stopped, never_stopped.finish("killed-ten-times"))
