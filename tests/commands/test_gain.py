"""The comparison of joint and single-task training: budgets, spread, and runs that go on."""

import json
import pathlib
import subprocess
import sys
from typing import Any, cast

import pytest

from deepsc_jax import gain
from deepsc_jax.config import Config, TrainConfig
from deepsc_jax.data.store import Store
from deepsc_jax.models.deepsc.config import JointTraining, Options, PreTraining
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.building import stages_of
from deepsc_jax.training import workdir as workdirs

CONFIG = Config(
    Options(
        segmentation=PreTraining(steps=600, batch=2),
        classification=PreTraining(steps=300, batch=4),
        joint=JointTraining(steps=1000, batch=2),
    ),
    train=TrainConfig(tiles_per_scan=1),
)


def alone(name: str, tiles: int) -> Config:
    (stage,), (joint,) = stages_of(CONFIG, name), stages_of(CONFIG, "joint")
    return gain.alone(CONFIG, stage, joint, tiles)


def test_a_task_alone_sees_as_many_scans_as_both_stages_show_it():
    assert alone("segmentation", tiles=1).stage("segmentation").steps == 600 + 1000
    assert alone("segmentation", tiles=3).stage("segmentation").steps == 600 + 3000
    assert alone("classification", tiles=3).stage("classification").steps == 300 + 500
    longer = alone("classification", tiles=1)
    assert longer != CONFIG
    assert longer.with_stage("classification", steps=300) == CONFIG


def test_gains_are_taken_seed_by_seed():
    def metrics(value: float) -> dict[str, Any]:
        return {
            task: {name: {"mean": value} for name in names} for task, names in gain.FIGURES.items()
        }

    joint = [metrics(v) for v in (0.7, 0.8, 0.9)]
    single = {task: [metrics(v) for v in (0.7, 0.7, 0.6)] for task in gain.FIGURES}
    row = gain.compare(joint, single)["lesions dsc"]
    assert row["joint"]["mean"] == pytest.approx(0.8)
    assert row["joint"]["sd"] == pytest.approx(0.1)  # of a sample: over n - 1
    assert row["gain"]["seeds"] == pytest.approx([0.0, 0.1, 0.3])
    assert (
        gain.compare(joint[:1], {t: s[:1] for t, s in single.items()})["lesions dsc"]["gain"]["sd"]
        is None
    )


def test_a_finished_run_is_read(tmp_path: pathlib.Path):
    class FakeStore:
        digest, contents, path = "a1", "phantoms", "data/store"

        def cases(self, split: str) -> list[Any]:
            assert split == "train"
            return []

    store = cast(Store, FakeStore())
    workdirs.begin(tmp_path, CONFIG, store)
    metrics = {"classes": {name: {"mean": 0.5} for name in gain.FIGURES["classes"]}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert gain.train_and_score(CONFIG, store, tmp_path, ("joint",)) == metrics


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"\xff", b"{", b'{"lesions": 3}', b'{"lesions": {"dsc": {"mean": null}}}'],
)
def test_damaged_metrics_are_named(tmp_path: pathlib.Path, content: bytes):
    path = tmp_path / "metrics.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"metrics\.json: not the metrics of a run"):
        gain._read(path)


def test_a_run_that_another_process_trains_is_left_to_it(tmp_path: pathlib.Path):
    code = (
        "import pathlib, sys, time\n"
        "from deepsc_jax.runtime.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), 'training'):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"training, process {holder.pid} on "):
            gain.train_and_score(CONFIG, cast(Store, None), tmp_path, ("joint",))
    finally:
        holder.kill()
        holder.wait()
