"""The losses of one scan (paper, IV-E), from lists of its tiles, each cut to its real slices."""

import torch
from torch import Tensor
from torch.nn import functional as F

from reference.deepsc.geometry import Grid, resample

NON_PNEUMONIA = 2


def dice(found: list[Tensor], truth: list[Tensor], epsilon: float) -> Tensor:
    """1 - Dice over all tiles together (equation 5); 0 where there is no lesion."""
    s, y = (torch.cat([tile.flatten() for tile in tiles]) for tiles in (found, truth))
    if y.sum() == 0:
        return s.sum() * 0
    return 1 - (2 * (s * y).sum() + epsilon) / (s.sum() + y.sum() + epsilon)


def tversky(
    found: list[Tensor], truth: list[Tensor], alpha: float, beta: float, epsilon: float
) -> Tensor:
    """1 - Tversky index: alpha weighs false positives, beta false negatives; Dice is (1/2, 1/2)."""
    s, y = (torch.cat([tile.flatten() for tile in tiles]) for tiles in (found, truth))
    if y.sum() == 0:
        return s.sum() * 0
    hits, false_positives, false_negatives = (s * y).sum(), (s * (1 - y)).sum(), ((1 - s) * y).sum()
    denominator = hits + alpha * false_positives + beta * false_negatives
    return 1 - (hits + epsilon / 2) / (denominator + epsilon / 2)


def focal(found: list[Tensor], truth: list[Tensor], alpha: float, gamma: float) -> Tensor:
    """Mean over voxels of -alpha_t (1 - p_t)^gamma log p_t (equation 6), p within 1e-7 of 0, 1."""
    s, y = (torch.cat([tile.flatten() for tile in tiles]) for tiles in (found, truth))
    p = s.clamp(1e-7, 1 - 1e-7)
    positive = alpha * (1 - p) ** gamma * -torch.log(p)
    negative = (1 - alpha) * p**gamma * -torch.log1p(-p)
    return torch.where(y > 0, positive, negative).mean()


def cross_entropy(logits: Tensor, label: Tensor, class_weights: Tensor) -> Tensor:
    """Weighted cross-entropy of every scan (equation 9)."""
    return F.cross_entropy(logits, label, weight=class_weights, reduction="none")


def class_weights(counts: list[int]) -> Tensor:
    """N / (classes * n_c)."""
    n = torch.tensor(counts, dtype=torch.float64)
    return n.sum() / (len(counts) * n)


def task_aware(
    scales: list[list[Tensor]],
    evidence: list[Tensor],
    tile_grids: list[list[Grid]],
    slice_grids: list[Grid],
    logits: Tensor,
    label: Tensor,
    depth: int,
    weights: tuple[float, float, float] = (1, 1, 1),
) -> Tensor:
    """sum_i mean (S_i - to_tile(M_{4-i}))^2 (equation 10).

    The mean is over voxels whose centre is in the scan, 0 if there are none. 0 also for a scan
    whose label or prediction is non-pneumonia.

    Args:
      scales: S_1, S_2, S_3 of every tile: `(depth, height, width)`.
      evidence: M_3, M_2, M_1 of the scan.
      tile_grids: where S_1, S_2, S_3 of every tile lie.
      slice_grids: where M_3, M_2, M_1 lie.
      logits: of the classes.
      label: true class.
      depth: slices of the scan.
      weights: of the three pairs; 0 leaves a pair out.
    """
    total = logits.sum() * 0
    if NON_PNEUMONIA in (int(label), int(logits.argmax())):
        return total
    for i, weight in enumerate(weights):
        squares = []
        for segmentation, grids in zip(scales, tile_grids, strict=True):
            mask = resample(evidence[i], slice_grids[i], grids[i])
            inside = grids[i][0].centres < depth
            squares.append((segmentation[i] - mask)[inside].square().flatten())
        every = torch.cat(squares)
        total = total + weight * every.sum() / max(len(every), 1)
    return total
