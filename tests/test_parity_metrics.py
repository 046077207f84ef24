"""Metrics against MONAI's; DeepMind's own figures are in test_metrics_surface.py."""

import pytest
import torch
from monai.metrics.surface_dice import compute_surface_dice
from test_metrics_surface import FLOAT32, UNIT, two_lesions

from deepsc_jax.metrics import normalized_surface_dice


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
