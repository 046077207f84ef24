"""One scan from its file to its result, around whatever computes the network.

DIR/NAME holds lesion_mask, lesion_probability and evidence_1..3 as NIfTI on the scan's own grid,
picture.png, and result.json, which says what it was made from. Nothing here imports JAX: the
processes that read scans and write results do without.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from deepsc_jax import __version__
from deepsc_jax.config import DataConfig
from deepsc_jax.data import lungs, preprocess, scans
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.data.preprocess import Prepared
from deepsc_jax.data.scans import Scan
from deepsc_jax.inference.requests import Request
from deepsc_jax.report.pictures import LUNG_WINDOW_HU, scan_picture
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import folder_aside, write_json

Compute = Callable[[Float[np.ndarray, "depth height width"]], Prediction]


@dataclass(frozen=True)
class Network:
    """What is known of a trained network where it is not computed.

    Attributes:
      data: how scans are preprocessed for it.
      stage: the stage whose checkpoint it is.
      threshold: lesion probability from which a voxel is lesion.
      trained_on: `phantoms`, `scans`, or `unknown data`.
      digest: another for other parameters, and for another architecture of the same ones.
      volumes: what it gives probabilities of, and maps of evidence, by name.
    """

    data: DataConfig
    stage: str
    threshold: float
    trained_on: str
    digest: str
    volumes: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a request: a result, made now or found whole, or the reason why there is none.

    Attributes:
      request: what was asked for.
      result: result.json's object; None where the scan could not be predicted.
      skipped: whether the result was there.
      error: why there is no result, in one line.
      seconds: from reading the scan to the result.
    """

    request: Request
    result: dict[str, Any] | None = None
    skipped: bool = False
    error: str | None = None
    seconds: float = 0.0


def attempt(
    request: Request, out: pathlib.Path, network: Network, compute: Compute, *, overwrite: bool
) -> Outcome:
    """Predict a scan unless that is done (with `overwrite` anyway); whatever fails is told."""
    folder, begun = out / request.name, time.monotonic()
    try:
        facts = made_from(request, network)
        result = None if overwrite else finished(folder, facts)
        if result is not None:
            return Outcome(request, result, skipped=True)
        try:
            result = predict_scan(request, folder, network, compute)
        except FileNotFoundError:  # another process was faster, and removed what was not needed
            result = finished(folder, facts)
            if result is None:
                raise
        return Outcome(request, result, seconds=time.monotonic() - begun)
    except InputError as error:
        return Outcome(request, error=str(error))
    except Exception as error:  # the other scans must not be lost to it
        traceback.print_exception(error)
        return Outcome(request, error=f"{request.path}: {type(error).__name__}: {error}")


def made_from(request: Request, network: Network) -> dict[str, str]:
    """What a result depends on: the network, and its files' names, sizes and times."""
    facts = [dataclasses.asdict(network.data), network.stage, network.threshold, network.trained_on]
    paths = [path for path in (request.path, request.lung_mask) if path is not None]
    files = [f for p in paths for f in (sorted(p.iterdir()) if p.is_dir() else [p]) if f.is_file()]
    stats = [(file.name, file.stat()) for file in files]
    found = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    masked = request.lung_mask is not None
    return {
        "network": _digest([__version__, network.digest, *facts]),
        "files": _digest([found, masked]),
    }


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def finished(folder: pathlib.Path, facts: dict[str, str]) -> dict[str, Any] | None:
    """The result in `folder` if it is whole and made from that (see `made_from`)."""
    try:
        result = json.loads((folder / "result.json").read_text("utf-8"))
        sizes: dict[str, int] = result["files"]
        whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
        return result if whole and result["made_from"] == facts else None
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        return None  # none, of an earlier version, or not whole


def predict_scan(
    request: Request, out: pathlib.Path, network: Network, compute: Compute
) -> dict[str, Any]:
    """Predict one scan into `out`, which appears whole or not at all; returns result.json's object.

    An earlier result there is replaced.

    Raises:
      InputError: the scan or its lung mask is not usable, or `out` holds something else.
    """
    if out.exists() and not (out / "result.json").is_file():
        raise InputError(
            f"{out}: exists and holds no earlier result, expected a new folder: give another --out"
        )
    facts = made_from(request, network)  # before it is read: a file that changes meanwhile is seen
    scan = scans.load_scan(request.path, network.data.intensity)
    if request.lung_mask is None:
        lung = lungs.find_lungs(scan, network.data.intensity)
    else:
        lung = scans.load_mask(request.lung_mask, scan, "lung mask")
    prepared = preprocess.prepare_scan(scan, lung, network.data)
    prediction = compute(prepared.volume)
    with folder_aside(out) as folder:
        result = _write(folder, scan, lung, prepared, prediction, network)
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        result = {"scan": str(request.path), **result, "made_from": facts, "files": sizes}
        write_json(result, folder / "result.json")
    return result


def _write(
    folder: pathlib.Path,
    scan: Scan,
    lung: Bool[np.ndarray, "depth height width"],
    prepared: Prepared,
    prediction: Prediction,
    network: Network,
) -> dict[str, Any]:
    """Write a prediction's images and picture; returns the figures of its result."""
    voxel_ml = float(np.prod(scan.spacing_mm)) / 1000
    result: dict[str, Any] = {
        "stage": network.stage,
        "trained_on": network.trained_on,
        "lung_ml": float(lung.sum()) * voxel_ml,
        "note": "research software, not for clinical use",
    }
    probability = mask = shown = classes = None
    if prediction.lesion is not None:
        # Outside of the lungs the network sees nothing.
        probability = np.where(lung, preprocess.to_source(prediction.lesion, prepared.grid), 0)
        mask = probability >= network.threshold
        scans.save_like(probability, scan, folder / "lesion_probability.nii.gz", np.float32)
        scans.save_like(mask, scan, folder / "lesion_mask.nii.gz", np.uint8)
        lesion_ml = float(mask.sum()) * voxel_ml
        result |= {"lesion_ml": lesion_ml, "lesion_threshold": network.threshold}
        result["lesion_share_of_lung"] = float(mask.sum() / lung.sum())
    if prediction.classes is not None:
        given: list[float] = prediction.classes.tolist()
        classes = dict(zip(network.data.classes, given, strict=True))
        result |= {"probabilities": classes, "class": max(classes, key=lambda c: classes[c])}
        result["evidence_share_in_lung"] = []
        for name, working in prediction.evidence.items():
            evidence = preprocess.to_source(working, prepared.grid)
            scans.save_like(evidence, scan, folder / f"{name}.nii.gz", np.float32)
            share = float(evidence[lung].sum() / max(evidence.sum(), 1e-6))
            result["evidence_share_in_lung"].append(share)
            if shown is None:  # the finest: the picture shows its part inside the lungs
                shown = np.where(lung, evidence, 0)
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
        trained_on=network.trained_on,
        window=LUNG_WINDOW_HU if hu else (0.0, float(scan.values.max())),
    )
    return result
