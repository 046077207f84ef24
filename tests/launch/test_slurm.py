"""The scripts for SLURM, with stand-ins for its programs."""

import pathlib
import re

import pytest
from stand_ins import LAUNCH, SAVES, calls, stand_in, start, terminate_when_called

SHOW = "scontrol show job --oneliner"


def scontrol(folder: pathlib.Path, state: str = "RUNNING") -> None:
    """SLURM's controller, for which the job is in that state."""
    shown = f"JobId=17 JobState={state} Reason=None"
    stand_in(folder, "scontrol", f'[ "$1" = show ] && echo "{shown}" || true')


CRASHES = (69, 70, 124, 134, 137, 139)
AT_MOST = [(code, restarts, restarts < 3) for code in CRASHES for restarts in (2, 3)]


@pytest.mark.parametrize("script", ["slurm.sbatch", "predict.sbatch"])
@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (130, 0, False), (75, 99, True), *AT_MOST],
)
def test_slurm_requeues_what_wants_to_go_on_and_crashes_three_times(
    tmp_path: pathlib.Path, script: str, code: int, restarts: int, requeued: bool
) -> None:
    stand_in(tmp_path, "srun", f"exit {code}")
    scontrol(tmp_path)
    run = start(tmp_path, script, SLURM_RESTART_COUNT=str(restarts))
    said, errors = run.communicate(timeout=30)
    assert run.returncode == code
    assert calls(tmp_path)[1:] == ([f"{SHOW} 17", "scontrol requeue 17"] if requeued else [])
    assert ("queued again, to go on" in said) == requeued
    gave_up = f"error: ended with code {code} after {restarts} restarts: not queued again\n"
    assert errors == (gave_up if code > 2 and code != 130 and not requeued else "")


def test_slurm_runs_training_with_its_flags_and_cores(tmp_path: pathlib.Path) -> None:
    stand_in(tmp_path, "srun", "")
    start(tmp_path, "slurm.sbatch", "--workdir=a b", SLURM_CPUS_PER_TASK="8").communicate()
    train = f"{tmp_path}/python -m deepsc_jax.train --workdir=a b"
    options = "--cpus-per-task=8 --kill-on-bad-exit=0 --wait=60"
    assert calls(tmp_path) == [f"srun {options} {train}"]


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PREEMPTED", "TIMEOUT"])
@pytest.mark.parametrize("script", ["slurm.sbatch", "predict.sbatch"])
def test_what_scancel_or_slurm_itself_ends_is_left_to_slurm(
    tmp_path: pathlib.Path, script: str, state: str
) -> None:
    stand_in(tmp_path, "srun", SAVES)
    scontrol(tmp_path, state)
    run = start(tmp_path, script)
    terminate_when_called(run, tmp_path)
    said, _ = run.communicate(timeout=30)
    assert run.returncode == 75
    assert calls(tmp_path)[1:] == [f"{SHOW} 17"]
    assert f"while SLURM has the job as {state}: left to SLURM" in said


def test_a_controller_that_answers_late_is_asked_again(tmp_path: pathlib.Path) -> None:
    stand_in(tmp_path, "srun", "exit 75")
    stand_in(tmp_path, "sleep", "")
    busy = f'[ "$(grep -c show "{tmp_path}/calls.txt")" = 1 ] && exit 1'
    stand_in(tmp_path, "scontrol", f"{busy}\n[ $1 = show ] && echo JobState=RUNNING || exit 0")
    run = start(tmp_path, "slurm.sbatch")
    run.communicate(timeout=30)
    assert calls(tmp_path)[1:] == [f"{SHOW} 17", "sleep 5", f"{SHOW} 17", "scontrol requeue 17"]


@pytest.mark.parametrize("script", ["slurm.sbatch", "predict.sbatch"])
def test_slurm_passes_sigterm_on_and_waits_for_the_save(
    tmp_path: pathlib.Path, script: str
) -> None:
    stand_in(tmp_path, "srun", SAVES)
    scontrol(tmp_path)
    run = start(tmp_path, script)
    terminate_when_called(run, tmp_path)
    run.communicate(timeout=30)
    assert run.returncode == 75
    assert calls(tmp_path)[1:] == [f"{SHOW} 17", "scontrol requeue 17"]


@pytest.mark.parametrize("script", ["slurm.sbatch", "predict.sbatch"])
def test_a_signal_between_the_trap_and_the_step_is_given_to_the_step(
    tmp_path: pathlib.Path, script: str
) -> None:
    # The script as it is, but for a signal to itself right before srun is started, and one right
    # after, before the script knows its number.
    lines = (LAUNCH / script).read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("srun "))
    after = lines.index("step=$!")
    stand_in(tmp_path, "srun", SAVES)
    scontrol(tmp_path)
    for place in (at, after):
        assert lines[after - 1].endswith("&")
        moved = [*lines[:place], "kill -TERM $$", *lines[place:]]
        (tmp_path / script).write_text("\n".join(moved))
        run = start(tmp_path, str(tmp_path / script))
        run.communicate(timeout=30)
        assert run.returncode in (75, 143)  # 143: it was not yet srun
        assert calls(tmp_path)[-2:] == [f"{SHOW} 17", "scontrol requeue 17"]
        (tmp_path / "calls.txt").unlink()


def test_a_step_that_ends_well_as_the_signal_comes_is_not_queued_again(
    tmp_path: pathlib.Path,
) -> None:
    stand_in(tmp_path, "srun", "trap '' TERM\nsleep 1\nexit 0")
    scontrol(tmp_path)
    run = start(tmp_path, "slurm.sbatch")
    terminate_when_called(run, tmp_path)
    run.communicate(timeout=30)
    assert run.returncode == 0
    assert len(calls(tmp_path)) == 1


def test_both_slurm_scripts_hear_signals_and_requeue_alike() -> None:
    def parts(script: str) -> list[str]:
        text = (LAUNCH / script).read_text()
        begin, end = "# SIGTERM is heard", "set -uo pipefail"
        return [text[text.index(begin) : text.index(end)], text[text.index("step=$!") :]]

    assert parts("slurm.sbatch") == parts("predict.sbatch")


def task(index: int, count: int, first: int = 0, step: int = 1) -> dict[str, str]:
    """What SLURM tells a task of an array; job 17 is also the whole array's number."""
    facts = {"ID": index, "COUNT": count, "MIN": first, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{k}": str(v) for k, v in facts.items()} | {
        "SLURM_ARRAY_JOB_ID": "17",
        "SLURM_CPUS_PER_TASK": "8",
    }


@pytest.mark.parametrize(
    ("facts", "share"),
    [
        (task(0, 4), "0/4"),
        (task(3, 4), "3/4"),
        (task(64, 64, first=1), "63/64"),
        (task(9, 3, first=5, step=2), "2/3"),
        ({}, "0/1"),
    ],
)
def test_a_task_of_an_array_predicts_its_share(
    tmp_path: pathlib.Path, facts: dict[str, str], share: str
) -> None:
    stand_in(tmp_path, "srun", "exit 1")
    stand_in(tmp_path, "scontrol", "")
    run = start(tmp_path, "predict.sbatch", "--scans=a b", **facts)
    run.communicate()
    assert run.returncode == 1
    (call,) = calls(tmp_path)
    assert call.endswith(f"{tmp_path}/python -m deepsc_jax.predict --scans=a b --share={share}")


def test_an_array_with_gaps_is_refused(tmp_path: pathlib.Path) -> None:
    stand_in(tmp_path, "srun", "")
    run = start(tmp_path, "predict.sbatch", **task(7, 2, first=3))
    assert "task 7 of an array of 2 has no share of its own" in run.communicate()[1]
    assert (run.returncode, calls(tmp_path)) == (2, [])


def test_a_preempted_task_is_queued_again_without_the_rest_of_its_array(
    tmp_path: pathlib.Path,
) -> None:
    stand_in(tmp_path, "srun", SAVES)
    scontrol(tmp_path)
    run = start(tmp_path, "predict.sbatch", **task(3, 4))
    terminate_when_called(run, tmp_path)
    run.communicate(timeout=30)
    assert run.returncode == 75
    assert calls(tmp_path)[1:] == [f"{SHOW} 17_3", "scontrol requeue 17_3"]


@pytest.mark.parametrize("script", ["slurm.sbatch", "predict.sbatch"])
def test_slurm_asks_for_the_signal_early_and_to_be_requeued(script: str) -> None:
    asked = re.findall(r"^#SBATCH (--\S+)$", (LAUNCH / script).read_text(), re.MULTILINE)
    assert {"--requeue", "--signal=B:TERM@120", "--open-mode=append"} <= set(asked)
