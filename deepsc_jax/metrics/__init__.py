"""Metrics of the paper, on numpy arrays: overlap, surface distance, classification, summary.

Nothing here imports jax.
"""

from deepsc_jax.metrics.classification import (
    accuracy,
    confusion_matrix,
    macro_auc,
    macro_f1,
    macro_sensitivity,
    macro_specificity,
)
from deepsc_jax.metrics.overlap import dice, sensitivity, specificity
from deepsc_jax.metrics.summary import per_scan, summarise, table
from deepsc_jax.metrics.surface import normalized_surface_dice, root_mean_square_surface_distance

__all__ = [
    "accuracy",
    "confusion_matrix",
    "dice",
    "macro_auc",
    "macro_f1",
    "macro_sensitivity",
    "macro_specificity",
    "normalized_surface_dice",
    "per_scan",
    "root_mean_square_surface_distance",
    "sensitivity",
    "specificity",
    "summarise",
    "table",
]
