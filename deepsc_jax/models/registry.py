"""Every model, a row each; what a row names is imported when it is asked for.

To add a model: a folder or a file of it, a row here, a flag file, and a reference in
tests/reference/ (CONTRIBUTING.md has the checklist).
"""

import dataclasses
import importlib

from deepsc_jax.config.flags import ConfigFlags
from deepsc_jax.models.torch_names import Rule
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import Untyped


@dataclasses.dataclass(frozen=True)
class Row:
    """Where a model's parts are.

    Attributes:
      title: what it is, for tables.
      options: `module:class` of its options.
      model: the module with `build`, `losses` and `TORCH_NAMES`, which its system uses.
      system: `module:class` of the task that it is put into.
    """

    title: str
    options: str
    model: str
    system: str


MODELS = {
    "deepsc": Row(
        "DeepSC-COVID",
        "deepsc_jax.models.deepsc.config:Options",
        "deepsc_jax.models.deepsc.network",
        "deepsc_jax.systems.joint:Joint",
    ),
    "qchc_unet": Row(
        "QC-HC U-Net",
        "deepsc_jax.models.qchc_unet.config:Options",
        "deepsc_jax.models.qchc_unet.network",
        "deepsc_jax.systems.patch_segmentation:PatchSegmentation",
    ),
    "unet3d": Row(
        "3D U-Net (MLPerf)",
        "deepsc_jax.models.comparators.unet3d:Options",
        "deepsc_jax.models.comparators.unet3d",
        "deepsc_jax.systems.patch_segmentation:PatchSegmentation",
    ),
    "resnet3d": Row(
        "3D ResNet-50",
        "deepsc_jax.models.comparators.resnet3d:Options",
        "deepsc_jax.models.comparators.resnet3d",
        "deepsc_jax.systems.image_classification:ImageClassification",
    ),
    "cnncf": Row(
        "CNNCF",
        "deepsc_jax.models.cnncf.config:Options",
        "deepsc_jax.models.cnncf.network",
        "deepsc_jax.systems.image_classification:ImageClassification",
    ),
    "cnnrf": Row(
        "CNNRF",
        "deepsc_jax.models.cnncf.config:RegressorOptions",
        "deepsc_jax.models.cnncf.regressor",
        "deepsc_jax.systems.patch_regression:PatchRegression",
    ),
}
DEFAULT = "deepsc"


def row(name: str) -> Row:
    """The row of a model.

    Raises:
      InputError: there is none of that name.
    """
    if name not in MODELS:
        raise InputError(f"model {name!r} is unknown: expected one of {', '.join(MODELS)}")
    return MODELS[name]


def options(name: str) -> type:
    """The class of a model's options.

    Raises:
      InputError: there is no model of that name.
    """
    return load(row(name).options)


def torch_names(name: str) -> tuple[Rule, ...]:
    """The names of a model's parameters in PyTorch."""
    return importlib.import_module(row(name).model).TORCH_NAMES


def load(path: str) -> Untyped:
    """What `module:name` names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def config_flags() -> ConfigFlags:
    """The flags of a run of any of the models."""
    return ConfigFlags({name: lambda name=name: options(name) for name in MODELS}, DEFAULT)
