"""How a train step's time grows: with devices, voxels, channels and scans."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from deepsc_jax.benchmarking.jobs import Job
from deepsc_jax.config import Config
from deepsc_jax.runtime.types import JsonObject

QUANTITIES = ("voxels", "channels", "scans", "devices")
DOUBLINGS = (1, 2, 4, 8)


def on_devices(job: Job, devices: int, *, weak: bool) -> Job:
    """The step on so many devices: of the same batch (strong scaling), or so many times it (weak).

    Raises:
      ValueError: the devices do not divide the batch.
    """
    scans = job.scans * (devices if weak else 1)
    parts = devices * job.config.platform.accumulation
    if scans % parts:
        flag = job.config.stage_flag(job.stage, "batch")
        raise ValueError(f"{flag} is {scans}: give a multiple of {parts}, or fewer devices")
    return _with_batch(job, scans, devices)


def efficiency(devices: Sequence[int], seconds: Sequence[float], *, weak: bool) -> list[float]:
    """The share of the ideal speed, against the first of the numbers of devices."""
    first = seconds[0] if weak else seconds[0] * devices[0]
    pairs = zip(devices, seconds, strict=True)
    return [first / (s if weak else s * n) for n, s in pairs]


def points(job: Job, quantity: str, devices: Sequence[int]) -> list[tuple[int, Job]]:
    """The values that a quantity takes, doubling, and the job of each; all else as it is.

    Voxels are those of a tile, whose depth is 8 and up and is the scan's too, with the sampled
    slices in proportion; channels in multiples of the network's; scans a
    batch's, on as many devices as `train` would take; devices share one batch.

    Raises:
      ValueError: a configuration that cannot be.
    """
    config = job.config
    if quantity == "voxels":
        made = [_of_depth(job, config.model.tile_step * factor) for factor in DOUBLINGS]
        return [(int(np.prod(j.config.data.tile)), j) for j in made]
    if quantity == "channels":
        made = [dataclasses.replace(job, config=_of_width(config, n)) for n in DOUBLINGS]
        return list(zip(DOUBLINGS, made, strict=True))
    if quantity == "scans":
        scans = [job.scans * factor for factor in DOUBLINGS]
        return [(n, _with_batch(job, n, config.platform.data_devices)) for n in scans]
    scans = math.lcm(job.scans, *devices)
    return [(n, _with_batch(job, scans, n)) for n in devices]


def _with_batch(job: Job, scans: int, devices: int) -> Job:
    config = job.config.with_stage(job.stage, batch=scans)
    platform = dataclasses.replace(config.platform, data_devices=devices)
    return dataclasses.replace(job, config=dataclasses.replace(config, platform=platform))


def _of_depth(job: Job, depth: int) -> Job:
    config, (old, height, width) = job.config, job.config.data.tile
    data = dataclasses.replace(
        config.data,
        tile=(depth, height, width),
        depth_bucket=depth,
        slices=max(config.data.slices * depth // old, 1),
    )
    _, rows, columns = job.scan_size
    return dataclasses.replace(
        job, config=dataclasses.replace(config, data=data), scan_size=(depth, rows, columns)
    )


def _of_width(config: Config, factor: int) -> Config:
    return dataclasses.replace(config, model=config.model.widened(factor))


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The b of seconds = a size^b, fitted by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def scaling_table(rows: Sequence[JsonObject]) -> str:
    """Weak and strong scaling as text."""
    lines = [
        f"{'scaling':10}{'work':22}{'devices':>8}{'batch':>7}{'s':>9}{'scans/s':>9}{'efficiency':>12}"
    ]
    lines += [
        f"{row['scaling']:10}{row['work']:22}{row['devices']:8}{row['batch']:7}"
        f"{row['ours_s']:9.4g}{row['scans_per_s']:9.3g}{row['efficiency']:12.0%}"
        for row in rows
    ]
    return "\n".join(lines)
