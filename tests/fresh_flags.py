"""Flags of the configuration, parsed in a set of their own, as a command does in its process."""

import functools
import pathlib

import pytest
from absl import flags

from deepsc_jax.config import Config
from deepsc_jax.config.flags import ConfigFlags
from deepsc_jax.models import registry

REPOSITORY = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.flags"))


def parse(*arguments: str, of: ConfigFlags | None = None) -> tuple[Config, flags.FlagValues]:
    """The configuration that the arguments describe, and the flags.

    Args:
      arguments: of a command line.
      of: the flags to parse, by default those of the registry's models.
    """
    of = of or registry.config_flags()
    with pytest.MonkeyPatch.context() as patch:
        values = fresh(patch)
        of.define()
        assert of.parse(["program", *arguments]) == ["program"]
        return of.config(), values


def fresh(patch: pytest.MonkeyPatch) -> flags.FlagValues:
    """An empty set of flags in the place of `flags.FLAGS`, which is where flags are defined."""
    values = flags.FlagValues()
    patch.setattr(flags, "FLAGS", values)
    for kind in ("bool", "integer", "float", "string", "enum", "list"):
        define = getattr(flags, f"DEFINE_{kind}")
        patch.setattr(flags, f"DEFINE_{kind}", functools.partial(define, flag_values=values))
    return values
