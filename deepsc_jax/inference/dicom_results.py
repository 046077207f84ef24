"""A result of a DICOM series as DICOM: a segmentation, a structured report, parametric maps.

They lie on the series' own slices and refer to them by their UIDs. Where the libraries are missing
or the series cannot be referred to, a note says so and the result does without.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Shaped

from deepsc_jax.data import dicom_objects, dicom_report, dicom_source
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.data.preprocess import WorkingGrid, to_source
from deepsc_jax.data.scans import Scan
from deepsc_jax.data.source import to_source_axes
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import JsonObject, Untyped

SEGMENTATION, REPORT = "segmentation.dcm", "report.dcm"
_FIRST_MAP = 1003  # number of its series; the segmentation's and the report's are before

Volume = Shaped[np.ndarray, "depth height width"]


def write(
    folder: Path,
    scan: Scan,
    lung: Bool[np.ndarray, "depth height width"],
    lesion: Bool[np.ndarray, "depth height width"] | None,
    prediction: Prediction,
    grid: WorkingGrid,
    result: JsonObject,
    digest: str,
    keep_identifiers: bool,
) -> list[str]:
    """Write a DICOM series' result as DICOM into `folder`; returns notes on what there is not.

    Args:
      folder: of the result.
      scan: the series.
      lung: its lungs.
      lesion: its lesions; None where the network finds none.
      prediction: on the working grid: its other volumes become segments, its evidence maps.
      grid: the working grid.
      result: the figures that the report says.
      digest: of the network.
      keep_identifiers: whether the patient module is copied; else it is blank.
    """
    if not dicom_source.installed():
        return ["no DICOM objects: pip install 'deepsc_jax[dicom]', then again with --overwrite"]
    try:
        images = dicom_source.source_images(scan.files, keep_identifiers=keep_identifiers)
    except InputError as error:
        return [f"no DICOM objects: {error}"]
    masks: dict[str, Volume] = {"lungs": lung} | ({} if lesion is None else {"lesion": lesion})
    for name, volume in prediction.volumes.items():
        if name != "lesion" and name in dicom_objects.KINDS:
            masks[name] = to_source(volume, grid) >= 0.5
    with dicom_source.quiet():
        frames = {name: _frames(mask, scan) for name, mask in masks.items()}
        segmentation = dicom_objects.segmentation(images, frames, digest)
        _save(segmentation, folder / SEGMENTATION)
        ml = float(np.prod(scan.spacing_mm)) / 1000
        volumes_ml = {name: round(float(mask.sum()) * ml, 2) for name, mask in masks.items()}
        probabilities: Mapping[str, float] = result.get("probabilities", {})
        report = dicom_report.report(images, segmentation, volumes_ml, probabilities, digest)
        _save(report, folder / REPORT)
        for number, (name, working) in enumerate(prediction.evidence.items(), _FIRST_MAP):
            evidence = _frames(to_source(working, grid), scan)
            made = dicom_objects.parametric_map(images, evidence, name, number, digest)
            _save(made, folder / f"{name}.dcm")
    return []


def _frames(
    array: Volume, scan: Scan
) -> Shaped[np.ndarray, "slice row column"] | Float[np.ndarray, "slice row column"]:
    """A canonical array on the series' slices, in the order of `Scan.files`."""
    return np.ascontiguousarray(to_source_axes(array, scan.affine).T)


def _save(data: Untyped, path: Path) -> None:
    data.save_as(path, enforce_file_format=True)
