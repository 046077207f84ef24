"""Augmentation of scans without a lung mask: classes of voxels, mirrors, changes of z-scores."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from deepsc_jax.config import DataConfig, TrainConfig
from deepsc_jax.data import augment
from deepsc_jax.data.augment import Augmentation
from deepsc_jax.data.batch import Reads
from deepsc_jax.data.classes import IDS
from deepsc_jax.systems import changes, decoding

DEPTH = 13
DATA = DataConfig(mask="none", working_size=(16, 24), tile=(8, 8, 12), slices=6, depth_bucket=16)
MM = (3.0, 1.0, 1.5)
SHAPE = (DEPTH, *DATA.working_size)
MIDDLE = (np.asarray(SHAPE, np.float32) - 1) / 2
# What configs/qchc_unet.flags asks for.
PAPERS = TrainConfig(
    flip_probability=0.15,
    change_probability=0.15,
    mirror_axes=("depth", "height", "width"),
    rotation_degrees=15,
    tilt_degrees=15,
    zoom=(0.85, 1.25),
    elastic_mm=6,
    elastic_distance_mm=40,
    brightness=(0.5, 2),
    contrast=(0.3, 3),
    gamma=(0.5, 2),
    noise=0.316,
    intensity_scale=0,
    intensity_shift=0,
)


def scan(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Levels and classes, random but in blocks, of a scan in a box of 16 slices."""
    rng = np.random.default_rng(seed)
    levels = np.zeros((16, *DATA.working_size), np.uint16)
    levels[:DEPTH] = rng.integers(1, 65536, SHAPE)
    classes = np.zeros(levels.shape, np.uint8)
    blocks = rng.integers(0, len(IDS), (5, 6, 8))
    classes[:DEPTH] = blocks.repeat(3, 0).repeat(3, 1).repeat(3, 2)[:DEPTH, :16, :24]
    return levels, classes


def columns_of(change: Augmentation) -> dict[str, jax.Array]:
    named = augment.columns(jnp.asarray(change.vector()[None]))
    return {name: column[0] for name, column in named.items()}


def moved(change: Augmentation) -> tuple[np.ndarray, np.ndarray]:
    zero = jnp.zeros(3, jnp.int32)
    program = functools.partial(changes.moved, size=(16, *DATA.working_size), classes=True)
    out = jax.jit(program)(*scan(), columns_of(change), jnp.asarray(MIDDLE), zero, zero)
    levels, classes = jax.device_get(out)
    return levels, classes


def drawn(train: TrainConfig, seed: int = 0) -> Augmentation:
    return augment.draw(np.random.default_rng(seed), train, DATA, MM)


def test_a_voxels_class_is_that_of_the_nearest_as_scipy_has_it():
    train = dataclasses.replace(PAPERS, change_probability=1, flip_probability=1, elastic_mm=0)
    change, (_, classes) = drawn(train), scan()
    offsets = [np.arange(n) - m for n, m in zip(classes.shape, MIDDLE, strict=True)]
    matrix = np.reshape(change.matrix, (3, 3))
    places = np.einsum("ij,jabc->iabc", matrix, np.stack(np.meshgrid(*offsets, indexing="ij")))
    places += MIDDLE[:, None, None, None]
    expected = ndimage.map_coordinates(classes, places, order=0, mode="constant")
    sure = (np.abs(places % 1 - 0.5) > 1e-4).all(axis=0)  # coordinates are float32
    inside = (places > 0) & (places < np.asarray(classes.shape)[:, None, None, None] - 1)
    sure &= inside.all(axis=0)  # at its border SciPy takes the nearest voxel of the scan
    assert sure.mean() > 0.4
    np.testing.assert_array_equal(moved(change)[1][sure], expected[sure])


@pytest.mark.parametrize("axis", ["depth", "height", "width"])
def test_a_mirror_of_one_axis_is_exact_and_only_left_and_right_are_exchanged(axis: Any):
    train = TrainConfig(
        mirror_axes=(axis,), flip_probability=1, intensity_scale=0, intensity_shift=0
    )
    levels, classes = scan()
    batch = {
        "tiles": levels[None, None],
        "classes": classes[None, None],
        "origins": np.zeros((1, 1, 3), np.int32),
        "intensity": np.array([[0.1, 0.5, 0.2]], np.float32),
        "depth": np.array([DEPTH], np.int32),
        "augmentation": drawn(train).vector()[None],
    }
    data = dataclasses.replace(DATA, tile=(16, 16, 24))
    found = decoding.decode(batch, Reads("drawn", classes=True), data, train)
    back = tuple(
        slice(None, None, -1 if name == axis else 1) for name in ("depth", "height", "width")
    )
    np.testing.assert_array_equal(
        np.rint(np.asarray(found["tiles"][0, 0, :DEPTH]) * 65535), levels[:DEPTH][back]
    )
    sides = {"left_lung": "right_lung", "right_lung": "left_lung"} if axis == "width" else {}
    names = np.array([IDS[sides.get(name, name)] for name in IDS])
    np.testing.assert_array_equal(found["classes"][0, 0, :DEPTH], names[classes[:DEPTH]][back])


def miscnns(z: np.ndarray, contrast: float, brightness: float, gamma: float) -> np.ndarray:
    """Contrast, brightness and gamma of z-scores, as batchgenerators has them for MIScnn."""
    mean, low, high = z.mean(), z.min(), z.max()
    z = ((z - mean) * contrast + mean).clip(low, high) * brightness
    low, extent, mean, deviation = z.min(), np.ptp(z), z.mean(), z.std()
    z = ((z - low) / extent) ** gamma * extent + low
    return (z - z.mean()) / z.std() * deviation + mean


@pytest.mark.parametrize("factors", [(0.4, 1.0, 1.0), (2.0, 0.6, 1.0), (1.5, 1.8, 0.7)])
def test_contrast_brightness_and_gamma_are_of_z_scores(factors: tuple[float, float, float]):
    intensity = np.array([0.2, 0.55, 0.17], np.float32)
    values = np.random.default_rng(0).uniform(0.2, 1, (2, 6, 7, 8)).astype(np.float32)
    contrast, brightness, gamma = factors
    change = Augmentation(contrast=contrast, brightness=brightness, gamma=gamma)
    found = changes.recoloured(
        jnp.asarray(values),
        columns_of(change),
        jnp.asarray(intensity),
        dataclasses.replace(PAPERS, noise=0),
    )
    for ours, tile in zip(np.asarray(found), values, strict=True):
        z = (tile.astype(float) - intensity[1]) / intensity[2]
        expected = miscnns(z, *factors)
        np.testing.assert_allclose((ours - intensity[1]) / intensity[2], expected, atol=2e-5)


def test_what_lies_beyond_a_scan_is_its_minimum_and_noise_is_of_z_scores():
    values = np.full((1, 20, 20, 20), 0.5, np.float32)
    values[0, 15:] = 0
    intensity = jnp.asarray([0.25, 0.5, 0.2], jnp.float32)
    still = changes.recoloured(jnp.asarray(values), columns_of(Augmentation()), intensity, PAPERS)
    np.testing.assert_allclose(still, np.where(values > 0, 0.5, 0.25), atol=1e-6)
    change = columns_of(Augmentation(noise=0.3, seed=5))
    noise = np.asarray(changes.recoloured(jnp.asarray(values), change, intensity, PAPERS) - still)
    assert noise.std() / 0.2 == pytest.approx(0.3, rel=0.05)
    assert abs(noise.mean()) < 0.003


def test_each_happens_with_its_probability_and_factors_lie_as_often_below_1_as_above():
    rng = np.random.default_rng(0)
    rows: list[Any] = [augment.draw(rng, PAPERS, DATA, MM) for _ in range(2000)]
    matrices = np.array([np.reshape(row.matrix, (3, 3)) for row in rows])
    happened = {
        "brightness": np.mean([row.brightness != 1 for row in rows]),
        "contrast": np.mean([row.contrast != 1 for row in rows]),
        "gamma": np.mean([row.gamma != 1 for row in rows]),
        "noise": np.mean([row.noise > 0 for row in rows]),
        "elastic": np.mean([row.displacement[0] > 0 for row in rows]),
        "left and right": np.mean([row.flip for row in rows]),
        "depth": np.mean(matrices[:, 0, 0] < 0),
        "height": np.mean(matrices[:, 1, 1] < 0),
        "turn": np.mean(np.abs(matrices[:, 1, 2]) + np.abs(matrices[:, 0, 1]) > 1e-9),
    }
    expected = dict.fromkeys(happened, 0.15) | {"turn": 1 - 0.85**2}
    for name, share in happened.items():
        assert share == pytest.approx(expected[name], abs=0.03), name
    for name, low, high in (("contrast", 0.3, 3), ("gamma", 0.5, 2)):
        values = np.array([getattr(row, name) for row in rows])
        values = values[values != 1]
        assert low <= values.min() < 1 < values.max() <= high
        assert np.mean(values < 1) == pytest.approx(0.5, abs=0.1)
    variances = np.array([row.noise**2 for row in rows if row.noise])
    assert variances.max() <= 0.1
    assert variances.mean() == pytest.approx(0.05, abs=0.006)
    brightness = np.array([row.brightness for row in rows if row.brightness != 1])
    assert brightness.mean() == pytest.approx(1.25, abs=0.08)


@pytest.mark.parametrize(
    ("name", "value"),
    [("zoom", (0.0, 1.0)), ("gamma", (1.1, 2.0)), ("contrast", (0.5, 0.9)), ("brightness", (2, 1))],
)
def test_a_range_holds_1(name: str, value: tuple[float, float]):
    with pytest.raises(ValueError, match=f"{name} is"):
        dataclasses.replace(PAPERS, **{name: value})


def test_slices_change_as_one_stack_and_stay_0_beyond_the_scan():
    levels, _ = scan()
    intensity = np.array([[0.1, 0.5, 0.2]], np.float32)
    change = Augmentation(contrast=0.6, brightness=1.3)
    batch = {
        "slices": levels[None],
        "intensity": intensity,
        "depth": np.array([DEPTH], np.int32),
        "augmentation": change.vector()[None],
    }
    reads = Reads(slices=True)
    train = dataclasses.replace(
        TrainConfig(), brightness=(0.5, 2), contrast=(0.3, 3), intensity_scale=0
    )
    found = np.asarray(decoding.decode(batch, reads, DATA, train)["slices"][0])
    values = jnp.asarray(levels, jnp.float32) / 65535
    stack = changes.recoloured(values[None], columns_of(change), jnp.asarray(intensity[0]), train)
    np.testing.assert_allclose(found[:DEPTH], stack[0, :DEPTH], atol=1e-5)
    assert (found[DEPTH:] == 0).all()
    untouched = decoding.decode(batch, reads, DATA, TrainConfig())["slices"][0]
    np.testing.assert_allclose(untouched, values, atol=1e-6)
