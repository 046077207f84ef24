"""The order of batches: it repeats bit for bit, and processes share it."""

import dataclasses
import json

import numpy as np
import pytest
from batches import AUGMENTED, HEIGHT, STAGES, WIDTH, assert_same, sent, take

from deepsc_jax.data import pipeline, store


def test_a_batch_is_of_one_bucket_in_all_processes(opened):
    whole = sent(opened, 8, "joint", batch_size=2)
    shapes = [batch["volume"].shape[1:] for batch in whole]
    assert set(shapes) == {(2, 8, HEIGHT, WIDTH), (4, 8, HEIGHT, WIDTH)}
    for p in range(2):
        part = sent(opened, 8, "joint", batch_size=1, process_index=p, process_count=2)
        assert [batch["volume"].shape[1:] for batch in part] == shapes


def test_a_resumed_run_may_have_another_number_of_processes(opened):
    def reading(p, processes):
        return iter(
            pipeline.batches(
                opened,
                "train",
                STAGES["joint"],
                AUGMENTED,
                seed=7,
                batch_size=4 // processes,
                process_index=p,
                process_count=processes,
            )
        )

    alone = reading(0, 1)
    for _ in range(3):
        next(alone)
    state, expected = alone.get_state(), next(alone)
    for p in range(2):
        share = reading(p, 2)
        share.set_state(state)
        assert_same(next(share), {name: array[p::2] for name, array in expected.items()})


def test_the_order_of_tiles_ignores_truth_and_label(opened):
    order = [batch["origins"] for batch in take(opened, 3, "joint")]
    renamed = [dataclasses.replace(c, label=2, lesion_voxels=0) for c in opened.cases()]
    other = store.Store(opened.path)
    other._cases = renamed
    for expected, batch in zip(order, take(other, 3, "joint"), strict=True):
        np.testing.assert_array_equal(batch["origins"], expected)


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_seed_gives_the_same_batches_and_another_seed_others(opened, stage):
    once, again = sent(opened, 4, stage, AUGMENTED), sent(opened, 4, stage, AUGMENTED)
    for left, right in zip(once, again, strict=True):
        assert_same(left, right)
    other = sent(opened, 4, stage, AUGMENTED, seed=8)
    main = {"segmentation": "tiles", "classification": "slices", "joint": "origins"}[stage]
    assert not np.array_equal(once[0][main], other[0][main])


@pytest.mark.parametrize("stage", STAGES)
def test_resumes_bit_for_bit_from_a_saved_state(opened, stage):
    reads = STAGES[stage]
    batches = pipeline.batches(opened, "train", reads, AUGMENTED, seed=7, batch_size=2)
    iterator = iter(batches)
    for _ in range(3):
        next(iterator)
    state = json.dumps(iterator.get_state())
    expected = [next(iterator) for _ in range(4)]
    fresh = iter(pipeline.batches(opened, "train", reads, AUGMENTED, seed=7, batch_size=2))
    fresh.set_state(json.loads(state))
    for batch in expected:
        assert_same(next(fresh), batch)


def test_threads_do_not_change_the_batches(opened):
    none = sent(opened, 4, "joint", AUGMENTED, read_threads=0)
    for threads in (1, 4):
        many = sent(opened, 4, "joint", AUGMENTED, read_threads=threads)
        for left, right in zip(none, many, strict=True):
            assert_same(left, right)


def test_processes_share_the_global_batch_of_one(opened):
    whole = sent(opened, 3, "joint", AUGMENTED, batch_size=4)
    shares = [
        sent(opened, 3, "joint", AUGMENTED, batch_size=2, process_index=p, process_count=2)
        for p in range(2)
    ]
    for step in range(3):
        for p in range(2):
            part = {name: array[p::2] for name, array in whole[step].items()}
            assert_same(shares[p][step], part)


def test_an_epoch_of_all_processes_has_every_case_once(opened):
    # 4 cases learn lesions: case e has a class with lesions but no mask.
    epoch = [
        depth
        for p in range(2)
        for batch in sent(opened, 2, "joint", batch_size=1, process_index=p, process_count=2)
        for depth in batch["depth"]
    ]
    assert sorted(epoch) == [5, 16, 17, 21]
    with_all = np.concatenate([b["depth"] for b in sent(opened, 5, "classification", batch_size=1)])
    assert sorted(with_all) == [5, 16, 17, 21, 30]


# Of an evaluation's batch: whether it has tiles, and whether it has slices.
