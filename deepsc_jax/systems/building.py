"""From a configuration to the system that it describes."""

import dataclasses
import importlib
from types import ModuleType

import jax

from deepsc_jax.config import Config
from deepsc_jax.models import registry
from deepsc_jax.models.layers.layout import of_platform
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.system import Stage, System


def build(config: Config, platform: str | None = None) -> System:
    """The system of `config`, laid out for `platform`, by default the one at hand.

    Raises:
      InputError: the model is unknown, or the platform has not the form of convolutions.
    """
    row = registry.row(config.name)
    model: ModuleType = importlib.import_module(row.model)
    layout = of_platform(config.platform, platform or jax.default_backend())
    layout = dataclasses.replace(layout, local_norms=config.train.batch_norm == "local")
    return registry.load(row.system)(config, layout, model)


def described(config: Config) -> System:
    """The system of `config` to be asked what it is, without a look at any device."""
    native = dataclasses.replace(config.platform, conv_form="native")
    return build(dataclasses.replace(config, platform=native), "cpu")


def stages_of(config: Config, name: str = "all") -> tuple[Stage, ...]:
    """The stage of that name, or all in order; without a look at any device.

    Raises:
      InputError: the model has no such stage.
    """
    system = described(config)
    names = [stage.name for stage in system.stages]
    if name not in ("all", *names):
        raise InputError(
            f"--stage={name}: --model={config.name} has the stages {', '.join(names)}: give one of "
            "them, or all"
        )
    return tuple(stage for stage in system.stages if name in ("all", stage.name))
