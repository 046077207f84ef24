"""The comparison of joint and single-task training: budgets, spread, and runs that go on."""

import dataclasses
import json
import pathlib
from typing import Any, cast

import pytest

from deepsc_jax import gain
from deepsc_jax.config import Config, TrainConfig
from deepsc_jax.data.store import Store
from deepsc_jax.training import workdir as workdirs

TRAIN = TrainConfig(
    segmentation_steps=600,
    classification_steps=300,
    joint_steps=1000,
    segmentation_batch=2,
    classification_batch=4,
    joint_batch=2,
    tiles_per_scan=1,
)


def test_a_task_alone_sees_as_many_scans_as_both_stages_show_it():
    settings = Config(train=TRAIN)
    assert gain.alone(settings, "segmentation", tiles=1).train.segmentation_steps == 600 + 1000
    assert gain.alone(settings, "segmentation", tiles=3).train.segmentation_steps == 600 + 3000
    assert gain.alone(settings, "classification", tiles=3).train.classification_steps == 300 + 500
    longer = gain.alone(settings, "classification", tiles=1)
    assert dataclasses.replace(longer, train=TRAIN) == settings


def test_gains_are_taken_seed_by_seed():
    def metrics(value: float) -> dict[str, Any]:
        return {
            task: {name: {"mean": value} for name in names} for task, names in gain.FIGURES.items()
        }

    joint = [metrics(v) for v in (0.7, 0.8, 0.9)]
    single = {task: [metrics(v) for v in (0.7, 0.7, 0.6)] for task in gain.FIGURES}
    row = gain.compare(joint, single)["segmentation dsc"]
    assert row["joint"]["mean"] == pytest.approx(0.8)
    assert row["joint"]["sd"] == pytest.approx(0.1)  # of a sample: over n - 1
    assert row["gain"]["seeds"] == pytest.approx([0.0, 0.1, 0.3])
    assert (
        gain.compare(joint[:1], {t: s[:1] for t, s in single.items()})["segmentation dsc"]["gain"][
            "sd"
        ]
        is None
    )


def test_a_finished_run_is_read(tmp_path: pathlib.Path):
    class FakeStore:
        digest, phantoms, path = "a1", True, "data/store"

    settings, store = Config(train=TRAIN), cast(Store, FakeStore())
    workdirs.begin(tmp_path, settings, store)
    (tmp_path / "metrics.json").write_text(json.dumps({"found": 1}))
    assert gain.run(settings, store, tmp_path, ("joint",)) == {"found": 1}
