"""Metrics on numpy arrays: overlap, surfaces, lesions, classes, calibration, intervals, summary.

Nothing here imports jax.

Empty masks. One policy for all measures:

- **A lesion that was missed** (`pred` empty, `truth` not): Dice, sensitivity and NSD are 0, the
  volume's error is the whole volume, and the lesion counts as missed. It has no distance: RMSD,
  HD95 and ASSD are nan. So a mean of distances is over the scans that were not missed, and the
  number of those that were stands beside it: a missed lesion never improves a distance unseen.
- **A lesion where there is none** (`truth` empty, `pred` not): Dice and NSD are 0, sensitivity and
  the distances nan. `summary` counts such scans apart, with their false positive volume.
- **Neither** has a lesion: Dice, sensitivity, NSD and the distances are nan, specificity is 1.

A figure that is undefined is nan, never left out and never a number; in files it is null. Means are
over the scans where it is defined, and `n` says how many these are.
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
from deepsc_jax.metrics.scan_figures import per_scan
from deepsc_jax.metrics.summary import summarise
from deepsc_jax.metrics.surface import normalized_surface_dice, root_mean_square_surface_distance
from deepsc_jax.metrics.tables import table

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
