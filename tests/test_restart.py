"""Runs that are killed end, after a restart, as if nothing had happened."""

import pathlib
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import runs

STEPS = 40
EVERY_STEP = ["--checkpoint_every=1", "--evaluate_every=10", f"--classification_steps={STEPS}"]


class Runs:
    """Runs of one set of flags on one store."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.data = runs.make_data(folder / "data")
        self.env = runs.environment(folder / "cache")

    def start(self, workdir: pathlib.Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "deepsc_jax.train", *runs.FLAGS, *EVERY_STEP, "--data=2"]
        command += [f"--data_dir={self.data}", f"--workdir={workdir}"]
        return runs.start(command, self.env, self.output(workdir))

    def output(self, workdir: pathlib.Path) -> pathlib.Path:
        return self.folder / f"{workdir.name}.log"

    def finish(self, workdir: pathlib.Path) -> str:
        """Run to the end; what all runs of the folder have said."""
        code = self.start(workdir).wait()
        text = self.output(workdir).read_text()
        assert code == 0, text
        return text

    def kill_at(self, workdir: pathlib.Path, step: int, *, saving: bool) -> None:
        """Start it, and `kill -9` it at a step: somewhere in it, or while it saves."""
        run = self.start(workdir)
        output = self.output(workdir)
        runs.wait_until(lambda: runs.reached(workdir) >= step, run, output)
        stage = workdir / runs.STAGE
        while saving:
            runs.wait_until(lambda: any(stage.glob("*-tmp*")), run, output)
            run.send_signal(signal.SIGSTOP)
            if any(stage.glob("*-tmp*")):
                break
            run.send_signal(signal.SIGCONT)
        run.kill()
        assert run.wait() == -signal.SIGKILL
        assert not saving or any(stage.glob("*-tmp*"))


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Of which `never-killed` has come to its end."""
    found = Runs(tmp_path_factory.mktemp("restart"))
    found.finish(found.folder / "never-killed")
    return found


def assert_as_never_killed(all_runs: Runs, workdir: pathlib.Path) -> None:
    expected = runs.final_state(all_runs.folder / "never-killed")
    found = runs.final_state(workdir)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    steps = [line["step"] for line in runs.lines(workdir) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    assert runs.losses(workdir) == runs.losses(all_runs.folder / "never-killed")


def test_a_run_killed_while_saving_with_its_newest_checkpoint_damaged_then_killed_again(
    all_runs: Runs,
) -> None:
    workdir = all_runs.folder / "killed"
    all_runs.kill_at(workdir, 5, saving=True)
    stage = workdir / runs.STAGE
    newest = max(
        (path for path in stage.iterdir() if path.name.isdecimal()), key=lambda p: int(p.name)
    )
    data = max((newest / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    all_runs.kill_at(workdir, 20, saving=False)
    text = all_runs.finish(workdir)
    said = [line for line in text.splitlines() if "is not as it was written" in line]
    assert len(said) == 1
    assert str(newest) in said[0]
    assert said[0].endswith(f"set aside as damaged-{newest.name}, the one before it is used")
    assert f"resumed at step {int(newest.name) - 1}" in text
    assert_as_never_killed(all_runs, workdir)


@pytest.mark.slow
@pytest.mark.scale
def test_ten_kills_at_random_moments_change_nothing(all_runs: Runs) -> None:
    draw = random.Random(0)
    workdir = all_runs.folder / "killed-ten-times"
    moments = sorted(draw.sample(range(STEPS - 1), 9))
    # The first before there is anything, and every second one while a checkpoint is written.
    run = all_runs.start(workdir)
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(timeout=draw.uniform(0.5, 3))
    run.kill()
    run.wait()
    for i, step in enumerate(moments):
        all_runs.kill_at(workdir, step, saving=i % 2 == 0)
    all_runs.finish(workdir)
    assert_as_never_killed(all_runs, workdir)
