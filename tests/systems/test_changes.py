"""Augmentation on the device: against SciPy; scan, masks, tiles and slices stay aligned."""

import dataclasses
import functools
from collections.abc import Mapping
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
from deepsc_jax.geometry.sampling import cut_tiles, slice_indices, tile_corners
from deepsc_jax.systems import changes, decoding

DEPTH = 13
DATA = DataConfig(working_size=(16, 24), tile=(8, 8, 12), slices=6, depth_bucket=16)
MM = (3.0, 1.0, 1.5)
MOVING = TrainConfig(
    rotation_degrees=20,
    tilt_degrees=10,
    zoom=(0.9, 1.1),
    elastic_mm=2,
    elastic_distance_mm=12,
    change_probability=1,
    flip_probability=1,
    intensity_scale=0,
    intensity_shift=0,
)
TEXTURED = TrainConfig(
    gamma=(0.8, 1.3), noise=0.05, blur_mm=2, coarse_mm=4, lung_rim_mm=3, change_probability=1
)


def scan(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Levels and a lesion mask of (16, 16, 24), of which 13 slices are real."""
    rng = np.random.default_rng(seed)
    lung = np.zeros((16, *DATA.working_size), bool)
    lung[2:12, 2:14, 3:21] = True
    lesion = np.zeros(lung.shape, np.uint8)
    lesion[5:9, 5:10, 6:12] = 1
    return (rng.integers(1, 65536, lung.shape) * lung).astype(np.uint16), lesion


def drawn(train: TrainConfig, seed: int = 0, **keywords: Any) -> Augmentation:
    return augment.draw(np.random.default_rng(seed), train, DATA, MM, **keywords)


def columns_of(change: Augmentation) -> Mapping[str, jax.Array]:
    named = augment.columns(jnp.asarray(change.vector()[None]))
    return {name: column[0] for name, column in named.items()}


def middle() -> np.ndarray:
    return (np.asarray((DEPTH, *DATA.working_size), np.float32) - 1) / 2


@functools.cache
def moved(seed: int) -> tuple[np.ndarray, np.ndarray]:
    zero = jnp.zeros(3, jnp.int32)
    program = jax.jit(functools.partial(changes.moved, size=(16, *DATA.working_size)))
    out = program(*scan(), columns_of(drawn(MOVING, seed)), jnp.asarray(middle()), zero, zero)
    levels, lesion = jax.device_get(out)
    return levels, lesion


def test_one_resampling_moves_scan_lesions_and_lungs_as_scipy_does():
    change, (levels, lesion) = drawn(MOVING), scan()
    offsets = [np.arange(n) - m for n, m in zip(levels.shape, middle(), strict=True)]
    displaced = changes._displacement(columns_of(change), [jnp.float32(x) for x in offsets])
    assert np.abs(displaced).max() > 0.5
    places = np.einsum(
        "ij,jabc->iabc",
        np.reshape(change.matrix, (3, 3)),
        np.stack(np.meshgrid(*offsets, indexing="ij")),
    )
    places += np.asarray(displaced) + middle()[:, None, None, None]
    value, lung, ill = (
        ndimage.map_coordinates(x.astype(float), places, order=1, mode="grid-constant")
        for x in (levels / 65535, levels > 0, lesion)
    )
    expected = np.where(lung >= 0.5, np.rint(value / np.maximum(lung, 0.5) * 65535), 0)
    found_levels, found_lesion = moved(0)
    sure = np.abs(lung - 0.5) > 1e-4  # coordinates are float32
    np.testing.assert_array_equal((found_levels > 0)[sure], (lung >= 0.5)[sure])
    np.testing.assert_allclose(found_levels.astype(float)[sure], expected[sure], atol=2)
    sure = np.abs(ill - 0.5) > 1e-4
    np.testing.assert_array_equal(found_lesion[sure], (ill >= 0.5)[sure])
    assert found_lesion.any()


def test_extents_are_in_mm():
    """In mm the matrix is a rotation, though voxels are 3 by 1 by 1.5 mm."""
    train = TrainConfig(rotation_degrees=45, change_probability=1, flip_probability=0)
    for seed in range(3):
        matrix = np.reshape(drawn(train, seed).matrix, (3, 3))
        in_mm = matrix * np.asarray(MM)[:, None] / np.asarray(MM)
        np.testing.assert_allclose(in_mm @ in_mm.T, np.eye(3), atol=1e-12)
        assert 0 < abs(np.degrees(np.arcsin(in_mm[2, 1]))) <= 45
    change = drawn(dataclasses.replace(MOVING, blur_mm=3, coarse_mm=9))
    np.testing.assert_allclose(np.multiply(change.displacement, MM), [2, 2, 2])
    np.testing.assert_allclose(np.multiply(change.distance, MM), [12, 12, 12])
    assert len(set(np.multiply(change.blur, MM).round(9))) == 1


def test_a_scan_that_does_not_move_is_itself_and_a_mirror_exact():
    levels, lesion = scan()
    zero = jnp.zeros(3, jnp.int32)
    program = jax.jit(functools.partial(changes.moved, size=levels.shape))
    for mirrored, side in ((False, 1), (True, -1)):
        matrix = tuple(np.diag([1.0, 1, -1 if mirrored else 1]).ravel())
        columns = columns_of(Augmentation(matrix=matrix))
        found = program(levels, lesion, columns, jnp.asarray(middle()), zero, zero)
        np.testing.assert_array_equal(found[0], levels[..., ::side])
        np.testing.assert_array_equal(found[1], lesion[..., ::side])


@pytest.mark.parametrize("seed", range(4))
def test_a_tile_from_its_box_is_the_crop_of_the_moved_scan(seed: int):
    change, (levels, lesion) = drawn(MOVING, seed), scan()
    margin = augment.margin(MOVING, DATA.tile, [MM])
    depth, height, width = (t + 2 * m for t, m in zip(DATA.tile, margin, strict=True))
    box = (depth, height, width)
    origins = np.array([[0, 0, 0], [5, 8, 12], [2, 8, 8]], np.int32)
    starts = augment.moved_starts(origins, change, (DEPTH, *DATA.working_size), DATA.tile, box)
    padded = [np.pad(x, 60) for x in (levels, lesion)]
    boxes = [
        np.stack([x[a + 60 :, b + 60 :, c + 60 :][:depth, :height, :width] for a, b, c in starts])
        for x in padded
    ]
    batch = {
        "tiles": boxes[0][None],
        "lesions": boxes[1][None],
        "origins": origins[None],
        "starts": starts[None],
        "depth": np.array([DEPTH], np.int32),
        "augmentation": change.vector()[None],
    }
    found = DRAWN(batch)
    for k, (a, b, c) in enumerate(origins):
        whole = [x[a : a + 8, b : b + 8, c : c + 12] for x in moved(seed)]
        same = np.rint(np.asarray(found["tiles"][0, k]) * 65535)
        np.testing.assert_allclose(same, whole[0], atol=3)  # coordinates are float32
        np.testing.assert_array_equal(found["lesions"][0, k], whole[1])


DRAWN = jax.jit(functools.partial(decoding.decode, reads=Reads("drawn"), data=DATA, train=MOVING))


def test_tiles_and_slices_of_a_moved_and_textured_scan_are_aligned():
    train = dataclasses.replace(
        TEXTURED, rotation_degrees=20, zoom=(0.9, 1.1), intensity_scale=0, intensity_shift=0
    )
    levels, lesion = scan()
    corners = tile_corners(levels.shape, DATA.tile)
    batch = {
        "volume": np.stack([levels.reshape(2, 8, 16, 24)] * 2),
        "lesion": np.stack([lesion.reshape(2, 8, 16, 24)] * 2),
        "origins": np.stack([corners] * 2),
        "depth": np.full(2, DEPTH, np.int32),
        "augmentation": np.stack([drawn(train, seed).vector() for seed in (0, 1)]),
    }
    reads = Reads("all", slices=True)
    program = jax.jit(functools.partial(decoding.decode, reads=reads, data=DATA, train=train))
    found = jax.device_get(program(batch))
    again = jax.device_get(program(batch))
    for name, x in found.items():
        np.testing.assert_array_equal(x, again[name])
    for row in range(2):
        whole = np.zeros(levels.shape, np.float32)
        ill = np.zeros(levels.shape, np.float32)
        for k, (a, b, c) in enumerate(corners):
            whole[a : a + 8, b : b + 8, c : c + 12] = found["tiles"][row, k]
            ill[a : a + 8, b : b + 8, c : c + 12] = found["lesions"][row, k]
        chosen = slice_indices(DEPTH, DATA.slices)
        np.testing.assert_array_equal(found["slices"][row], whole[chosen])
        assert ill.any()
        assert not (ill.astype(bool) & (whole == 0)).any()
        np.testing.assert_array_equal(cut_tiles(whole, DATA.tile), found["tiles"][row])


def textured(change: Augmentation, train: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    levels, lesion = scan()
    program = jax.jit(functools.partial(changes.textured, train=train))
    out, ill = program(levels, lesion, columns_of(change), number=jnp.int32(0))
    return np.asarray(out), np.asarray(ill)


def test_gamma_noise_and_what_lies_outside():
    levels, _ = scan()
    found, _ = textured(Augmentation(gamma=1.2), TrainConfig(gamma=(0.8, 1.3)))
    expected = np.rint((levels / 65535) ** 1.2 * 65535)
    np.testing.assert_allclose(found.astype(float), np.where(levels, expected.clip(1), 0), atol=1)
    found, _ = textured(Augmentation(noise=0.05, seed=3), TrainConfig(noise=0.1))
    np.testing.assert_array_equal(found > 0, levels > 0)
    inner = (levels > 65535 * 0.3) & (levels < 65535 * 0.7)
    assert (found.astype(float) - levels)[inner].std() / 65535 == pytest.approx(0.05, rel=0.1)


def test_a_blur_is_scipys_inside_the_lungs():
    levels, _ = scan()
    sigma = (0.5, 1.0, 0.8)
    found, _ = textured(Augmentation(blur=sigma), TrainConfig(blur_mm=1))
    values, shares = (
        ndimage.gaussian_filter(x.astype(float), sigma, mode="constant", radius=4)
        for x in (levels / 65535, levels > 0)
    )
    expected = np.where(levels > 0, values / np.maximum(shares, 1e-6) * 65535, 0)
    np.testing.assert_allclose(found.astype(float), expected, atol=2)


def test_a_lower_resolution_is_linear_between_the_voxels_that_are_left():
    levels, _ = scan()
    found, _ = textured(Augmentation(coarse=(1.0, 1.0, 3.0)), TrainConfig(coarse_mm=1))
    row, result = levels[5, 5].astype(float), found[5, 5].astype(float)
    assert (row[3:21] > 0).all()
    np.testing.assert_allclose(result[6:16:3], row[6:16:3], atol=1)
    np.testing.assert_allclose(result[7], (2 * row[6] + row[9]) / 3, atol=1)


@pytest.mark.parametrize("rim", [2.1, -2.1])
def test_the_lung_mask_grows_and_shrinks_by_mm(rim: float):
    levels, lesion = scan()
    lung = levels > 0
    found, ill = textured(Augmentation(rim=rim, tissue=0.8, spacing=MM), TrainConfig(lung_rim_mm=3))
    padded = np.pad(lung, 5, constant_values=rim < 0)  # nothing is known beyond the scan
    inner = (slice(5, -5),) * 3
    whole: Any = ndimage.distance_transform_edt(padded == (rim < 0), sampling=MM)
    distance = whole[inner]
    expected = distance <= rim if rim > 0 else lung & (distance > -rim)
    np.testing.assert_array_equal(found > 0, expected)
    np.testing.assert_array_equal(found[expected & ~lung], round(0.8 * 65535))
    np.testing.assert_array_equal(found[expected & lung], levels[expected & lung])
    np.testing.assert_array_equal(ill, lesion * expected)


def test_slices_alone_stay_in_their_planes():
    matrix = np.reshape(drawn(MOVING, flat=True).matrix, (3, 3))
    np.testing.assert_array_equal(matrix[0], [1, 0, 0])
    np.testing.assert_array_equal(matrix[:, 0], [1, 0, 0])
    assert drawn(MOVING, flat=True).displacement[0] == 0
    assert matrix[1, 2] != 0
