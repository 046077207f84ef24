"""The script for cross-validation, which hands each fold to the one for a training."""

import pathlib

from stand_ins import calls, stand_in, start

ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_STEP": "2"}


def test_each_task_trains_a_fold_in_a_folder_of_its_own(tmp_path: pathlib.Path) -> None:
    stand_in(tmp_path, "srun", "")
    run = start(
        tmp_path, "folds.sbatch", "--workdir=a b/run-%f", SLURM_ARRAY_TASK_COUNT="5", **ARRAY
    )
    assert run.wait() == 0
    (call,) = calls(tmp_path)
    assert call.endswith(f"{tmp_path}/python -m deepsc_jax.train --workdir=a b/run-2 --fold=2/5")


def test_what_would_not_be_a_fold_each_is_refused(tmp_path: pathlib.Path) -> None:
    stand_in(tmp_path, "srun", "")
    for flag, count, said in (("--workdir=run", "5", "expected %f"), ("--workdir=%f", "2", "gaps")):
        run = start(tmp_path, "folds.sbatch", flag, SLURM_ARRAY_TASK_COUNT=count, **ARRAY)
        _, errors = run.communicate()
        assert run.returncode == 2
        assert said in errors
        assert len(errors.splitlines()) == 1
    assert calls(tmp_path) == []
