"""Small scans, a box of lungs in a box of tissue each, and a stand-in for a network."""

import gzip
import pathlib

import nibabel as nib
import numpy as np

from deepsc_jax.config import DataConfig
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.inference.network import Network

NETWORK = Network(
    DataConfig(
        working_spacing_mm=(8, 9, 9),
        working_size=(24, 32),
        tile=(8, 24, 32),
        depth_bucket=8,
        slices=8,
    ),
    "joint",
    0.5,
    "scans",
    "digest",
    ("lesion", "evidence_1", "evidence_2", "evidence_3"),
)


def compute(volume: np.ndarray) -> Prediction:
    """What depends on the scan."""
    mean = float(volume.mean())
    return Prediction(
        {"lesion": 1 - volume},
        np.array([mean, 1 - mean, 0.0], np.float32),
        {f"evidence_{level}": volume**level for level in (1, 2, 3)},
        notes=("a stand-in",),
    )


def write_chest(scan: pathlib.Path, *, seed: int = 0) -> pathlib.Path:
    """Write a scan, and beside it, in a folder `lungs`, its lung mask, whose path is returned."""
    lung = np.zeros((24, 24, 16), np.uint8)
    lung[3:21, 4:20, 2:14] = 1
    lung[11:13] = 0  # between the two
    noise = np.random.default_rng(seed).normal(0, 30, lung.shape)
    values = np.where(lung, -850, 20) + noise
    affine = np.diag([9.0, 9.0, 8.0, 1.0])
    mask = scan.parent / "lungs" / "lungs.nii.gz"
    mask.parent.mkdir(parents=True, exist_ok=True)
    for path, array in ((scan, values.astype(np.int16)), (mask, lung)):
        image = nib.Nifti1Image(array, affine)
        image.header.set_xyzt_units("mm")
        content = image.to_bytes()
        path.write_bytes(gzip.compress(content) if path == mask else content)
    return mask
