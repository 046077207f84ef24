"""Metrics against MONAI's; DeepMind's own figures are in test_metrics_surface.py."""

import numpy as np
import pytest
import torch
from monai.metrics.surface_dice import compute_surface_dice
from monai.metrics.utils import get_mask_edges, get_surface_distance
from test_metrics_surface import FLOAT32, UNIT, two_lesions

from deepsc_jax.metrics import normalized_surface_dice, root_mean_square_surface_distance


@pytest.mark.parametrize("spacing", [UNIT, (5.0, 0.7, 0.7), (2.5, 0.8, 1.3)])
def test_surface_dice_is_monais_with_subvoxels(spacing):
    pred, truth = two_lesions()
    one_hot = [torch.from_numpy(mask)[None, None] for mask in (pred, truth)]
    for tolerance in (1.0, 3.0, 6.0):
        theirs = compute_surface_dice(
            one_hot[0],
            one_hot[1],
            [tolerance],
            include_background=True,
            spacing=spacing,
            use_subvoxels=True,
        )
        ours = normalized_surface_dice(pred, truth, spacing, tolerance)
        assert ours == pytest.approx(theirs.item(), abs=FLOAT32)


@pytest.mark.parametrize("spacing", [UNIT, (5.0, 0.7, 0.7), (2.5, 0.8, 1.3)])
def test_surface_distances_are_monais(spacing):
    pred, truth = two_lesions()
    edges = get_mask_edges(pred, truth, crop=False)
    both_ways = [
        get_surface_distance(a, b, spacing=spacing) for a, b in (edges, tuple(reversed(edges)))
    ]
    squares = np.concatenate(both_ways).astype(float) ** 2
    ours = root_mean_square_surface_distance(pred, truth, spacing)
    assert ours == pytest.approx(np.sqrt(squares.mean()), rel=FLOAT32)
