"""Every loss against the reference, against MONAI, and by hand."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from monai.losses.dice import DiceLoss
from monai.losses.focal_loss import FocalLoss
from monai.losses.tversky import TverskyLoss
from parity import DTYPES, GRADIENTS, VALUES, compare
from reference.deepsc import geometry
from reference.deepsc import losses as reference

from deepsc_jax.config import DataConfig
from deepsc_jax.models.deepsc import losses
from deepsc_jax.models.deepsc.config import Options
from deepsc_jax.systems.system import inverse_frequency

TILE = (8, 16, 8)
DATA = DataConfig(working_size=(16, 16), tile=TILE, slices=5, depth_bucket=8)
# Two scans: 11 slices in tiles at 0 and 8, and 3 slices.
DEPTH, ORIGINS = [11, 3], [[[0, 0, 8], [8, 0, 0]], [[0, 0, 0], [0, 0, 8]]]
COUNTS = [[min(d - o[0], TILE[0]) for o in row] for d, row in zip(DEPTH, ORIGINS, strict=True)]


def lungs_of(seed: int = 0) -> np.ndarray:
    """Three of four voxels, within the scans."""
    lungs = np.random.default_rng([seed, 1]).uniform(size=(2, 2, *TILE)) < 0.75
    for b, row in enumerate(COUNTS):
        for k, n in enumerate(row):
            lungs[b, k, n:] = False
    return lungs


def voxels(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and a truth that is absent from the second scan."""
    rng = np.random.default_rng(seed)
    probability = rng.uniform(size=(2, 2, *TILE))
    truth = (rng.uniform(size=probability.shape) < 0.3).astype(float)
    truth[1] = 0
    return probability, truth * lungs_of(seed)


def cut(x: Any, scan: int) -> list:
    """A scan's tiles without their padding."""
    return [x[scan, k, :n] for k, n in enumerate(COUNTS[scan])]


def inside(x: Any, scan: int) -> Any:
    """The voxels of a scan's lungs, in a row."""
    return reference.voxels(cut(x, scan), cut(torch.from_numpy(lungs_of()), scan))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("alpha", "gamma"), [(0.75, 2.0), (0.25, 1.5)])
def test_dice_tversky_and_focal(alpha: float, gamma: float, dtype: str, within: Any):
    probability, truth = voxels()

    def ours(_: Any, s: Any) -> list:
        lungs = jnp.asarray(lungs_of())
        y = jnp.asarray(truth, s.dtype)
        return [
            losses.tversky_loss(s, y, lungs, 1e-5),
            losses.tversky_loss(s, y, lungs, 1e-5, alpha, 1 - alpha),
            losses.focal_loss(s, y, lungs, alpha, gamma),
            losses.lesion_free_loss(s, y, lungs),
        ]

    def theirs(s: torch.Tensor) -> list[torch.Tensor]:
        y = torch.from_numpy(truth).to(s)
        rows = []
        for scan in range(2):
            p, t = inside(s, scan), inside(y, scan)
            rows.append(
                [
                    reference.dice(p, t, 1e-5),
                    reference.tversky(p, t, alpha, 1 - alpha, 1e-5),
                    reference.focal(p, t, alpha, gamma),
                    reference.lesion_free(p, t),
                ]
            )
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    errors = compare(ours, theirs, [probability], dtype)
    within("Dice, Tversky, focal loss", dtype, errors.against(VALUES[dtype], GRADIENTS[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_supervision_of_the_scales(dtype: str, within: Any):
    rng = np.random.default_rng(0)
    scales = [rng.uniform(size=(2, 2, *(t // step for t in TILE), 1)) for step in (8, 4, 2, 1)]
    (_, truth), lungs, options = voxels(), lungs_of(), Options()

    def ours(_: Any, *scales: Any) -> list:
        y = jnp.asarray(truth, scales[0].dtype)
        return [losses.scale_loss(options, scales, y, jnp.asarray(lungs))]

    def theirs(*scales: torch.Tensor) -> list[torch.Tensor]:
        rows = []
        for b in range(2):
            tiles = [[s[b, k, ..., 0] for s in scales] for k in range(2)]
            true, inside = ([torch.from_numpy(x[b, k]) for k in range(2)] for x in (truth, lungs))
            rows.append(reference.scales_loss(options, tiles, true, inside))
        return [torch.stack(rows)]

    errors = compare(ours, theirs, scales, dtype)
    within("supervised scales", dtype, errors.against(VALUES[dtype], GRADIENTS[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype: str, within: Any):
    logits = np.random.default_rng(0).normal(size=(5, 3)) * 4
    label, weights = [0, 1, 2, 2, 1], [0.5, 1.0, 2.0]

    def theirs(x: torch.Tensor) -> list[torch.Tensor]:
        return [reference.cross_entropy(x, torch.tensor(label), torch.tensor(weights).to(x))]

    errors = compare(
        lambda _, x: [losses.cross_entropy(x, jnp.asarray(label), jnp.asarray(weights, x.dtype))],
        theirs,
        [logits],
        dtype,
    )
    within("weighted cross-entropy", dtype, errors.against(VALUES[dtype], GRADIENTS[dtype]))


@pytest.mark.parametrize(
    ("scales", "weighing", "labels", "dtype"),
    [
        ("multi", "uniform", [0, 1], "float32"),
        ("multi", "uniform", [0, 1], "float64"),
        ("multi", "w", [1, 2], "float64"),
        ("single", "uniform", [2, 0], "float64"),
    ],
)
def test_task_aware(scales: Any, weighing: Any, labels: list[int], dtype: str, within: Any):
    rng = np.random.default_rng(0)
    parts = [rng.uniform(size=(2, 2, *(t // step for t in TILE), 1)) for step in (8, 4, 2)]
    masks = [rng.uniform(size=(2, DATA.slices, 16 // s, 16 // s)) for s in (8, 4, 2)]
    logits = np.asarray([[2.0, 1, 0], [0, 1, -1]])
    options = Options(task_aware_scales=scales, task_aware_scale_weights=weighing)

    def ours(_: Any, *inputs: Any) -> list:
        loss = losses.task_aware_loss(
            inputs[:3],
            (inputs[5], inputs[4], inputs[3]),
            jnp.asarray(logits, inputs[0].dtype),
            jnp.asarray(labels),
            jnp.asarray(lungs_of()),
            jnp.asarray(ORIGINS),
            jnp.asarray(DEPTH),
            options,
            DATA,
        )
        return [loss]

    def theirs(*inputs: torch.Tensor) -> list[torch.Tensor]:
        weights = (0.05, 0.1, 0.25) if weighing == "w" else (1.0, 1.0, 1.0)
        if scales == "single":
            weights = (0.0, 0.0, weights[2])
        rows = []
        for b, depth in enumerate(DEPTH):
            segmentations, grids = [], []
            for k, n in enumerate(COUNTS[b]):
                sides = [(-(-n // s), TILE[1] // s, TILE[2] // s) for s in (8, 4, 2)]
                segmentations.append(
                    [x[b, k, : side[0], ..., 0] for x, side in zip(inputs[:3], sides, strict=True)]
                )
                d, h, w = ORIGINS[b][k]
                steps = zip(sides, (8, 4, 2), strict=True)
                grids.append([geometry.tile_grid((d, h, w), side, s) for side, s in steps])
            rows.append(
                reference.task_aware(
                    segmentations,
                    cut(torch.from_numpy(lungs_of()), b),
                    [x[b] for x in inputs[3:]],
                    grids,
                    [geometry.slice_grid(depth, DATA.slices, (16, 16), s) for s in (8, 4, 2)],
                    torch.from_numpy(logits[b]).to(inputs[0]),
                    torch.tensor(labels[b]),
                    weights,
                )
            )
        return [torch.stack(rows)]

    errors = compare(ours, theirs, [*parts, *masks], dtype)
    within("task-aware loss", dtype, errors.against(VALUES[dtype], GRADIENTS[dtype]))


def test_class_weights_by_hand():
    """Counts 3, 2, 1: N = 6, so 6/9, 6/6, 6/3."""
    expected = [2 / 3, 1, 2]
    np.testing.assert_allclose(inverse_frequency(jnp.asarray([3, 2, 1])), expected, rtol=1e-6)
    np.testing.assert_allclose(reference.class_weights([3, 2, 1]), expected, rtol=1e-12)


def test_dice_by_hand():
    """Two of three found voxels are among the four true ones: Dice 4 / 7."""
    shape = (1, 1, 1, 2, 4)
    found = jnp.asarray([1.0, 1, 1, 0, 0, 0, 0, 0]).reshape(shape)
    truth = jnp.asarray([0.0, 1, 1, 1, 1, 0, 0, 0]).reshape(shape)
    loss = losses.tversky_loss(found, truth, jnp.ones(shape), 0.0)
    np.testing.assert_allclose(loss, [3 / 7], rtol=1e-6)


def test_tversky_by_hand():
    """Two hits, one false positive, two missed: 2 / (2 + 0.3 + 0.7 * 2)."""
    shape = (1, 1, 1, 2, 4)
    found = jnp.asarray([1.0, 1, 1, 0, 0, 0, 0, 0]).reshape(shape)
    truth = jnp.asarray([0.0, 1, 1, 1, 1, 0, 0, 0]).reshape(shape)
    loss = losses.tversky_loss(found, truth, jnp.ones(shape), 0.0, 0.3, 0.7)
    np.testing.assert_allclose(loss, [1 - 2 / 3.7], rtol=1e-6)


def test_task_aware_of_two_voxels_by_hand():
    """S_3 = (0.5, 0.2), M_1 = (0.1, 0.4), equal elsewhere in 16 voxels."""
    data = DataConfig(working_size=(8, 8), tile=(8, 8, 8), slices=1, depth_bucket=8)
    scales = [jnp.zeros((1, 1, 8 // s, 8 // s, 8 // s, 1)) for s in (8, 4, 2)]
    masks = [jnp.zeros((1, 1, 8 // s, 8 // s)) for s in (2, 4, 8)]
    # Two slices of the scan are one of S_3.
    scales[2] = scales[2].at[0, 0, 0, 0, :2, 0].set(jnp.asarray([0.5, 0.2]))
    masks[0] = masks[0].at[0, 0, 0, :2].set(jnp.asarray([0.1, 0.4]))
    loss = losses.task_aware_loss(
        tuple(scales),
        tuple(masks),
        jnp.asarray([[1.0, 0, 0]]),
        jnp.asarray([0]),
        jnp.arange(8)[:, None, None] < jnp.full((1, 1, 8, 8, 8), 2),
        jnp.zeros((1, 1, 3), int),
        jnp.asarray([2]),
        Options(task_aware_scales="single"),
        data,
    )
    np.testing.assert_allclose(loss, [(0.16 + 0.04) / 16], rtol=1e-6)


def test_dice_tversky_and_focal_are_monais():
    """On one whole scan; MONAI's focal loss takes logits, and weighs by alpha both ways."""
    probability, truth = voxels()
    s, y = (jnp.asarray(x[:1, :1], jnp.float32) for x in (probability, truth))
    theirs = [torch.from_numpy(x[:1, 0][:, None]).float() for x in (probability, truth)]
    dice = DiceLoss(smooth_nr=1e-5, smooth_dr=1e-5)(*theirs)
    np.testing.assert_allclose(
        losses.tversky_loss(s, y, jnp.ones(s.shape), 1e-5), [dice.item()], rtol=1e-5
    )
    tversky = TverskyLoss(alpha=0.3, beta=0.7, smooth_nr=5e-6, smooth_dr=5e-6)(*theirs)
    np.testing.assert_allclose(
        losses.tversky_loss(s, y, jnp.ones(s.shape), 1e-5, 0.3, 0.7), [tversky.item()], rtol=1e-5
    )
    focal = FocalLoss(gamma=2, alpha=0.75)(torch.logit(theirs[0]), theirs[1])
    np.testing.assert_allclose(
        losses.focal_loss(s, y, jnp.ones(s.shape), 0.75, 2.0), [focal.item()], rtol=1e-5
    )
