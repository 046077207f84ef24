"""A whole preprocessed scan through the joint network, tile by tile."""

import itertools

import torch
from torch import Tensor

from reference.deepsc.geometry import resample, slice_grid, tile_grid
from reference.deepsc.network import DeepSC


def predict(network: DeepSC, volume: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Lesion probability (D, H, W), class probabilities, and M_1, M_2, M_3 each (D, H, W).

    The evidence is that of the most probable class, on the grid of the scan's voxels.
    """
    data = network.config.data
    depth, height, width = volume.shape
    corners = list(
        itertools.product(
            *(range(0, side, tile) for side, tile in zip(volume.shape, data.tile, strict=True))
        )
    )
    d, h, w = data.tile
    scan = {
        # Tiles past the last slice are short, and `real_tiles` cuts what a batch would pad.
        "tiles": [volume[z : z + d, y : y + h, x : x + w] for z, y, x in corners],
        "origins": torch.tensor(corners),
        "slices": volume[torch.arange(data.slices) * depth // data.slices],
        "depth": torch.tensor(depth),
    }
    with torch.no_grad():
        out = network(scan, "joint")  # type: ignore[arg-type]
        assert out.logits is not None
        assert out.maps is not None
        assert out.lungs is not None
        lesion = torch.zeros_like(volume)
        for tile in out.tiles:
            z, y, x = tile.origin
            n, rows, columns = tile.lesion.shape
            lesion[z : z + n, y : y + rows, x : x + columns] = tile.lesion
        masks = network.classifier.evidence(out.maps, out.lungs, out.logits.argmax(dim=1))
        voxels = tile_grid((0, 0, 0), (depth, height, width))
        evidence = [
            resample(mask[0], slice_grid(depth, data.slices, data.working_size, step), voxels)
            * (volume > 0)
            for mask, step in zip(masks, (2, 4, 8), strict=True)
        ]
    return lesion, out.logits.softmax(dim=1)[0], evidence
