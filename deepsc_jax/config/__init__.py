"""The configuration: frozen, validated dataclasses, of whose fields `flags` makes flags.

Every hyper-parameter's help begins with its origin: `paper:` where the model's paper states the
value, `code:` where its authors' code does, `assumed:` where the choice is ours. A combination that
cannot work is refused when the flags are parsed. A model's own options stand beside its network.
"""

from deepsc_jax.config.data import CLASSES, DataConfig, Modality, VoxelClass
from deepsc_jax.config.options import Ints3, ModelOptions, StageOptions, option, require
from deepsc_jax.config.platform import PlatformConfig
from deepsc_jax.config.run import Config
from deepsc_jax.config.training import Plateau, SgdConfig, StageConfig, TrainConfig

__all__ = [
    "CLASSES",
    "Config",
    "DataConfig",
    "Ints3",
    "Modality",
    "ModelOptions",
    "Plateau",
    "PlatformConfig",
    "SgdConfig",
    "StageConfig",
    "StageOptions",
    "TrainConfig",
    "VoxelClass",
    "option",
    "require",
]
