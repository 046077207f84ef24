"""The losses of scans from sums over their tiles, which need not lie in one array."""

from collections.abc import Sequence

import torch
from reference.deepsc.losses import NON_PNEUMONIA
from torch import Tensor
from torch.nn import functional as F

from deepsc_jax.models.deepsc.config import Options
from peers.deepsc.lungs import Lungs
from peers.deepsc.network import FACTORS, Found, Seen
from peers.deepsc.places import STEPS, Places, unfolded

SMALLEST = 1e-7


def segmentation(options: Options, sums: Tensor) -> dict[str, Tensor]:
    """The terms of a segmentation's loss of each scan, unweighted, and `total`, weighted.

    `sums` are those of `voxel_sums`, over all tiles.
    """
    hits, probability, truth, focal, free, voxels = sums
    alpha, beta, epsilon = options.tversky_alpha, options.tversky_beta, options.dice_epsilon
    if alpha == beta == 0.5:
        overlap = (2 * hits + epsilon) / (probability + truth + epsilon)
    else:
        missed = alpha * (probability - hits) + beta * (truth - hits)
        overlap = (hits + epsilon / 2) / (hits + missed + epsilon / 2)
    has_lesion, number = truth > 0, voxels.clamp(min=1)
    terms = {
        "dice": torch.where(has_lesion, 1 - overlap, 0),
        "focal": focal / number,
        "lesion_free": torch.where(has_lesion, 0, free / number),
    }
    weights = options.dice_weight, options.focal_weight, options.lesion_free_weight
    weighted = [w * term for w, term in zip(weights, terms.values(), strict=True)]
    return terms | {"total": torch.stack(weighted).sum(0)}


def voxel_sums(options: Options, s: Tensor, y: Tensor, mask: Tensor, scans: int) -> Tensor:
    """Sums over each scan's lungs: of s y, s, y, the focal and the lesion-free term, and of 1.

    `s`, `y` and `mask` are of tiles `(scan * tile, 1, ...)`, 0 outside the lungs.
    """
    p = s.clamp(SMALLEST, 1 - SMALLEST)
    log, log_other = torch.log(p), torch.log1p(-p)
    positive = options.focal_alpha * (1 - p) ** options.focal_gamma * -log
    negative = (1 - options.focal_alpha) * p**options.focal_gamma * -log_other
    free = -torch.log1p(-s.clamp(0, 1 - SMALLEST))
    terms = (s * y, s, y, torch.where(y > 0, positive, negative) * mask, free, mask)
    return torch.stack([term.reshape(scans, -1).sum(1) for term in terms])


def lesions_of(
    options: Options, found: Sequence[Found], truths: Sequence[Tensor], scans: int
) -> Tensor:
    """`voxel_sums` of S, of all tiles."""
    parts = [
        voxel_sums(options, one.lesion, truth * one.lungs[0].mask, one.lungs[0].mask, scans)
        for one, truth in zip(found, truths, strict=True)
    ]
    return torch.stack(parts).sum(0)


def scales_of(
    options: Options, found: Sequence[Found], truths: Sequence[Tensor], scans: int
) -> Tensor:
    """The mean of the losses of S_1 to S_4 by themselves, of each scan."""
    total = torch.zeros((), device=truths[0].device, dtype=truths[0].dtype)
    for i, factor in enumerate(FACTORS):
        sums = []
        for one, truth in zip(found, truths, strict=True):
            inside = one.lungs[3 - i].mask
            ill = F.max_pool3d(truth * one.lungs[0].mask, factor, ceil_mode=True)
            sums.append(voxel_sums(options, one.scales[i], ill, inside, scans))
        total = total + segmentation(options, torch.stack(sums).sum(0))["total"] / 4
    return total


def task_aware(
    options: Options, seen: Seen, masks: list[Tensor], places: Places, label: Tensor
) -> Tensor:
    """The squared difference of S_i and M_(4-i) over the lungs, of each scan."""
    assert seen.logits is not None
    weights = (1.0, 1.0, 1.0)
    if options.task_aware_scale_weights == "w":
        weights = options.scale_weights[:3]
    if options.task_aware_scales == "single":
        weights = (0.0, 0.0, weights[2])
    total, scans = torch.zeros_like(seen.logits[:, 0]), len(label)
    for i, (weight, step) in enumerate(zip(weights, STEPS, strict=True)):
        squares, voxels = torch.zeros_like(total), torch.zeros_like(total)
        for one in seen.found:
            mask = places.to_coarse(masks[2 - i], one.region, step)
            inside: Lungs = one.lungs[3 - i]
            off = (one.scales[i] - unfolded(mask, one.region, step)) * inside.mask
            squares = squares + off.square().reshape(scans, -1).sum(1)
            voxels = voxels + inside.mask.reshape(scans, -1).sum(1)
        total = total + weight * squares / voxels.clamp(min=1)
    without = (label == NON_PNEUMONIA) | (seen.logits.argmax(dim=1) == NON_PNEUMONIA)
    return torch.where(without, 0, total)
