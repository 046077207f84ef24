"""From what travels to what a system sees: exact, and the same whatever the devices."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from deepsc_jax.config import DataConfig, TrainConfig
from deepsc_jax.data import augment
from deepsc_jax.data.batch import DEPTH_AXES, Batch, Reads
from deepsc_jax.geometry.sampling import cut_tiles, tile_corners
from deepsc_jax.runtime import device_mesh
from deepsc_jax.systems import changes, decoding

DATA = DataConfig(working_size=(8, 12), tile=(4, 4, 6), slices=5, depth_bucket=4)
WHOLE = DataConfig(working_size=(8, 12), tile=(16, 8, 12), slices=8, depth_bucket=16)
SLABS = DataConfig(working_size=(8, 12), tile=(4, 8, 12), slices=8, depth_bucket=4)
TRAIN = TrainConfig()
BOTH = Reads("all", slices=True)


def sent(data: DataConfig, scans: int = 2, depth: int = 16) -> Batch:
    """Scans of random voxels, of which every second one is mirrored."""
    rng = np.random.default_rng(0)
    shape = (scans, depth // data.tile[0], data.tile[0], *data.working_size)
    corners = tile_corners((depth, *data.working_size), data.tile)
    drawn = [augment.Augmentation(flip=float(i % 2)).vector() for i in range(scans)]
    return {
        "volume": rng.integers(0, 65536, shape).astype(np.uint16),
        "lesion": rng.integers(0, 2, shape).astype(np.uint8),
        "origins": np.stack([rng.permutation(corners) for _ in range(scans)]),
        "depth": np.asarray([11 + i for i in range(scans)], np.int32),
        "label": np.zeros(scans, np.int32),
        "augmentation": np.stack(drawn),
    }


def test_every_level_is_the_division_correctly_rounded():
    levels = np.arange(65536, dtype=np.uint16)
    expected = np.divide(levels, np.float32(65535), dtype=np.float32)
    np.testing.assert_array_equal(jax.jit(changes.unit)(levels), expected)


@pytest.mark.parametrize("data", [DATA, WHOLE], ids=["tiles", "one tile"])
def test_tiles_and_slices_are_cut_from_the_scan(data: DataConfig):
    batch = sent(data)
    found = jax.jit(functools.partial(decoding.decode, reads=BOTH, data=data, train=TRAIN))(batch)
    assert {name: x.dtype for name, x in found.items()} == {
        **dict.fromkeys(("tiles", "lesions", "slices"), np.float32),
        **dict.fromkeys(("origins", "depth", "label"), np.int32),
    }
    for row in range(2):
        side = slice(None, None, -1 if row else 1)
        volume, lesion = (
            batch[name][row].reshape(16, 8, 12)[..., side] for name in ("volume", "lesion")
        )
        volume = np.divide(volume, np.float32(65535), dtype=np.float32)
        corners = tile_corners(volume.shape, data.tile).tolist()
        order = [corners.index(origin) for origin in batch["origins"][row].tolist()]
        np.testing.assert_array_equal(found["tiles"][row], cut_tiles(volume, data.tile)[order])
        np.testing.assert_array_equal(found["lesions"][row], cut_tiles(lesion, data.tile)[order])
        depth, slices = int(batch["depth"][row]), data.slices
        chosen = [i * depth // slices for i in range(slices)]
        np.testing.assert_array_equal(found["slices"][row], volume[chosen])


def test_what_is_as_seen_passes():
    batch = {"tiles": np.full((1, 1, 4, 4, 6), 0.3), "lesions": np.ones((1, 1, 4, 4, 6))}
    found = decoding.decode(batch, Reads("drawn"), DATA, TRAIN)
    assert found.keys() == batch.keys()
    for name, x in batch.items():
        assert found[name] is x


def test_intensities_by_hand():
    values = np.array([[0.0, 0.25, 0.5, 0.95, 0.01], [0.0, 0.25, 0.5, 0.95, 0.01]])
    levels = np.rint(values * 65535).astype(np.uint16).reshape(2, 1, 1, 5)
    drawn = [augment.Augmentation(scale=1.5, shift=-0.1), augment.Augmentation(shift=0.02)]
    batch = {"slices": levels, "augmentation": np.stack([c.vector() for c in drawn])}
    found = decoding.decode(batch, Reads(slices=True), DATA, TRAIN)["slices"].reshape(2, 5)
    # Clipped to 1 above, and inside the lungs to what is not 0 below.
    expected = [[0, 0.275, 0.65, 1, 1 / 65535], [0, 0.27, 0.52, 0.97, 0.03]]
    np.testing.assert_allclose(found, expected, atol=1.2e-5)  # half a level, scaled


@pytest.mark.parametrize(("split", "data"), [((4, 1), DATA), ((2, 2), WHOLE), ((1, 4), DATA)])
def test_devices_cut_the_same(split: tuple[int, int], data: DataConfig):
    """Also where depth is split over devices, be a tile a whole scan or not."""
    devices = np.array(jax.devices()[:4]).reshape(split)
    mesh = Mesh(devices, ("data", "space"), axis_types=(AxisType.Auto, AxisType.Auto))
    batch = sent(data, scans=4)

    def program(own: dict, shared: dict, batch: Batch) -> dict:
        del own, shared
        return decoding.decode(batch, BOTH, data, TRAIN)

    put = device_mesh.put_batch(batch, mesh, DEPTH_AXES)
    found = jax.jit(device_mesh.over_data(program, mesh, gathered=True))({}, {}, put)
    expected = jax.jit(functools.partial(decoding.decode, reads=BOTH, data=data, train=TRAIN))(
        batch
    )
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)


def test_a_scan_in_slabs_is_one_tile_where_it_is_to_be():
    batch = {name: x for name, x in sent(SLABS).items() if name != "augmentation"}
    merged, data = decoding.in_one_tile(batch, BOTH, SLABS)
    found = decoding.decode(merged, BOTH, data, TRAIN)
    assert data.tile == (16, 8, 12)
    np.testing.assert_array_equal(found["origins"], np.zeros((2, 1, 3)))
    np.testing.assert_array_equal(found["lesions"], batch["lesion"].reshape(2, 1, 16, 8, 12))
    apart = decoding.decode(batch, BOTH, SLABS, TRAIN)
    np.testing.assert_array_equal(found["slices"], apart["slices"])
    order = np.argsort(np.asarray(apart["origins"])[..., 0], axis=1)
    tiles = np.stack([x[i] for x, i in zip(np.asarray(apart["tiles"]), order, strict=True)])
    np.testing.assert_array_equal(found["tiles"], tiles.reshape(2, 1, 16, 8, 12))
    already = {name: x for name, x in sent(WHOLE).items() if name != "augmentation"}
    assert decoding.in_one_tile(already, BOTH, WHOLE) == (already, WHOLE)
