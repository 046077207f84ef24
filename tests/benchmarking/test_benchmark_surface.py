"""The work of surface measures: ours and surface-distance's are of the same masks and agree."""

import dataclasses
import pathlib

import pytest

from deepsc_jax.benchmarking import jobs, peers, works
from deepsc_jax.benchmarking.jobs import Job
from deepsc_jax.config import Config
from deepsc_jax.data.batch import Reads
from deepsc_jax.models.deepsc.config import Options


def test_both_sides_find_the_same(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("surface_distance")
    size = (32, 64, 64)
    job = Job("surface", Config(Options()), size, "joint", Reads(), "ours", "", tmp_path)
    beside = dataclasses.replace(job, side="surface_distance", variant="numpy")
    ours, theirs = (module.build(each) for module, each in ((works, job), (peers, beside)))
    found = ours.summary(ours.run())
    assert found == pytest.approx(theirs.summary(theirs.run()), rel=1e-6)
    assert 0 < found["NSD 1"] < found["NSD 5"] <= 1
    assert works.count_flops(job) == {}
    assert jobs.counts(job) == (1, 0)


def test_masks_are_a_scans_lesions_and_a_prediction_that_is_off() -> None:
    pred, truth = jobs.draw_masks((40, 80, 80))
    assert truth.shape == (40, 80, 80)
    assert 0.01 < truth.mean() < 0.4
    overlap = 2 * (pred & truth).sum() / (pred.sum() + truth.sum())
    assert 0.5 < overlap < 0.99
