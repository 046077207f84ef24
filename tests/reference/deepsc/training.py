"""The objective of a stage, and its training."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from deepsc_jax.config import Config
from reference.deepsc import losses
from reference.deepsc.geometry import Grid, slice_grid, tile_grid
from reference.deepsc.network import DeepSC, Tile, options_of
from reference.training import Batch, means_of, take_steps

STEPS = (8, 4, 2)  # scan voxels per voxel of S_1, S_2, S_3, and in-plane of M_3, M_2, M_1


def scan_losses(
    network: DeepSC, scan: dict[str, Tensor], stage: str, class_weights: Tensor
) -> dict[str, Tensor]:
    """The terms of a scan's loss, and their weighted sum `loss` (paper, equation 11)."""
    config: Config = network.config
    weights, terms = options_of(config), {}
    count = len(scan["tiles"]) if "tiles" in scan else 0
    if stage == "joint":
        count = weights.gradient_tiles or count
    out = network(scan, stage, count)
    total = torch.zeros((), dtype=class_weights.dtype)
    if stage != "segmentation":
        assert out.logits is not None
        terms["cross_entropy"] = losses.cross_entropy(
            out.logits, scan["label"][None], class_weights
        )[0]
        total = total + weights.classification_weight * terms["cross_entropy"]
    if stage != "classification":
        tiles = [tile for tile in out.tiles if tile.index < count]
        found = [tile.lesion for tile in tiles]
        truth = [scan["lesions"][tile.index][: len(tile.lesion)] for tile in tiles]
        if weights.tversky_alpha == weights.tversky_beta == 0.5:
            terms["dice"] = losses.dice(found, truth, weights.dice_epsilon)
        else:
            sides = weights.tversky_alpha, weights.tversky_beta
            terms["dice"] = losses.tversky(found, truth, *sides, weights.dice_epsilon)
        terms["focal"] = losses.focal(found, truth, weights.focal_alpha, weights.focal_gamma)
        both = weights.dice_weight * terms["dice"] + weights.focal_weight * terms["focal"]
        total = total + weights.segmentation_weight * both
    if stage == "joint" and weights.task_aware_weight > 0:
        assert out.logits is not None
        assert out.maps is not None
        depth, data = int(scan["depth"]), config.data
        classes = out.logits.argmax(dim=1)
        if weights.evidence_class == "label":
            classes = scan["label"][None]
        masks = network.classifier.evidence(out.maps, classes)
        scale_weights = (1.0, 1.0, 1.0)
        if weights.task_aware_scale_weights == "w":
            scale_weights = weights.scale_weights[:3]
        if weights.task_aware_scales == "single":
            scale_weights = (0, 0, scale_weights[2])
        terms["task_aware"] = losses.task_aware(
            [tile.scales[:3] for tile in out.tiles],
            [mask[0] for mask in reversed(masks)],
            [_grids(tile) for tile in out.tiles],
            [slice_grid(depth, data.slices, data.working_size, step) for step in STEPS],
            out.logits[0],
            scan["label"],
            depth,
            scale_weights,
        )
        total = total + weights.task_aware_weight * terms["task_aware"]
    return terms | {"loss": total}


def _grids(tile: Tile) -> list[Grid]:
    """Where S_1, S_2 and S_3 of a tile lie."""
    grids = []
    for scale, step in zip(tile.scales[:3], STEPS, strict=True):
        depth, height, width = scale.shape
        grids.append(tile_grid(tile.origin, (depth, height, width), step))
    return grids


def train(
    network: DeepSC,
    stage: str,
    batches: Iterable[Batch],
    class_weights: Tensor,
) -> Iterator[dict[str, float]]:
    """Take one step per batch; yields the means of the losses over its scans, before the step."""

    def losses_of(batch: Batch) -> dict[str, Tensor]:
        scans = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
        return means_of([scan_losses(network, scan, stage, class_weights) for scan in scans])

    return take_steps(network, network.config, stage, batches, losses_of)
