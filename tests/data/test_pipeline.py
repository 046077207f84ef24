"""Batches: what they hold, that they repeat bit for bit, and how processes share them."""

import dataclasses
import itertools

import numpy as np
import pytest
from batches import (
    AUGMENTED,
    CONFIG,
    FLIPPED,
    HEIGHT,
    PLAIN,
    STAGES,
    TILE,
    WIDTH,
    as_seen,
    crop,
    scan_of,
    sent,
    take,
)

from deepsc_jax.config import Config, DataConfig
from deepsc_jax.data import pipeline, store, writing
from deepsc_jax.data.datasets import Case
from deepsc_jax.data.preprocess import Prepared, WorkingGrid
from deepsc_jax.geometry.sampling import cut_tiles, slice_indices
from deepsc_jax.models.deepsc.config import Options
from deepsc_jax.runtime.errors import InputError


def test_every_stage_has_the_agreed_arrays(opened):
    names = {"depth", "label"}
    tiles = {"tiles", "lesions", "origins"}
    expected = {
        "segmentation": (names | tiles, (2, 5)),
        "classification": (names | {"slices"}, None),
        "joint": (names | tiles | {"slices"}, None),
    }
    for stage in STAGES:
        (batch,) = take(opened, 1, stage)
        wanted, leading = expected[stage]
        assert batch.keys() == wanted
        assert (batch["depth"].shape, batch["depth"].dtype) == ((2,), np.int32)
        assert (batch["label"].shape, batch["label"].dtype) == ((2,), np.int32)
        if leading:
            assert (batch["tiles"].shape, batch["tiles"].dtype) == ((*leading, *TILE), np.float32)
            assert (batch["lesions"].shape, batch["lesions"].dtype) == (
                (*leading, *TILE),
                np.float32,
            )
            assert (batch["origins"].shape, batch["origins"].dtype) == ((*leading, 3), np.int32)
        if "slices" in wanted:
            assert batch["slices"].shape == (2, 12, HEIGHT, WIDTH)
            assert batch["slices"].dtype == np.float32


@pytest.mark.parametrize("stage", ["segmentation", "joint"])
@pytest.mark.parametrize("config", [CONFIG, FLIPPED], ids=["as it is", "flipped"])
def test_tiles_and_slices_are_crops_at_their_origins(opened, stage, config):
    for batch in take(opened, 6, stage, config):
        for row in range(2):
            _, volume, lesion = scan_of(opened, batch, row)
            if config is FLIPPED:
                volume, lesion = volume[..., ::-1], lesion[..., ::-1]
            for k, origin in enumerate(batch["origins"][row]):
                np.testing.assert_array_equal(batch["tiles"][row, k], crop(volume, origin))
                np.testing.assert_array_equal(batch["lesions"][row, k], crop(lesion, origin))
            if stage == "joint":
                chosen = [i * batch["depth"][row] // 12 for i in range(12)]
                np.testing.assert_array_equal(batch["slices"][row], volume[chosen])


def test_random_tiles_keep_to_the_scan_and_to_the_grid_of_8(opened):
    origins, depths = [], []
    for batch in take(opened, 40, "segmentation"):
        origins.append(batch["origins"])
        depths.append(batch["depth"])
    origins, depths = np.concatenate(origins), np.concatenate(depths)
    assert (origins[..., 0] <= np.maximum(depths - TILE[0], 0)[:, None]).all()
    # Both ends are reached: 21 - 8 = 13 slices, 32 - 16 and 48 - 24 voxels.
    assert set(origins[depths == 21][..., 0].ravel()) >= {0, 1, 7, 13}
    assert set(origins[..., 1].ravel()) == {0, 8, 16}
    assert set(origins[..., 2].ravel()) == {0, 8, 16, 24}


@pytest.mark.parametrize("config", [CONFIG, FLIPPED], ids=["as it is", "flipped"])
def test_the_asked_share_of_tiles_holds_lesion_where_there_is_any(opened, config):
    for share in (1.0, 0.5, 0.0):
        train = dataclasses.replace(config.train, foreground=share)
        batches = take(opened, 20, "segmentation", dataclasses.replace(config, train=train))
        has_lesion = np.concatenate([b["label"] != 2 for b in batches])
        holds = np.concatenate([b["lesions"].any(axis=(2, 3, 4)) for b in batches])[has_lesion]
        assert (holds.sum(1) >= int(share * 5)).all()
        if share == 0.0:  # 2 x 2 voxels near a corner: few random tiles see them
            assert holds.mean() < 0.5


def test_centred_tiles_have_their_voxel_in_the_middle(opened):
    # The lesion of case a is at slice 10, rows 3-4, columns 40-41; tiles are 8 x 16 x 24.
    train = dataclasses.replace(PLAIN, foreground=1.0)
    for batch in take(opened, 10, "segmentation", dataclasses.replace(CONFIG, train=train)):
        for origins in batch["origins"][batch["depth"] == 21]:
            # 10 - 4; 3 - 8 clipped to 0; 40 - 12 and 41 - 12 to the nearest multiple of 8, at most
            # 48 - 24.
            np.testing.assert_array_equal(origins, [[6, 0, 24]] * 5)


def test_all_tiles_of_a_scan_reassemble_to_it_in_an_order_drawn_anew(opened):
    orders = set()
    for batch in take(opened, 4, "joint"):
        for row in range(2):
            _, volume, _ = scan_of(opened, batch, row)
            rebuilt = np.zeros((32, HEIGHT, WIDTH), np.float32)  # past its end none
            for tile, origin in zip(batch["tiles"][row], batch["origins"][row], strict=True):
                assert (origin % TILE == 0).all()
                crop(rebuilt, origin)[...] = tile
            np.testing.assert_array_equal(rebuilt, volume[:32])
            assert not rebuilt[batch["depth"][row] :].any()
            orders.add(batch["origins"][row].tobytes())
    assert len(orders) == 8


@pytest.mark.parametrize("config", [CONFIG, FLIPPED], ids=["as it is", "flipped"])
def test_tiles_without_lung_are_left_out_and_no_other(tmp_path, config):
    """Scans with lung in one half only; the batch has as many tiles as hold lung in one of them."""
    records = []
    for seed, (depth, left) in enumerate([(16, 40), (15, 20), (14, 10)]):
        lung = np.zeros((depth, HEIGHT, WIDTH), bool)
        lung[:, 20:30, left : left + 6] = True
        rng = np.random.default_rng(seed)
        volume = rng.uniform(0.1, 0.9, lung.shape).astype(np.float32) * lung
        grid = WorkingGrid(lung.shape, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), lung.shape)
        case = Case(str(seed), str(seed), "train", 2, tmp_path / "scan.nii.gz")
        prepared = Prepared(volume, lung, np.zeros_like(lung), grid)
        records.append(writing.write_case(tmp_path, case, prepared))
    store.write_index(tmp_path, CONFIG.data, records, tmp_path)
    opened = store.Store(tmp_path)
    for batch in take(opened, 3, "joint", config, batch_size=3):
        # 20..26 lies in both halves of 24 columns, 20..30 in one of 16 rows: of 2 x 2 x 2 tiles, 4.
        assert batch["tiles"].shape == (3, 4, *TILE)
        for row in range(3):
            _, volume, _ = scan_of(opened, batch, row)
            if config is FLIPPED:
                volume = volume[..., ::-1]
            rebuilt = np.zeros_like(volume)
            for tile, origin in zip(batch["tiles"][row], batch["origins"][row], strict=True):
                crop(rebuilt, origin)[...] = tile
            np.testing.assert_array_equal(rebuilt, volume)


def test_slices_repeat_where_the_scan_has_fewer(opened):
    np.testing.assert_array_equal(slice_indices(5, 12), [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4])
    np.testing.assert_array_equal(slice_indices(7, 3), [0, 2, 4])
    for batch in take(opened, 4, "classification"):
        for row in range(2):
            _, volume, _ = scan_of(opened, batch, row)
            chosen = slice_indices(int(batch["depth"][row]), 12)
            np.testing.assert_array_equal(batch["slices"][row], volume[chosen])


def test_a_scan_travels_once_as_it_is_stored(opened):
    travels = {
        "segmentation": {"tiles": np.uint16, "lesions": np.uint8, "origins": np.int32},
        "classification": {"slices": np.uint16},
        "joint": {"volume": np.uint16, "lesion": np.uint8, "origins": np.int32},
    }
    facts = {"depth": np.int32, "label": np.int32, "augmentation": np.float32}
    for stage, expected in travels.items():
        (batch,) = sent(opened, 1, stage)
        assert {name: x.dtype.type for name, x in batch.items()} == expected | facts
    depth = CONFIG.data.bucket(batch["depth"].max())
    assert batch["volume"].shape == (2, depth // 8, 8, HEIGHT, WIDTH)


def test_intensities_change_alike_in_tiles_and_slices_and_zero_stays_zero(opened):
    changed = 0
    for batch in take(opened, 6, "joint", AUGMENTED):
        for row in range(2):
            _, volume, _ = scan_of(opened, batch, row)
            rebuilt = np.zeros((32, HEIGHT, WIDTH), np.float32)
            for tile, origin in zip(batch["tiles"][row], batch["origins"][row], strict=True):
                crop(rebuilt, origin)[...] = tile
            chosen = slice_indices(int(batch["depth"][row]), 12)
            np.testing.assert_array_equal(batch["slices"][row], rebuilt[chosen])
            candidates = [
                v for v in (volume[:32], volume[:32, :, ::-1]) if ((v == 0) == (rebuilt == 0)).all()
            ]
            (source,) = candidates
            inside = (source > 0) & (rebuilt < 1)
            slope, offset = np.polyfit(source[inside], rebuilt[inside], 1)
            assert abs(slope - 1) <= 0.2 + 1e-4
            assert abs(offset) <= 0.02 + 1e-4
            changed += abs(slope - 1) > 1e-3
    assert changed > 6


READ = {"segmentation": (True, False), "classification": (False, True), "joint": (True, True)}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_has_each_case_once_in_order_and_fills_up(opened, stage, processes):
    parts = [
        list(
            pipeline.batches(
                opened,
                "test",
                STAGES[stage],
                AUGMENTED,
                seed=0,
                batch_size=2,
                train=False,
                process_index=p,
                process_count=processes,
            )
        )
        for p in range(processes)
    ]
    assert {len(batches) for batches in parts} == {3 if processes == 1 else 2}
    cases = opened.cases("test")
    seen = []
    for batch in (as_seen(batch, stage) for batch in itertools.chain(*parts)):
        assert ("tiles" in batch, "slices" in batch) == READ[stage]
        for row in range(2):
            case = cases[batch["case"][row]]
            assert (batch["depth"][row], batch["label"][row]) == (case.depth, case.label)
            padded = opened.read(case.name, "volume", (0, 0, 0), (16, HEIGHT, WIDTH))
            if "tiles" in batch:
                assert batch["tiles"].shape == (2, 2 * 2 * 2, *TILE)
                np.testing.assert_array_equal(batch["tiles"][row], cut_tiles(padded, TILE))
            if "slices" in batch:
                chosen = slice_indices(case.depth, 12)
                np.testing.assert_array_equal(batch["slices"][row], padded[chosen])
            if batch["valid"][row]:
                seen.append(int(batch["case"][row]))
            else:
                assert batch["case"][row] == 4
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert processes > 1 or seen == [0, 1, 2, 3, 4]


def test_the_segmentation_stage_never_reads_whole_scans_nor_slices(opened, monkeypatch):
    sizes = []

    def read_boxes(self, case, array, starts, size):
        sizes.append(size)
        return unwatched(self, case, array, starts, size)

    def refuse(*_, **__):
        raise AssertionError("slices were read")

    unwatched = store.Store.read_boxes
    monkeypatch.setattr(store.Store, "read_boxes", read_boxes)
    monkeypatch.setattr(store.Store, "read_slices", refuse)
    sent(opened, 2, "segmentation")
    assert set(sizes) == {TILE}


def test_refuses_a_store_of_other_preprocessing_and_an_empty_split(opened):
    other = DataConfig(working_size=(HEIGHT, WIDTH), tile=TILE, depth_bucket=16, intensity="unit")
    with pytest.raises(InputError, match="--intensity=unit"):
        take(opened, 1, "joint", Config(model=Options(), data=other))
    with pytest.raises(InputError, match="split validation has no case, at least 1 expected"):
        pipeline.batches(opened, "validation", STAGES["joint"], CONFIG, seed=0, batch_size=1)
