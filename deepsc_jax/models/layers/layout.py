"""How a device computes a network: one record that travels whole to every layer."""

import dataclasses
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepsc_jax.config import PlatformConfig
from deepsc_jax.runtime import compiler
from deepsc_jax.runtime.errors import InputError

Volume = Float[Array, "batch depth height width channel"]
Strides = tuple[int, int]  # of a convolution: along depth, and in plane
ConvForm = Literal["native", "banded", "sliced", "folded", "direct"]
CPU_FORMS: tuple[ConvForm, ...] = ("folded", "direct")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a device computes a network; the result is the same, local norms apart.

    Attributes:
      form: of the convolutions (`convolution`).
      dtype: of their inputs and outputs.
      loop_tiles: a scan's tiles one after another, in a loop, rather than all as one batch.
      remat_tiles: the backward pass computes a looped tile's activations again.
      remat_blocks: it computes what is inside a block again.
      local_norms: batch norms take the statistics of a device's own examples: another function.
    """

    form: ConvForm = "native"
    dtype: jnp.dtype | type = jnp.float32
    loop_tiles: bool = False
    remat_tiles: bool = False
    remat_blocks: bool = False
    local_norms: bool = False


def of_platform(choice: PlatformConfig, platform: str) -> Layout:
    """The layout that `choice` stands for on `platform` (`jax.default_backend()`).

    Raises:
      InputError: `direct` without oneDNN.
    """
    looped = choice.tile_loop == "loop" or (choice.tile_loop == "auto" and platform != "cpu")
    return Layout(
        form=resolve_form(choice.conv_form, platform, choice.space),
        dtype=resolve_dtype(choice.compute_dtype, platform),
        loop_tiles=looped,
        remat_tiles=choice.remat in ("tiles", "all"),
        remat_blocks=choice.remat in ("blocks", "all"),
    )


def resolve_form(form: str, platform: str, space: int = 1) -> ConvForm:
    """The convolution form that `auto` stands for on `platform` (`jax.default_backend()`).

    Depth that is split over `space` devices does not become a batch: that would gather it.

    Raises:
      InputError: `direct` without oneDNN.
    """
    if form == "direct" and platform != "cpu":
        raise InputError(f"--conv_form=direct: it is for CPUs, and this is a {platform}: use auto")
    if form == "direct" and not compiler.has_onednn():
        raise InputError(
            f"--conv_form=direct: JAX {jax.__version__} has no oneDNN here: use JAX 0.11 (Python "
            "3.12 or newer, x86-64 Linux), or auto"
        )
    if form != "auto":
        return cast(ConvForm, form)
    if platform == "gpu":
        return "banded"
    whole: dict[str, ConvForm] = {"cpu": "folded", "tpu": "sliced"}
    return whole.get(platform, "native") if space == 1 else "native"


def resolve_dtype(name: str, platform: str) -> jnp.dtype:
    """The compute dtype that `auto` stands for on `platform`."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)
