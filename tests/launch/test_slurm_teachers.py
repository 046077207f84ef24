"""The script for teachers, which hands each training to the one for a training."""

import pathlib

from stand_ins import LAUNCH, calls, stand_in, start


def test_each_task_trains_a_teacher_on_a_fold_in_a_folder_of_its_own(
    tmp_path: pathlib.Path,
) -> None:
    stand_in(tmp_path, "srun", "")
    for task, more, stage in (
        ("0", {}, "teacher1.fold1"),
        ("13", {}, "teacher3.fold4"),
        ("3", {"FOLDS": "2"}, "teacher2.fold2"),
    ):
        run = start(tmp_path, "distil.sbatch", "--workdir=a b/%s", SLURM_ARRAY_TASK_ID=task, **more)
        assert run.wait() == 0
        call = calls(tmp_path)[-1]
        trained = f"{tmp_path}/python -m deepsc_jax.train"
        assert call.endswith(f"{trained} --workdir=a b/{stage} --stage={stage}")


def test_what_would_not_be_a_training_each_is_refused(tmp_path: pathlib.Path) -> None:
    stand_in(tmp_path, "srun", "")
    for flag, more, said in (
        ("--workdir=run", {"SLURM_ARRAY_TASK_ID": "1"}, "expected %s"),
        ("--workdir=%s", {"SLURM_ARRAY_TASK_ID": ""}, "--array=0-19"),
    ):
        run = start(tmp_path, "distil.sbatch", flag, **more)
        _, errors = run.communicate()
        assert run.returncode == 2
        assert said in errors
        assert len(errors.splitlines()) == 1
    assert calls(tmp_path) == []


def test_its_own_words_name_every_run_for_the_student() -> None:
    """As bash has `printf ,/shared/teacher%s {1..4}.fold{1..5}`."""
    text = (LAUNCH / "distil.sbatch").read_text()
    assert "printf ,/shared/teacher%s {1..4}.fold{1..5}" in text
    assert '--init_from="${runs:1}"' in text
