"""The comparison of joint and single-task training: budgets, spread, and runs that go on."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from deepsc_jax import config, gain
from deepsc_jax.config import Config, TrainConfig
from deepsc_jax.errors import InputError

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


def test_a_finished_run_is_read_and_one_of_other_settings_refused(tmp_path: pathlib.Path):
    settings, store = Config(train=TRAIN), None
    config.save(settings, tmp_path / "config.json")
    (tmp_path / "metrics.json").write_text(json.dumps({"found": 1}))
    assert gain.run(settings, store, tmp_path, ("joint",)) == {"found": 1}  # type: ignore[arg-type]
    other = dataclasses.replace(settings, train=dataclasses.replace(TRAIN, seed=1))
    with pytest.raises(InputError, match="other settings"):
        gain.run(other, store, tmp_path, ("joint",))  # type: ignore[arg-type]
