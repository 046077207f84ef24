"""Training that is killed or told to end at any moment: nothing is lost, nothing hangs."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import interrupted
import jax
import numpy as np
import pytest
from interrupted import MOMENTS, ROOT, STAGE

from deepsc_jax.runtime import exit_codes
from deepsc_jax.systems.system import initial
from deepsc_jax.training import state as states
from deepsc_jax.training import workdir as workdirs
from deepsc_jax.training.checkpoint import Checkpoints
from deepsc_jax.training.meters import TIMED

ENDS = {
    signal.SIGKILL: -signal.SIGKILL,
    signal.SIGTERM: exit_codes.PREEMPTED,
    signal.SIGHUP: exit_codes.PREEMPTED,
    signal.SIGINT: exit_codes.INTERRUPTED,
}
# How many of a moment pass before it is the one, so that a run gets some way.
PASSES = {"step": 2, "validation": 1, "save": 1}


class Trainings:
    """Trainings on one store, by the server of `interrupted`."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.said = folder / "said.txt"
        command = [sys.executable, "-m", "deepsc_jax.prepare", interrupted.FLAGS[0]]
        command += [f"--out={folder / 'data'}", "--phantoms=4,3,0", "--phantom_size=48"]
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        subprocess.run([*command, "--workers=1"], env=env, check=True, capture_output=True)
        self._server = subprocess.Popen(
            [sys.executable, interrupted.__file__, str(folder / "data")],
            env=env | {"JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the server."""
        self._server.communicate()

    def run(
        self,
        name: str,
        number: signal.Signals = signal.SIGTERM,
        moment: str | None = None,
        passes: int = 0,
        after: float | None = None,
        file_bytes: int | None = None,
        done: str | None = None,
        data: str | None = None,
        flags: Sequence[str] = (),
    ) -> tuple[int, float]:
        """The exit code of a run, and the seconds from the signal to its end."""
        request = {"workdir": str(self.folder / name), "log": str(self.said), "signal": number}
        request |= {"moment": moment, "passes": passes, "after": after, "file_bytes": file_bytes}
        request |= {"done": done, "data": data, "flags": flags}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return answer["code"], answer["seconds"]

    def lines(self, name: str) -> list[dict[str, Any]]:
        """What the run logged, but for how long it took."""
        text = (self.folder / name / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]

    def arrays(self, name: str) -> list[np.ndarray]:
        """The state and the data's place in the newest checkpoint."""
        workdir = self.folder / name
        system = interrupted.Means(workdirs.read(workdir).config)
        stage, device = system.stages[0], jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.eval_shape(lambda: states.create(system, stage, initial(system)))
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes
        )
        with contextlib.closing(Checkpoints(workdir / STAGE)) as checkpoints:
            assert checkpoints.latest_step() == stage.steps
            assert checkpoints.record(stage.steps) is not None
            contents = checkpoints.load(like, stage.steps)
        return [np.asarray(leaf) for leaf in jax.tree.leaves((contents["state"], contents["data"]))]

    def assert_as_never_stopped(self, name: str) -> None:
        """Nothing is lost, nothing is double."""
        assert self.lines(name) == self.lines("reference")
        for found, expected in zip(self.arrays(name), self.arrays("reference"), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert workdirs.read(self.folder / name).thresholds == {STAGE: 0.5}
        assert "Traceback" not in self.said.read_text()


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    """Trainings of which `reference` has come to its end undisturbed."""
    found = Trainings(tmp_path_factory.mktemp("trainings"))
    assert found.run("reference")[0] == 0, found.said.read_text()
    yield found
    found.close()


def test_a_signal_at_any_moment_ends_training_as_documented_and_loses_nothing(
    trainings: Trainings,
) -> None:
    moments = [(number, moment) for number in ENDS for moment in MOMENTS[:-1]]
    for number, moment in [*moments, *((number, "threshold") for number in ENDS)]:
        code, seconds = trainings.run("stopped", number, moment, PASSES.get(moment, 0))
        said = trainings.said.read_text()
        assert code == ENDS[number], f"{number.name} at {moment}:\n{said}"
        assert seconds < 30, f"{number.name} at {moment}"
        if number != signal.SIGKILL:
            last = said.splitlines()[-1]
            assert last.startswith(f"{number.name} during ") or (
                f"{STAGE}: {number.name}: saved at step " in last
            )
    assert trainings.run("stopped")[0] == 0
    trainings.assert_as_never_stopped("stopped")


@pytest.mark.slow
def test_what_was_saved_before_a_validation_outlasts_a_kill_after_it(trainings: Trainings) -> None:
    """Steps 2, 4 and 5 are saved, 5 is validated: a kill from then on leaves 5."""
    for name, moment, passes in (("record", "record", 0), ("next-save", "save", 3)):
        code, _ = trainings.run(name, signal.SIGKILL, moment, passes)
        assert code == -signal.SIGKILL, trainings.said.read_text()
        stage = trainings.folder / name / STAGE
        whole = sorted(int(child.name) for child in stage.iterdir() if child.name.isdecimal())
        assert whole == [4, 5]
        assert trainings.run(name)[0] == 0
        trainings.assert_as_never_stopped(name)


def test_a_disk_that_takes_no_more_is_one_line_and_the_next_run_goes_on(
    trainings: Trainings,
) -> None:
    # Of the run's record, of a checkpoint, of the log.
    for file_bytes in (100, 1000, 3000):
        before = trainings.said.stat().st_size
        code, _ = trainings.run("full", file_bytes=file_bytes)
        said = trainings.said.read_text()[before:]
        assert code == exit_codes.FILE_SYSTEM, said
        (line,) = (line for line in said.splitlines() if not line.startswith(STAGE))
        assert line.startswith(f"error: {trainings.folder / 'full'}") or line.startswith(
            f"error: below {trainings.folder / 'full'}: "
        )
        assert "File too large: raise the limit of file sizes" in line
    assert trainings.run("full")[0] == 0
    trainings.assert_as_never_stopped("full")


ODDS = [
    ("its folder is moved", exit_codes.FILE_SYSTEM, "No such file or directory"),
    ("its lock is removed", exit_codes.DONE, ""),
    ("its folder is taken over", exit_codes.BAD_INPUT, "training, process "),
    ("its output is gone", exit_codes.DONE, "standard output is gone (Broken pipe)"),
    ("its loss is infinite", exit_codes.BAD_INPUT, "loss is nan by step"),
    ("it hangs", exit_codes.WATCHDOG, "no step ended in 5 s"),
]


@pytest.mark.parametrize(("done", "expected", "line"), ODDS, ids=[odd[0] for odd in ODDS])
def test_what_is_done_to_a_training_is_one_line_and_the_next_run_goes_on(
    trainings: Trainings, done: str, expected: int, line: str
) -> None:
    name, before = done.replace(" ", "-"), trainings.said.stat().st_size
    flags = ["--step_timeout=5"] if done == "it hangs" else []
    code, seconds = trainings.run(name, moment="step", passes=6, done=done, flags=flags)
    said = trainings.said.read_text()[before:]
    assert code == expected, said
    assert seconds < 30 or code == exit_codes.DONE
    lines = [text for text in said.splitlines() if not text.startswith((STAGE, "trained: "))]
    assert len(lines) == bool(line), said
    assert line in said
    if done == "its folder is taken over":
        return  # by a process that holds it still
    assert trainings.run(name)[0] == 0
    trainings.assert_as_never_stopped(name)


def test_a_store_that_is_removed_is_one_line(trainings: Trainings, tmp_path: pathlib.Path) -> None:
    shutil.copytree(trainings.folder / "data", tmp_path / "data")
    before = trainings.said.stat().st_size
    code, _ = trainings.run(
        "store-removed",
        moment="compile",
        done="its store is removed",
        data=str(tmp_path / "data"),
        flags=["--cache_mib=0"],
    )
    said = trainings.said.read_text()[before:]
    assert code == exit_codes.BAD_INPUT, said
    errors = [text for text in said.splitlines() if not text.startswith(STAGE)]
    assert len(errors) == 1
    assert "missing or damaged" in errors[0]


@pytest.mark.slow
@pytest.mark.scale
def test_eighty_signals_at_random_moments_lose_nothing(trainings: Trainings) -> None:
    draw = random.Random(20)
    numbers = [signal.SIGKILL] * 40 + [signal.SIGTERM] * 20 + [signal.SIGINT] * 20
    draw.shuffle(numbers)
    moments = [moment for moment in MOMENTS[:-1] for _ in range(5)]
    draw.shuffle(moments)
    # Some at a moment and some at a time; those at the threshold once all steps are taken.
    plan: list[dict[str, Any]] = [{"moment": m, "passes": draw.randrange(3)} for m in moments]
    plan += [{"after": draw.uniform(0.2, 8)} for _ in range(45)]
    draw.shuffle(plan)
    plan += [{"moment": "threshold"}] * 5
    name, rounds, ended = "random-0", 0, []
    for number, when in zip(numbers, plan, strict=True):
        code, seconds = trainings.run(name, number, **when)
        assert code in (ENDS[number], 0), f"{number.name} {when}:\n{trainings.said.read_text()}"
        assert seconds < 60
        ended.append(code)
        if code == 0:  # it came to its end before the signal: the next one begins anew
            trainings.assert_as_never_stopped(name)
            rounds += 1
            name = f"random-{rounds}"
    assert trainings.run(name)[0] == 0
    trainings.assert_as_never_stopped(name)
    for number, at_least in ((signal.SIGKILL, 30), (signal.SIGTERM, 12), (signal.SIGINT, 12)):
        assert ended.count(ENDS[number]) >= at_least
