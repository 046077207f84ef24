"""The classes of a scan's voxels and their ids, as they are stored."""

from typing import get_args

from deepsc_jax.config.data import VoxelClass

IDS: dict[str, int] = {name: i for i, name in enumerate(get_args(VoxelClass))}
OTHER_SIDE = {"left_lung": "right_lung", "right_lung": "left_lung"}
MIRRORED_IDS = tuple(IDS[OTHER_SIDE.get(name, name)] for name in IDS)  # by id
