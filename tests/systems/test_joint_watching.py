"""What DeepSC-COVID has watched; its network is not run."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import smallest

from deepsc_jax.config import Config, DataConfig
from deepsc_jax.models.deepsc import losses
from deepsc_jax.systems.building import build
from deepsc_jax.systems.joint import Joint

DATA = DataConfig(working_size=(16, 16), tile=(8, 16, 16), depth_bucket=8, slices=8)
# Weights that differ from one another and from 1.
MODEL = dataclasses.replace(
    smallest.MODEL,
    segmentation_weight=0.5,
    classification_weight=3.0,
    task_aware_weight=7.0,
    dice_weight=2.0,
    focal_weight=5.0,
    lesion_free_weight=0.3,
    scale_supervision=0.7,
)
SYSTEM = build(Config(MODEL, DATA), "cpu")
NAN = np.nan


def batch() -> dict[str, Any]:
    """Two scans of a tile each, of which the second has no lesion; the fourth slice is a lesion."""
    rng = np.random.default_rng(0)
    lesions = np.zeros((2, 1, 8, 16, 16), np.float32)
    lesions[0, 0, 3, 4:6, 4:6] = 1
    return {
        "tiles": jnp.asarray(rng.uniform(0.1, 1, lesions.shape), jnp.float32),
        "lesions": jnp.asarray(lesions),
        "origins": jnp.zeros((2, 1, 3), jnp.int32),
        "slices": jnp.asarray(rng.uniform(0.1, 1, (2, 8, 16, 16)), jnp.float32),
        "depth": jnp.asarray([8, 8]),
        "label": jnp.asarray([0, 2]),
        "voxel_ml": jnp.asarray([0.5, 0.5]),
    }


def outputs() -> dict[str, Any]:
    rng = np.random.default_rng(1)

    def drawn(*shape: int) -> Any:
        return jnp.asarray(rng.uniform(0.01, 0.99, shape), jnp.float32)

    sizes = [(1, 2, 2), (2, 4, 4), (4, 8, 8), (8, 16, 16)]
    maps = [(8, 8, 8), (8, 4, 4), (8, 2, 2)]
    return {
        "lesion": drawn(2, 1, 8, 16, 16, 1),
        "scales": tuple(drawn(2, 1, *size, 1) for size in sizes),
        "logits": jnp.asarray([[2.0, 1, 0], [0, 1, 2]]),
        "maps": tuple(drawn(2, *size, 4) for size in maps),
        "weights": tuple(drawn(4, 3) for _ in maps),
        "lungs": tuple(jnp.ones((2, *size, 1), bool) for size in maps),
    }


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(stage, id=stage.name, marks=pytest.mark.slow if stage.after else ())
        for stage in SYSTEM.stages
    ],
)
def test_what_the_terms_add_to_the_loss_is_the_loss(stage: Any) -> None:
    terms = losses.scan_losses(MODEL, DATA, stage.name, outputs(), batch(), jnp.ones(3))
    weighted = SYSTEM.weighted(stage, terms)
    assert weighted.keys() == terms.keys() - {"loss"}
    # Of sums in another order, in float32.
    np.testing.assert_allclose(sum(weighted.values()), terms["loss"], rtol=1e-5)


def watched(name: str, monkeypatch: pytest.MonkeyPatch, out: dict[str, Any]) -> dict[str, Any]:
    monkeypatch.setattr(Joint, "outputs", lambda *_: out)
    return SYSTEM.watched(SYSTEM.stage(name), {}, batch())


def test_the_highest_of_each_scale_inside_lesions(monkeypatch: pytest.MonkeyPatch) -> None:
    out = outputs()
    found = watched("segmentation", monkeypatch, out)
    first, *_, last = out["scales"]
    # The lesion lies in one voxel of S_1 (3 // 8, 4 // 8, 4 // 8), and in four of S_4.
    np.testing.assert_array_equal(found["scale_1_max"], [first[0, 0, 0, 0, 0, 0], NAN])
    np.testing.assert_array_equal(found["scale_4_max"], [last[0, 0, 3, 4:6, 4:6].max(), NAN])
    marked = (out["lesion"][1] >= 0.5).sum()
    np.testing.assert_array_equal(found["lesion_free_ml"], [NAN, marked * 0.5])


def test_the_joint_stage_shows_scan_truth_s_and_m_of_one_slice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, of = outputs(), batch()
    found = watched("joint", monkeypatch, out)
    pictures = {name: x for name, x in found.items() if x.ndim == 3}
    names = ["scan", "truth", "lesion", "evidence_1", "evidence_2", "evidence_3"]
    assert list(pictures) == names
    np.testing.assert_array_equal(pictures["scan"][0], of["tiles"][0, 0, 3])
    np.testing.assert_array_equal(pictures["truth"][0], of["lesions"][0, 0, 3])
    np.testing.assert_array_equal(pictures["lesion"][0], out["lesion"][0, 0, 3, ..., 0])
    np.testing.assert_array_equal(pictures["scan"][1], of["tiles"][1, 0, 4])  # the middle one
    masks = SYSTEM.model.evidence(out, jnp.asarray([0, 2]))
    np.testing.assert_array_equal(pictures["evidence_1"][0], masks[0][0, 3])
    assert pictures["evidence_3"].shape == (2, 2, 2)


def test_the_classification_stage_shows_a_sampled_slice_and_no_lesion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = {k: x for k, x in outputs().items() if k not in ("lesion", "scales")}
    found = watched("classification", monkeypatch, out)
    assert list(found) == ["scan", "evidence_1", "evidence_2", "evidence_3"]
    np.testing.assert_array_equal(found["scan"], batch()["slices"][:, 4])


def test_the_weights_of_the_cross_stitch_unit_are_watched_in_the_joint_stage() -> None:
    params = {"cross_stitch": {"weights": jnp.asarray([[1.0, 2], [3, 4]])}}
    found = SYSTEM.watched_parameters(SYSTEM.stage("joint"), params)
    assert {name: float(x) for name, x in found.items()} == {
        "cross_stitch_ll": 1,
        "cross_stitch_lc": 2,
        "cross_stitch_cl": 3,
        "cross_stitch_cc": 4,
    }
    assert SYSTEM.watched_parameters(SYSTEM.stage("segmentation"), params) == {}
    alone = build(Config(dataclasses.replace(MODEL, cross_stitch=False), DATA), "cpu")
    assert alone.watched_parameters(alone.stage("joint"), {}) == {}
