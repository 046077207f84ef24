"""A small network, the same in Flax and in the reference, and batches with padding and ties."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from drawn import draw_params, masked_volume

from deepsc_jax.config import Config, DataConfig
from deepsc_jax.data import batch as batches
from deepsc_jax.models.deepsc import network as deepsc
from deepsc_jax.models.deepsc.config import JointTraining, Options, PreTraining
from deepsc_jax.models.layers.layout import Layout
from deepsc_jax.systems.building import build
from deepsc_jax.systems.joint import Joint

TILE, SIZE, SLICES = (8, 16, 8), (16, 16), 5
CONFIG = Config(
    data=DataConfig(working_size=SIZE, tile=TILE, slices=SLICES, depth_bucket=8),
    model=Options(
        inception_branches=((1,), (1, 3)),
        inception_channels=4,
        lesion_channels=(4, 4, 4),
        classifier_stem_channels=4,
        encoder_channels=(4, 4, 6),
        norm_groups=2,
        segmentation=PreTraining(steps=30, batch=2),
        classification=PreTraining(steps=30, batch=2),
        joint=JointTraining(steps=30, batch=2),
    ),
)
CLASS_WEIGHTS = (0.7, 1.0, 1.6)


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """`config` with some fields of some sections replaced."""
    parts = {
        name: dataclasses.replace(getattr(config, name), **fields)
        for name, fields in sections.items()
    }
    return dataclasses.replace(config, **parts)


def batch(seed: int = 0, depths: tuple[int, int] = (11, 5)) -> dict[str, np.ndarray]:
    """Two scans: all tiles of each, padded to two tiles of depth, and the sampled slices."""
    rng = np.random.default_rng(seed)
    bucket = 2 * TILE[0]
    axes = zip((bucket, *SIZE), TILE, strict=True)
    origins = list(itertools.product(*(range(0, side, tile) for side, tile in axes)))
    tiles, lesions, slices = [], [], []
    for i, depth in enumerate(depths):
        volume = masked_volume((1, depth, *SIZE), seed=10 * seed + i)[0]
        lesion = (rng.uniform(size=volume.shape) < 0.2) & (volume > 0)
        slices.append(volume[np.arange(SLICES) * depth // SLICES])
        behind = ((0, bucket - depth), (0, 0), (0, 0))
        for rows, array in ((tiles, volume), (lesions, lesion.astype(float))):
            whole = np.pad(array, behind)
            parts = [
                whole[tuple(slice(o, o + t) for o, t in zip(origin, TILE, strict=True))]
                for origin in origins
            ]
            rows.append(np.stack(parts))
    return {
        "tiles": np.stack(tiles),
        "lesions": np.stack(lesions),
        "origins": np.asarray([origins] * len(depths), np.int32),
        "slices": np.stack(slices),
        "depth": np.asarray(depths, np.int32),
        "label": np.asarray([0, 1], np.int32),
    }


def draw(config: Config, seed: int = 0) -> Any:
    """Random parameters of the whole network."""
    network = network_of(config)
    example = batches.zeros(system_of(config).init_reads, config.data)
    return draw_params(network, example, "joint", seed=seed)["params"]


def options_of(config: Config) -> Options:
    """The network's options."""
    assert isinstance(config.model, Options)
    return config.model


def network_of(config: Config, layout: Layout | None = None) -> deepsc.DeepSC:
    """The network of `config`, by default in the native form."""
    return deepsc.DeepSC(options_of(config), config.data, layout or Layout())


def system_of(config: Config, platform: str = "cpu", dtype: str | None = None) -> Joint:
    """The system of `config`, as it runs on `platform`, but for the precision if one is given."""
    system = build(config, platform)
    assert isinstance(system, Joint)
    if dtype is None:
        return system
    return Joint(config, dataclasses.replace(system.layout, dtype=jnp.dtype(dtype)), deepsc)


def to_jax(batch: dict[str, np.ndarray], dtype: str) -> dict[str, jax.Array]:
    return {k: jnp.asarray(v, dtype if v.dtype.kind == "f" else None) for k, v in batch.items()}
