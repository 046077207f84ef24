"""A handful of phantoms and a small configuration for them, for tests that train."""

import pathlib

from deepsc_jax.config import Config, DataConfig, PlatformConfig, TrainConfig
from deepsc_jax.data import preparation
from deepsc_jax.data.records import Contents
from deepsc_jax.models.deepsc.config import JointTraining, Options, PreTraining
from deepsc_jax.phantoms.writing import write_phantoms

CONFIG = Config(
    data=DataConfig(
        working_spacing_mm=(8, 9, 9),
        working_size=(24, 32),
        tile=(8, 24, 32),
        depth_bucket=8,
        slices=8,
    ),
    model=Options(
        inception_channels=4,
        inception_branches=((1,), (1, 3)),
        lesion_channels=(4, 4, 4),
        classifier_stem_channels=4,
        encoder_channels=(4, 4, 4),
        norm_groups=2,
        segmentation=PreTraining(steps=4, batch=2),
        classification=PreTraining(steps=4, batch=2),
        joint=JointTraining(steps=4, batch=2),
    ),
    train=TrainConfig(log_every=1, evaluate_every=2, checkpoint_every=2),
    platform=PlatformConfig(data_devices=1),
)


def write(out: pathlib.Path) -> pathlib.Path:
    """Six training, three validation and three test phantoms, prepared."""
    cases = write_phantoms((6, 3, 3), out, seed=0, size=48, workers=1)
    assert (
        preparation.prepare(cases, out, CONFIG.data, workers=1, contents=Contents(phantoms=True))
        == []
    )
    return out
