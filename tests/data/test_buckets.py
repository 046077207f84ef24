"""Depth buckets: the fewest padded slices, and an order whose batches are of one depth each."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from deepsc_jax.config import DataConfig
from deepsc_jax.data import buckets, occupancy
from deepsc_jax.data.buckets import Bucket, TrainingOrder
from deepsc_jax.geometry.sampling import tile_corners

DATA = DataConfig(working_size=(64, 64), tile=(8, 32, 32), depth_bucket=8)
THREE = (Bucket(16, 4, (0, 3, 5)), Bucket(24, 6, (1,)), Bucket(40, 8, (2, 4, 6, 7)))


def padded(depths: list[int], chosen: tuple[int, ...]) -> int:
    return sum(min(c for c in chosen if c >= depth) for depth in depths)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("least", [1, 2, 4])
def test_buckets_pad_the_fewest_slices_that_so_many_can(count: int, least: int):
    rng = np.random.default_rng(count)
    depths = rng.integers(1, 60, size=9).tolist()
    data = dataclasses.replace(DATA, depth_buckets=count)
    found = buckets.depths(depths, data, least)
    steps = sorted({data.bucket(depth) for depth in depths})
    allowed = []
    for size in range(1, count + 1):
        for lower in itertools.combinations(steps[:-1], size - 1):
            chosen = (*lower, steps[-1])
            bounds = zip((0, *chosen), chosen, strict=False)
            if all(sum(a < d <= b for d in depths) >= least for a, b in bounds):
                allowed.append(chosen)
    assert found in allowed
    assert padded(depths, found) == min(padded(depths, chosen) for chosen in allowed)


def test_fewer_scans_than_a_batch_are_one_bucket():
    assert buckets.depths([3, 9, 30], DATA, least=4) == (32,)


def test_every_batch_is_of_one_bucket_and_every_scan_is_seen_equally_often():
    order, batch = TrainingOrder(THREE, seed=3, batch=4), 4
    owner = {case: i for i, bucket in enumerate(THREE) for case in bucket.members}
    turn = [order[g] for g in range(8 * batch)]  # of 8 scans
    batches = [turn[i : i + batch] for i in range(0, len(turn), batch)]
    owners = [{owner[case] for case in cases} for cases in batches]
    assert {len(found) for found in owners} == {1}
    assert collections.Counter(turn) == dict.fromkeys(range(8), batch)
    # Evenly spread: of the first n batches a bucket has its share, but for one.
    for n in range(1, 9):
        for i, bucket in enumerate(THREE):
            seen = sum(found == {i} for found in owners[:n])
            assert abs(seen - n * len(bucket.members) / 8) <= 1


def test_scans_of_a_bucket_come_in_epochs_each_shuffled_anew():
    members = tuple(range(10, 17))
    order = TrainingOrder([Bucket(8, 4, members)], seed=1, batch=2)
    epochs = [tuple(order[g] for g in range(7 * e, 7 * e + 7)) for e in range(4)]
    assert {tuple(sorted(epoch)) for epoch in epochs} == {members}
    assert len(set(epochs)) == 4


def test_the_order_depends_on_the_seed_alone():
    def first(seed: int) -> list[int]:
        return [TrainingOrder(THREE, seed, 2)[g] for g in range(64)]

    assert first(5) == first(5)
    assert first(5) != first(6)


def test_an_evaluation_has_every_case_once_and_fills_up_each_bucket():
    found = buckets.evaluation_order(THREE, 2)
    assert [case for case, valid in found if valid] == [0, 3, 5, 1, 2, 4, 6, 7]
    assert found[3] == (5, False)
    assert found[5] == (1, False)
    assert len(found) == 10


def test_tiles_of_multiples_of_a_block_are_told_exactly():
    rng = np.random.default_rng(0)
    for shape in [(20, 64, 64), (8, 70, 33), (1, 5, 6)]:
        lung = rng.random(shape) < 0.00005
        lung[-1, -1, 0] = True
        packed = occupancy.pack(lung)
        tile = (8, 32, 64)
        corners = tile_corners((24, 96, 128), tile)
        expected = [
            lung[z : z + tile[0], y : y + tile[1], x : x + tile[2]].any() for z, y, x in corners
        ]
        np.testing.assert_array_equal(occupancy.occupied(packed, shape, corners, tile), expected)


def test_no_tile_of_another_size_that_holds_lung_is_missed():
    lung = np.random.default_rng(1).random((20, 64, 64)) < 0.001
    corners = tile_corners((24, 70, 70), (4, 10, 14))
    found = occupancy.occupied(occupancy.pack(lung), lung.shape, corners, (4, 10, 14))
    for holds, (z, y, x) in zip(found, corners, strict=True):
        assert holds or not lung[z : z + 4, y : y + 10, x : x + 14].any()
