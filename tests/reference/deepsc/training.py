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
        lungs = [tile.lungs for tile in tiles]
        truth = [scan["lesions"][tile.index][: len(tile.lesion)] * tile.lungs for tile in tiles]
        s, y = (losses.voxels(x, lungs) for x in ([tile.lesion for tile in tiles], truth))
        terms |= losses.segmentation(weights, s, y)
        whole = terms.pop("total")
        if stage == "segmentation" and weights.scale_supervision > 0:
            scales = [tile.scales for tile in tiles]
            terms["scales"] = losses.scales_loss(weights, scales, truth, lungs)
            whole = whole + weights.scale_supervision * terms["scales"]
        total = total + weights.segmentation_weight * whole
    if stage == "joint" and weights.task_aware_weight > 0:
        assert out.logits is not None
        assert out.maps is not None
        assert out.lungs is not None
        depth, data = int(scan["depth"]), config.data
        classes = out.logits.argmax(dim=1)
        if weights.evidence_class == "label":
            classes = scan["label"][None]
        masks = network.classifier.evidence(out.maps, out.lungs, classes)
        scale_weights = (1.0, 1.0, 1.0)
        if weights.task_aware_scale_weights == "w":
            scale_weights = weights.scale_weights[:3]
        if weights.task_aware_scales == "single":
            scale_weights = (0, 0, scale_weights[2])
        terms["task_aware"] = losses.task_aware(
            [tile.scales[:3] for tile in out.tiles],
            [tile.lungs for tile in out.tiles],
            [mask[0] for mask in reversed(masks)],
            [_grids(tile) for tile in out.tiles],
            [slice_grid(depth, data.slices, data.working_size, step) for step in STEPS],
            out.logits[0],
            scan["label"],
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
