"""Training as users start it: killed, stopped, on damaged checkpoints, and in two processes."""

import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from deepsc_jax.inference import predictor as inference
from deepsc_jax.systems.building import build
from deepsc_jax.training import checkpoint
from deepsc_jax.training import workdir as workdirs

ROOT = pathlib.Path(__file__).parents[2]
STAGE = "classification"  # the one that compiles fastest
STEPS = 40
FLAGS = [
    f"--flagfile={ROOT / 'configs/tiny.flags'}",
    f"--stage={STAGE}",
    "--deepsc.inception_channels=4",
    "--deepsc.inception_branches=1/1,3",
    "--deepsc.lesion_channels=4,4,4",
    "--deepsc.classifier_stem_channels=4",
    "--deepsc.encoder_channels=4,4,4",
    "--deepsc.norm_groups=2",
    "--deepsc.classification.batch=4",
    f"--deepsc.classification.steps={STEPS}",
    "--evaluate_every=10",
    "--checkpoint_every=1",
    "--adam_eps=1e-2",  # Adam then divides no rounding error by its own size
]


class Runs:
    """Runs of `FLAGS` on one store: their folders are `folder / name`."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        command = [sys.executable, "-m", "deepsc_jax.prepare", FLAGS[0], f"--out={folder / 'data'}"]
        command += ["--phantoms=8,3,0", "--phantom_size=48", "--workers=1"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)

    def start(self, name: str) -> subprocess.Popen:
        """One process with four devices."""
        return self._start(name, [sys.executable, "-m", "deepsc_jax.train", "--data_devices=4"])

    def start_two(self, name: str) -> subprocess.Popen:
        """Two processes of two devices each, by the launcher."""
        return self._start(name, [str(ROOT / "launch/local.sh"), "2"], JAX_NUM_CPU_DEVICES="2")

    def _start(self, name: str, command: list[str], **more: str) -> subprocess.Popen:
        folders = [f"--data_dir={self.folder / 'data'}", f"--workdir={self.folder / name}"]
        compiled = {  # spares restarts the compilation
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        env = os.environ | compiled | {"JAX_PLATFORMS": "cpu", "PYTHON": sys.executable} | more
        with self._log(name).open("ab") as log:
            return subprocess.Popen(
                [*command, *FLAGS, *folders],
                cwd=ROOT,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _log(self, name: str) -> pathlib.Path:
        return self.folder / f"{name}.log"

    def said(self, name: str) -> str:
        """What all runs of a folder have printed, errors included."""
        return self._log(name).read_text()

    def wait_until(self, condition: Callable[[], bool], run: subprocess.Popen, name: str) -> None:
        """Wait for something to be true of a run that goes on."""
        while not condition():
            assert run.poll() is None, f"ended with {run.returncode}:\n{self.said(name)}"
            time.sleep(0.002)

    def finish(self, name: str) -> pathlib.Path:
        """Run to the end, and return the run's folder."""
        code = self.start(name).wait()
        assert code == 0, self.said(name)
        return self.folder / name


def lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def reached(workdir: pathlib.Path) -> int:
    """The last step in metrics.jsonl."""
    return max((line["step"] for line in lines(workdir)), default=0)


def losses(workdir: pathlib.Path) -> list[float]:
    """The training loss of every step."""
    return [line["loss"] for line in lines(workdir) if "loss" in line]


def final_state(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Parameters, optimizer state and step of the newest checkpoint, by name."""
    system = build(workdirs.read(workdir).config, "cpu")
    like = inference.abstract_state(system, system.stage(STAGE))
    checkpoints = checkpoint.Checkpoints(workdir / STAGE)
    step = checkpoints.latest_step()
    assert step is not None
    contents = checkpoints.load(like, step)
    checkpoints.close()
    leaves = jax.tree_util.tree_leaves_with_path((contents["state"], contents["data"]))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of which `reference` has come to its end undisturbed."""
    found = Runs(tmp_path_factory.mktemp("runs"))
    found.finish("reference")
    return found


def kill_at(run_of: Runs, name: str, step: int, *, saving: bool) -> None:
    """Start a run, and `kill -9` it at a step: somewhere in it, or while it saves."""
    run, workdir = run_of.start(name), run_of.folder / name
    stage = workdir / STAGE
    run_of.wait_until(lambda: reached(workdir) >= step, run, name)
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
    expected, found = final_state(reference), final_state(workdir)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    steps = [line["step"] for line in lines(workdir) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    assert losses(workdir) == losses(reference)


@pytest.mark.slow
@pytest.mark.scale
def test_a_run_killed_while_saving_and_its_newest_checkpoint_damaged_ends_the_same(
    never_stopped: Runs,
) -> None:
    kill_at(never_stopped, "killed", 5, saving=True)
    stage = never_stopped.folder / "killed" / STAGE
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


def signal_at(
    run_of: Runs, run: subprocess.Popen, name: str, pid: int, number: signal.Signals, after: float
) -> int:
    """Send `number` to a process of a run so many seconds after its next step; the run's code."""
    before = len(run_of.said(name))
    begun = f"{STAGE} "  # of its first line of progress or validation, or that it was resumed
    run_of.wait_until(lambda: begun in run_of.said(name)[before:], run, name)
    time.sleep(after)
    if run.poll() is None:
        os.kill(pid, number)
    return run.wait(timeout=120)


@pytest.mark.slow
@pytest.mark.scale
def test_kills_and_signals_at_random_moments_of_a_network_change_nothing(
    never_stopped: Runs,
) -> None:
    draw = random.Random(7)
    numbers = [signal.SIGKILL] * 6 + [signal.SIGTERM] * 4 + [signal.SIGINT] * 4
    draw.shuffle(numbers)
    codes = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 75, signal.SIGINT: 130}
    ended = []
    for i, number in enumerate(numbers):
        name = "random"
        run = never_stopped.start(name)
        if i % 4 == 0:  # before there is a step
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(timeout=draw.uniform(1, 12))
            run.send_signal(number)
            code = run.wait(timeout=120)
            code = codes[number] if code == -number else code  # before its first line was run
        else:
            after = draw.uniform(0, 1.5)
            code = signal_at(never_stopped, run, name, run.pid, number, after)
        assert code in (codes[number], 0), f"{number.name}:\n{never_stopped.said(name)}"
        ended.append((number.name, code, reached(never_stopped.folder / name)))
    print(*ended, sep="\n")
    assert_as_never_stopped(never_stopped, never_stopped.finish("random"))
    assert "Traceback" not in never_stopped.said("random")
    assert sum(code != 0 for _, code, _ in ended) >= 8


@pytest.mark.slow
@pytest.mark.scale
def test_two_processes_of_which_one_is_killed_at_random_end_as_two_never_killed(
    never_stopped: Runs,
) -> None:
    assert never_stopped.start_two("two-reference").wait() == 0, never_stopped.said("two-reference")
    draw = random.Random(8)
    for which in (0, 1):
        run = never_stopped.start_two("two-killed")
        never_stopped.wait_until(lambda run=run: len(children(run)) == 2, run, "two-killed")
        pid, after = children(run)[which], draw.uniform(0, 0.5)
        code = signal_at(never_stopped, run, "two-killed", pid, signal.SIGKILL, after)
        assert code == 137, never_stopped.said("two-killed")
    assert never_stopped.start_two("two-killed").wait() == 0, never_stopped.said("two-killed")
    one, two = (never_stopped.folder / name for name in ("two-reference", "two-killed"))
    expected, found = final_state(one), final_state(two)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert losses(two) == losses(one)
    assert "Traceback" not in never_stopped.said("two-killed")


@pytest.mark.slow
@pytest.mark.scale
def test_two_processes_that_write_to_two_folders_are_refused(never_stopped: Runs) -> None:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    runs = []
    for i in range(2):
        command = [sys.executable, "-m", "deepsc_jax.train", *FLAGS]
        command += [f"--data_dir={never_stopped.folder / 'data'}"]
        command += [f"--workdir={never_stopped.folder / f'apart-{i}'}"]
        command += [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={i}"]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
        runs.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
    said = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [1, 1], said
    assert "process 1 cannot go on: its own line says why" in said[0]
    assert "apart-1 is not the folder that process 0 writes to" in said[1]


def processes(launcher: subprocess.Popen) -> list[int]:
    """The launcher's two processes, in order."""
    first, second = children(launcher)
    return [first, second]


def children(launcher: subprocess.Popen) -> list[int]:
    """The processes that the launcher has started so far."""
    path = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


@pytest.mark.slow
@pytest.mark.scale
def test_two_processes_by_two_devices_equal_four_devices_and_stop_and_go_on_as_one(
    never_stopped: Runs,
) -> None:
    one, two = (never_stopped.folder / name for name in ("reference", "two"))
    run = never_stopped.start_two("two")
    never_stopped.wait_until(lambda: reached(two) >= 10, run, "two")
    os.kill(processes(run)[1], signal.SIGTERM)  # of which the first has not heard
    assert run.wait() == 75, never_stopped.said("two")
    text, stopped = never_stopped.said("two"), reached(two)
    assert 10 < stopped < STEPS
    told = f"{STAGE}: another process of the job was told to stop: saved at step {stopped}; start"
    assert text.count(told) == 1
    assert text.count(f"{STAGE} 1/{STEPS}  loss") == 1  # the first process only
    assert "error" not in text

    never_stopped.finish("two")
    assert f"{STAGE}: resumed at step {stopped}" in never_stopped.said("two")
    # Sums over scans in another order, in float32, over 40 steps.
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-4)
    expected, found = final_state(one), final_state(two)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-4, err_msg=name)
    scores = [[line for line in lines(w) if "validation_score" in line] for w in (one, two)]
    assert [line["step"] for line in scores[0]] == [10, 20, 30, 40]
    assert scores[0] == scores[1]


@pytest.mark.slow
@pytest.mark.scale
def test_a_lost_process_ends_the_job_with_one_line_and_the_job_goes_on_after_it(
    never_stopped: Runs,
) -> None:
    workdir = never_stopped.folder / "lost"
    run = never_stopped.start_two("lost")
    never_stopped.wait_until(lambda: reached(workdir) >= 5, run, "lost")
    os.kill(processes(run)[1], signal.SIGKILL)
    assert run.wait(timeout=60) == 137
    errors = [line for line in never_stopped.said("lost").splitlines() if "error" in line]
    assert errors == [
        "error: process 1 of 2 ended with code 137: ending the others; the same command goes on "
        "from the last checkpoint, or from the beginning where there is none"
    ]
    assert never_stopped.start_two("lost").wait() == 0
    assert f"{STAGE}: resumed at step" in never_stopped.said("lost")
    steps = [line["step"] for line in lines(workdir) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
