"""The model's own FLOPs of a step, whatever a device recomputes, and the rates of known chips."""

import dataclasses
from collections.abc import Mapping

import jax

from deepsc_jax.config import Config, PlatformConfig
from deepsc_jax.planning import compiled, flops, targets
from deepsc_jax.runtime import device_mesh
from deepsc_jax.systems.building import build


def plain(config: Config) -> Config:
    """The same configuration on one device, with plain convolutions and nothing recomputed."""
    platform = PlatformConfig(
        data_devices=1,
        compute_dtype=config.platform.compute_dtype,
        conv_form="native",
        remat="none",
    )
    return dataclasses.replace(config, platform=platform)


def of_step(config: Config, stage: str, scans: int, depth: int) -> dict[str, int]:
    """FLOPs of a train step on `scans` scans of `depth` slices, by kind of product.

    Once over the network, forward and backward, counted on shapes alone.
    """
    config = plain(config)
    mesh = device_mesh.make_mesh(config.platform)
    traced = compiled.trace(build(config), stage, mesh, scans, depth)
    return dict(flops.count(traced.jaxpr))


def published_chip() -> targets.Chip | None:
    """What this process's first device is, if it is one of `targets.CHIPS`."""
    words = jax.devices()[0].device_kind.lower().replace("v5 lite", "v5e").split()
    for name, chip in targets.CHIPS.items():
        if any(word.startswith(name) for word in words):
            return chip
    return None


def least_seconds(counted: Mapping[str, float], peaks: Mapping[str, float]) -> float:
    """What a device at its peak would take for so many FLOPs of each kind."""
    return sum(n / peaks[kind] for kind, n in counted.items())
