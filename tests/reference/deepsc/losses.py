"""The losses of one scan (paper, IV-E), from lists of its tiles, each cut to its real slices.

`s` and `y` are the probabilities and the truth of the lungs' voxels, in a row.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from deepsc_jax.models.deepsc.config import Options
from reference.deepsc.geometry import Grid, resample
from reference.deepsc.lungs import coarser

NON_PNEUMONIA = 2


def voxels(tiles: list[Tensor], lungs: list[Tensor]) -> Tensor:
    """The lungs' voxels of all tiles in a row."""
    return torch.cat([tile[inside] for tile, inside in zip(tiles, lungs, strict=True)])


def dice(s: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """1 - Dice over all voxels together (equation 5); 0 where there is no lesion."""
    if y.sum() == 0:
        return s.sum() * 0
    return 1 - (2 * (s * y).sum() + epsilon) / (s.sum() + y.sum() + epsilon)


def tversky(s: Tensor, y: Tensor, alpha: float, beta: float, epsilon: float) -> Tensor:
    """1 - Tversky index: alpha weighs false positives, beta false negatives; Dice is (1/2, 1/2)."""
    if y.sum() == 0:
        return s.sum() * 0
    hits, false_positives, false_negatives = (s * y).sum(), (s * (1 - y)).sum(), ((1 - s) * y).sum()
    denominator = hits + alpha * false_positives + beta * false_negatives
    return 1 - (hits + epsilon / 2) / (denominator + epsilon / 2)


def focal(s: Tensor, y: Tensor, alpha: float, gamma: float) -> Tensor:
    """Mean over voxels of -alpha_t (1 - p_t)^gamma log p_t (equation 6), p within 1e-7 of 0, 1."""
    p = s.clamp(1e-7, 1 - 1e-7)
    positive = alpha * (1 - p) ** gamma * -torch.log(p)
    negative = (1 - alpha) * p**gamma * -torch.log1p(-p)
    return torch.where(y > 0, positive, negative).sum() / max(len(s), 1)


def lesion_free(s: Tensor, y: Tensor) -> Tensor:
    """Mean of -log(1 - p) where there is no lesion, else 0."""
    if y.sum() > 0:
        return s.sum() * 0
    return -torch.log1p(-s.clamp(0, 1 - 1e-7)).sum() / max(len(s), 1)


def segmentation(options: Options, s: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The terms of a segmentation's loss, unweighted, and `total`, weighted (equation 4)."""
    alpha, beta = options.tversky_alpha, options.tversky_beta
    if alpha == beta == 0.5:
        overlap = dice(s, y, options.dice_epsilon)
    else:
        overlap = tversky(s, y, alpha, beta, options.dice_epsilon)
    terms = {
        "dice": overlap,
        "focal": focal(s, y, options.focal_alpha, options.focal_gamma),
        "lesion_free": lesion_free(s, y),
    }
    weights = options.dice_weight, options.focal_weight, options.lesion_free_weight
    total = torch.zeros((), dtype=s.dtype)
    for weight, term in zip(weights, terms.values(), strict=True):
        total = total + weight * term
    return terms | {"total": total}


def scales_loss(
    options: Options, scales: list[list[Tensor]], truth: list[Tensor], lungs: list[Tensor]
) -> Tensor:
    """The mean of the losses of S_1 to S_4 by themselves; `scales` of every tile."""
    total = torch.zeros((), dtype=scales[0][0].dtype)
    for i, factor in enumerate((8, 4, 2, 1)):
        blocks = (factor, factor, factor)
        inside, lesion = (
            [coarser(x[None, None] > 0, blocks)[0, 0] for x in tiles] for tiles in (lungs, truth)
        )
        s = voxels([tile[i] for tile in scales], inside)
        total = total + segmentation(options, s, voxels(lesion, inside).to(s))["total"] / 4
    return total


def cross_entropy(logits: Tensor, label: Tensor, class_weights: Tensor) -> Tensor:
    """Weighted cross-entropy of every scan (equation 9)."""
    return F.cross_entropy(logits, label, weight=class_weights, reduction="none")


def class_weights(counts: list[int]) -> Tensor:
    """N / (classes * n_c)."""
    n = torch.tensor(counts, dtype=torch.float64)
    return n.sum() / (len(counts) * n)


def task_aware(
    scales: list[list[Tensor]],
    lungs: list[Tensor],
    evidence: list[Tensor],
    tile_grids: list[list[Grid]],
    slice_grids: list[Grid],
    logits: Tensor,
    label: Tensor,
    weights: tuple[float, float, float] = (1, 1, 1),
) -> Tensor:
    """sum_i mean (S_i - to_tile(M_{4-i}))^2 (equation 10).

    The mean is over the lungs' voxels, 0 if there are none. 0 also for a scan whose label or
    prediction is non-pneumonia.

    Args:
      scales: S_1, S_2, S_3 of every tile: `(depth, height, width)`.
      lungs: of every tile, bool `(depth, height, width)`.
      evidence: M_3, M_2, M_1 of the scan.
      tile_grids: where S_1, S_2, S_3 of every tile lie.
      slice_grids: where M_3, M_2, M_1 lie.
      logits: of the classes.
      label: true class.
      weights: of the three pairs; 0 leaves a pair out.
    """
    total = logits.sum() * 0
    if NON_PNEUMONIA in (int(label), int(logits.argmax())):
        return total
    for i, (weight, factor) in enumerate(zip(weights, (8, 4, 2), strict=True)):
        squares = []
        for segmentation, inside, grids in zip(scales, lungs, tile_grids, strict=True):
            mask = resample(evidence[i], slice_grids[i], grids[i])
            coarse = coarser(inside[None, None], (factor, factor, factor))[0, 0]
            squares.append((segmentation[i] - mask)[coarse].square())
        every = torch.cat(squares)
        total = total + weight * every.sum() / max(len(every), 1)
    return total
