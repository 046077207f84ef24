"""What a result says and shows of a prediction: figures, images on the scan's grid, a picture."""

import math
import pathlib
from collections.abc import Collection

import numpy as np
from jaxtyping import Bool

from deepsc_jax.data import preprocess, scans
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.data.preprocess import Prepared
from deepsc_jax.data.scans import Scan
from deepsc_jax.inference.masks import lesion_mask
from deepsc_jax.inference.network import Network
from deepsc_jax.report.pictures import LUNG_WINDOW_HU, scan_picture
from deepsc_jax.report.scan_tables import Findings
from deepsc_jax.runtime.types import JsonObject


def facts_of(network: Network) -> JsonObject:
    """What every result says of the network."""
    return {
        "stage": network.stage,
        "trained_on": network.trained_on,
        "note": "research software, not for clinical use",
        **network.options.facts(),
        "networks": network.networks,
    }


def classes_of(prediction: Prediction, network: Network) -> JsonObject:
    """The most probable class, and the probability of each."""
    if prediction.classes is None:
        return {}
    exact = dict(zip(network.data.classes, prediction.classes.tolist(), strict=True))
    return {
        "probabilities": {name: round(share, 4) for name, share in exact.items()},
        "class": max(exact, key=lambda c: exact[c]),
    }


def values_of(prediction: Prediction) -> JsonObject:
    """Numbers by name, None for what is none."""
    numbers = {name: float(value) for name, value in prediction.values.items()}
    finite = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
    return {"values": finite} if finite else {}


def finds_lungs(volumes: Collection[str]) -> bool:
    """Whether a network that gives these needs no lungs."""
    return {"left_lung", "right_lung"} <= set(volumes)


def found_lungs(
    prediction: Prediction, grid: preprocess.WorkingGrid
) -> Bool[np.ndarray, "depth height width"]:
    """Both lungs, lesions included, as a network found them, on the source's grid."""
    both = sum(prediction.volumes[name] for name in ("left_lung", "right_lung", "lesion"))
    return preprocess.to_source(np.asarray(both), grid) >= 0.5


def write(
    folder: pathlib.Path,
    scan: Scan,
    lung: Bool[np.ndarray, "depth height width"],
    prepared: Prepared,
    prediction: Prediction,
    network: Network,
    *,
    given: bool,
) -> tuple[JsonObject, Findings]:
    """Write a prediction's images and picture; returns its result's figures, and what they are of.

    `given`: whether the lung mask was. Figures are rounded to what they mean: ml to 0.01, shares
    and probabilities to 0.0001.
    """
    voxel_ml = float(np.prod(scan.spacing_mm)) / 1000
    result: JsonObject = facts_of(network) | {"lung_ml": round(float(lung.sum()) * voxel_ml, 2)}
    probability = mask = shown = classes = None
    if prediction.lesion is not None:
        inside, working = None, None
        if network.data.mask == "lungs":
            inside, working = lung, prepared.lung
        probability = preprocess.to_source(prediction.lesion, prepared.grid, working)
        if inside is not None:  # outside of them the network sees nothing
            probability = np.where(inside, probability, 0)
        smallest_ml = network.options.smallest_lesion_ml
        mask = lesion_mask(probability, inside, network.threshold, scan.spacing_mm, smallest_ml)
        scans.save_like(probability, scan, folder / "lesion_probability.nii.gz", np.float32)
        scans.save_like(mask, scan, folder / "lesion_mask.nii.gz", np.uint8)
        lesion_ml = round(float(mask.sum()) * voxel_ml, 2)
        result |= {"lesion_ml": lesion_ml, "lesion_threshold": network.threshold}
        result["lesion_share_of_lung"] = round(float(mask.sum() / max(lung.sum(), 1)), 4)
    for name in network.volumes:
        if name in prediction.volumes and name != "lesion":
            side = preprocess.to_source(prediction.volumes[name], prepared.grid) >= 0.5
            scans.save_like(side, scan, folder / f"{name}.nii.gz", np.uint8)
    if prediction.classes is not None:
        exact: list[float] = prediction.classes.tolist()
        classes = dict(zip(network.data.classes, exact, strict=True))
        result |= classes_of(prediction, network)
    if prediction.classes is not None or prediction.evidence:
        result["evidence_share_in_lung"] = []
    for name, working in prediction.evidence.items():
        evidence = preprocess.to_source(working, prepared.grid)
        scans.save_like(evidence, scan, folder / f"{name}.nii.gz", np.float32)
        share = float(evidence[lung].sum() / max(evidence.sum(), 1e-6))
        result["evidence_share_in_lung"].append(round(share, 4))
        if shown is None:  # the finest: the picture shows its part inside the lungs
            shown = np.where(lung, evidence, 0)
    result |= values_of(prediction)
    hu = network.data.intensity == "hu"
    scan_picture(
        folder / "picture.png",
        scan.values,
        probability,
        mask,
        shown,
        classes,
        spacing_mm=scan.spacing_mm,
        title=scan.name,
        lung_mask=lung,
        threshold=network.threshold,
        lungs="given" if given else "found",
        trained_on=network.trained_on,
        values=prediction.values,
        window=LUNG_WINDOW_HU if hu else (0.0, float(scan.values.max())),
    )
    return result, Findings(mask, probability, shown)
