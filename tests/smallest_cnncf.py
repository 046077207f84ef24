"""A small CNNCF, as Flax and as PyTorch have it, and batches of X-rays and of CT."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from drawn import masked_volume

from deepsc_jax.config import Config, DataConfig, PlatformConfig
from deepsc_jax.models.cnncf import gate, network
from deepsc_jax.models.cnncf.config import Options, Training
from deepsc_jax.models.layers.layout import Layout
from deepsc_jax.systems.image_classification import ImageClassification

OPTIONS = Options(
    stem=4,
    stage1_widths=(4, 6, 8),
    stage2_widths=(8, 6, 10),
    published_widths=(4, 6, 8, 10),
    gate_window=4,
    gate_sensitivity=0.0,
    gate_count=3,
    # At forty times this rate the gate's classifier, of 1,536 features, overshoots: PyTorch's own
    # losses, of parameters changed by 1e-12, are then 7e-7 apart, and here 2e-11.
    classification=Training(
        steps=30, batch=4, learning_rate=5e-4, warmup_steps=5, decay_every=20, weight_decay=1e-2
    ),
)
# Sides of which stage II leaves more than one pixel, or norms would see the batch alone.
DATA = DataConfig(
    working_size=(96, 128),
    tile=(8, 96, 128),
    depth_bucket=8,
    slices=1,
    intensity_mean=0,
    intensity_sd=1,
)
CLASS_WEIGHTS = (0.7, 1.0, 1.6)
PATCHES = DataConfig(
    mask="none",
    patches="window",
    working_size=(64, 64),
    tile=(1, 64, 64),
    depth_bucket=1,
    slices=5,
    indicators=("a", "b", "c", "d", "e"),
    intensity_mean=0,
    intensity_sd=1,
)


def config(slices: int = 1, **options: Any) -> Config:
    """The small network's configuration, with other options."""
    return Config(
        dataclasses.replace(OPTIONS, **options),
        dataclasses.replace(DATA, slices=slices),
        platform=PlatformConfig(data_devices=1),
    )


def system(of: Config, dtype: str = "float32") -> ImageClassification:
    """The system of a configuration."""
    return ImageClassification(of, Layout(dtype=jnp.dtype(dtype)), network)


def batch(slices: int, seed: int = 0, images: int = 4) -> dict[str, np.ndarray]:
    """Images with constant regions, whose maxima tie, and labels."""
    rng = np.random.default_rng(100 + seed)
    return {
        "slices": masked_volume((images, slices, *DATA.working_size), seed=seed),
        "depth": np.full(images, slices, np.int32),
        "label": rng.integers(0, 3, images).astype(np.int32),
    }


def state(is_open: bool) -> gate.GateState:
    """A gate that opened at step 3, or is shut."""
    fresh = gate.shut()
    if not is_open:
        return fresh
    return fresh | {"open": jnp.asarray(True), "since": jnp.asarray(3, jnp.int32)}


def cast(tree: Any, dtype: str) -> Any:
    """Floating-point arrays in another type, but for those of the gate."""

    def leaf(path: Any, x: Any) -> Any:
        fixed = path[0].key == gate.COLLECTION or np.asarray(x).dtype.kind != "f"
        return jnp.asarray(x) if fixed else jnp.asarray(x, dtype)

    return jax.tree.map_with_path(leaf, tree)
