"""How times grow with devices and sizes, from figures made by hand."""

import pathlib

import numpy as np
import pytest
from measured import CONFIG, job, measured

from deepsc_jax.benchmarking import growth, scaling
from deepsc_jax.benchmarking.jobs import Job
from deepsc_jax.benchmarking.measure import Measured
from deepsc_jax.config import PlatformConfig
from deepsc_jax.models.deepsc.config import Options
from deepsc_jax.runtime.errors import InputError


def test_exponents_of_power_laws():
    sizes = [1, 2, 4, 8]
    assert scaling.exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert scaling.exponent(sizes, [0.1] * 4) == pytest.approx(0)


def test_efficiency_is_against_the_first_number_of_devices():
    assert scaling.efficiency([1, 2, 4], [1.0, 1.25, 2.0], weak=True) == [1.0, 0.8, 0.5]
    assert scaling.efficiency([2, 4], [1.0, 0.5], weak=False) == [1.0, 1.0]


def test_points_of_growth_change_one_thing():
    start = job(stage="joint")
    voxels = scaling.points(start, "voxels", [1])
    assert [size for size, _ in voxels] == [8 * 16 * 16 * factor for factor in (1, 2, 4, 8)]
    assert [j.config.data.slices for _, j in voxels] == [12, 24, 48, 96]
    assert [j.scan_size[0] for _, j in voxels] == [8, 16, 32, 64]
    channels = scaling.points(start, "channels", [1])
    assert [size for size, _ in channels] == [1, 2, 4, 8]
    twice = channels[1][1].config.model
    assert isinstance(twice, Options)
    assert (twice.inception_channels, twice.encoder_channels) == (64, (128, 256, 512))
    scans = scaling.points(start, "scans", [1])
    assert [(n, j.scans, j.config.platform.data_devices) for n, j in scans] == [
        (2, 2, 0),
        (4, 4, 0),
        (8, 8, 0),
        (16, 16, 0),
    ]
    devices = scaling.points(start, "devices", [1, 2, 3])
    assert [(n, j.scans, j.config.platform.data_devices) for n, j in devices] == [
        (1, 6, 1),
        (2, 6, 2),
        (3, 6, 3),
    ]


def test_strong_scaling_needs_a_batch_that_devices_divide():
    assert scaling.on_devices(job(), 8, weak=True).scans == 32
    assert scaling.on_devices(job(), 2, weak=False).config.platform == PlatformConfig(
        data_devices=2
    )
    with pytest.raises(ValueError, match=r"deepsc\.segmentation\.batch is 4: give a multiple of 8"):
        scaling.on_devices(job(), 8, weak=False)


def test_growth_takes_the_fastest_peer(tmp_path: pathlib.Path):
    def beside(point: Job, peers: bool) -> list[Measured]:
        size = float(np.prod(point.config.data.tile)) * point.config.platform.data_devices**-1.0
        both = [measured("torch", "eager", (size**2,)), measured("torch", "compiled", (9e9,))]
        return [measured(seconds=(size,)), *(both if peers else [])]

    def without_peer_at_first(point: Job, _: bool) -> list[Measured]:
        scans = point.scans
        peers = [measured("torch", "eager", (3.0 * scans,))] if scans > 4 else []
        return [measured(seconds=(float(scans),)), *peers]

    start = job(config=CONFIG)
    start = scaling.on_devices(start, 1, weak=True)
    by_quantity = list(growth.curves(start, ["voxels", "devices"], [1, 2], beside))
    assert [len(curves) for curves in by_quantity] == [2, 1]
    found = [curve for curves in by_quantity for curve in curves]
    assert [(curve["quantity"], curve["side"]) for curve in found] == [
        ("voxels", "ours"),
        ("voxels", "torch"),
        ("devices", "ours"),
    ]
    assert [curve["exponent"] for curve in found] == pytest.approx([1, 2, -1])
    assert found[1]["names"] == ["torch eager"] * 4
    found += next(growth.curves(start, ["scans"], [1], without_peer_at_first))
    assert [curve["sizes"] for curve in found[3:]] == [[4, 8, 16, 32], [8, 16, 32]]
    with pytest.raises(InputError, match="--growth=devices: one number of --devices"):
        growth.curves(start, ["scans", "devices"], [1], beside)
    growth.draw(found, "train_segmentation", tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
