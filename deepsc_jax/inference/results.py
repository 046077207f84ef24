"""One scan from its file to its result, around whatever computes the network.

DIR/NAME holds lesion_mask, lesion_probability and evidence_1..3 as NIfTI on the scan's own grid,
picture.png, report.html where its viewer is installed, DICOM objects of a DICOM series, and
result.json, which says what it was made from. Nothing here imports JAX: the processes that read
scans and write results do without.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from jaxtyping import Bool, Float

from deepsc_jax import __version__
from deepsc_jax.config import DataConfig
from deepsc_jax.data import lungs, preprocess, scans, unmasked, xrays
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.data.preprocess import Prepared
from deepsc_jax.data.scans import Scan
from deepsc_jax.evaluation.centres import on_grid, salient_centres
from deepsc_jax.inference import dicom_results, identity
from deepsc_jax.inference.failures import told
from deepsc_jax.inference.identity import Sources
from deepsc_jax.inference.masks import lesion_mask
from deepsc_jax.inference.options import PredictionOptions
from deepsc_jax.inference.requests import Request
from deepsc_jax.report import xray_picture
from deepsc_jax.report.pictures import LUNG_WINDOW_HU, scan_picture
from deepsc_jax.report.scan_page import PAGE, scan_page
from deepsc_jax.report.scan_tables import Findings
from deepsc_jax.report.viewer import installed
from deepsc_jax.runtime import exit_codes
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import FAILING, folder_aside, put_back, write_json
from deepsc_jax.runtime.types import JsonObject

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
      options: what is made of its predictions.
      networks: whose mean it is.
    """

    data: DataConfig
    stage: str
    threshold: float
    trained_on: str
    digest: str
    volumes: tuple[str, ...]
    options: PredictionOptions = dataclasses.field(default_factory=PredictionOptions)
    networks: int = 1


@dataclass(frozen=True)
class Outcome:
    """What became of a request: a result, made now or found whole, or the reason why there is none.

    Attributes:
      request: what was asked for.
      result: result.json's object; None where the scan could not be predicted.
      skipped: whether the result was there.
      error: why there is no result, in one line.
      code: the exit code that the error is worth.
      seconds: from reading the scan to the result.
      notes: what is to be said of a result that was there, a line each.
    """

    request: Request
    result: JsonObject | None = None
    skipped: bool = False
    error: str | None = None
    code: int = exit_codes.BAD_INPUT
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


def attempt(
    request: Request,
    out: pathlib.Path,
    network: Network,
    compute: Compute,
    *,
    overwrite: bool,
    allow: Collection[str] = (),
) -> Outcome:
    """Predict a scan unless that is done (with `overwrite` anyway); whatever fails is told.

    A result is done if it is of a scan and a lung mask of the same content, by the same network,
    and all its files are there. One that is not is made again; `identity.require_replaceable` says
    which results that may replace.
    """
    folder, begun = out / request.name, time.monotonic()
    try:
        put_back(folder)
        earlier = identity.read_result(folder)
        sources = request.sources(earlier)
        if not overwrite and is_done(earlier, folder, sources, network):
            return _found(request, folder, earlier, sources)
        try:
            result = predict_scan(
                request,
                folder,
                network,
                compute,
                sources=sources,
                overwrite=overwrite,
                allow=allow,
            )
        except FileNotFoundError:  # another process was faster, and removed what was not needed
            earlier = identity.read_result(folder)
            if not is_done(earlier, folder, sources, network):
                raise
            return _found(request, folder, earlier, sources)
        return Outcome(request, result, seconds=time.monotonic() - begun)
    except Exception as error:  # the other scans must not be lost to it
        failed = isinstance(error, OSError) and error.errno in FAILING
        code = exit_codes.FILE_SYSTEM if failed else exit_codes.BAD_INPUT
        return Outcome(request, error=told(error, request, out), code=code)


def is_done(
    result: JsonObject | None, folder: pathlib.Path, sources: Sources, network: Network
) -> TypeGuard[JsonObject]:
    """Whether a result is of those files, by that network, and its files are all there."""
    if result is None:
        return False
    facts = sources.facts()
    keys = ("sha256", "lung_mask_sha256", "identifiers")
    made_from = all(result.get(key) == facts.get(key) for key in keys)
    by_it = result["made_from"] == {"network": network_digest(network)}
    return made_from and by_it and not identity.missing_and_changed(folder, result)[0]


def _found(request: Request, folder: pathlib.Path, result: JsonObject, sources: Sources) -> Outcome:
    """A result that was there, and what is to be said of it."""
    notes = [
        f"{folder / name}: has changed since it was written; it stays as it is"
        for name in identity.missing_and_changed(folder, result)[1]
    ]
    if result["scan"] != sources.scan.place:
        notes.append(f"{request.label}: has the content of {result['scan']}, whose result is there")
    return Outcome(request, result, skipped=True, notes=tuple(notes))


def network_digest(network: Network) -> str:
    """What a result depends on beside its scan and lung mask, as a SHA-256."""
    data = dataclasses.asdict(network.data)
    facts = [__version__, network.digest, data, network.stage]
    facts += [network.threshold, network.trained_on, network.options.facts()]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def predict_scan(
    request: Request,
    out: pathlib.Path,
    network: Network,
    compute: Compute,
    *,
    sources: Sources | None = None,
    overwrite: bool = False,
    allow: Collection[str] = (),
) -> JsonObject:
    """Predict one scan into `out`, which appears whole or not at all; returns result.json's object.

    Args:
      request: the scan, and its lung mask if there is one.
      out: the folder of the result; an earlier result there is replaced if it may be.
      network: what is known of the network.
      compute: the network.
      sources: what `identity.identify` says of the request, if it was asked before.
      overwrite: whether a result may be replaced whose scan, at the same path, had other content.
      allow: doubts about the scan (`source.KINDS`) that become notes of the result.

    Raises:
      InputError: the scan or its lung mask is not usable, or `out` holds something else.
    """
    sources = sources or request.sources()
    ours = functools.partial(
        identity.require_replaceable, sources=sources, overwrite=overwrite, read=set()
    )
    ours(out)
    if network.data.modality == "xray":
        return _predict_xray(request, out, network, compute, sources, ours)
    scan = scans.load_scan(request.path, network.data.intensity, allow)
    if request.private:
        scan = dataclasses.replace(scan, name=request.name)
    lung, notes = None, list[str]()
    if request.lung_mask is not None:
        lung = scans.load_mask(request.lung_mask, scan, "lung mask", allow, notes)
    elif not finds_lungs(network.volumes):
        lung = lungs.find_lungs(scan, network.data.intensity)
    sources.require_unchanged()
    prepared = unmasked.prepare(scan, lung, network.data, allow=allow)
    prediction = compute(prepared.volume)
    if lung is None:
        lung = found_lungs(prediction, prepared.grid)
    with folder_aside(out, ours) as folder:
        figures, findings = _write(
            folder, scan, lung, prepared, prediction, network, given=request.lung_mask is not None
        )
        result = sources.facts() | figures
        if scan.files:
            masks, made = (lung, findings.lesion_mask), (prediction, prepared.grid)
            kept, digest = request.keep_identifiers, network_digest(network)
            notes += dicom_results.write(folder, scan, *masks, *made, result, digest, kept)
        told_notes = [request.without_names(note) for note in (*prepared.notes, *notes)]
        result |= {
            "notes": [*told_notes, *prediction.notes],
            "made_from": {"network": network_digest(network)},
        }
        if (viewer := installed()) is not None:
            scan_page(
                folder / PAGE,
                viewer,
                scan.values,
                lung,
                findings,
                result,
                spacing_mm=scan.spacing_mm,
                title=scan.name,
                picture=folder / "picture.png",
                hu=network.data.intensity == "hu",
            )
        return _finished(result, folder, network)


def _predict_xray(
    request: Request,
    out: pathlib.Path,
    network: Network,
    compute: Compute,
    sources: Sources,
    ours: Callable[[pathlib.Path], set[str]],
) -> JsonObject:
    """The same of an X-ray."""
    if request.lung_mask is not None:
        raise InputError(
            f"--lung_mask={request.lung_mask}: {request.path} is an X-ray for a network that needs "
            "none: leave it out"
        )
    xray = xrays.load_xray(request.path)
    sources.require_unchanged()
    prepared = xrays.prepare(xray, network.data)
    prediction = compute(prepared.volume)
    evidence = {
        name: preprocess.to_source(working, prepared.grid)[0]
        for name, working in prediction.evidence.items()
    }
    with folder_aside(out, ours) as folder:
        result = sources.facts() | _facts(network) | _classes(prediction, network)
        classes = result.get("probabilities")
        for name, heat in evidence.items():
            xray_picture.save_overlay(folder / f"{name}.png", xray[0], heat)
            result["salient_centres"] = np.round(salient_centres(on_grid(heat)), 4).tolist()
        xray_picture.xray_picture(
            folder / "picture.png",
            xray[0],
            next(iter(evidence.values()), None),
            classes,
            title=request.name if request.private else request.path.name,
            trained_on=network.trained_on,
        )
        result["notes"] = list(prediction.notes)
        return _finished(result, folder, network)


def _finished(result: JsonObject, folder: pathlib.Path, network: Network) -> JsonObject:
    """The result with what it was made from and the sums of its files, written beside them."""
    made_from = {"network": network_digest(network)}
    result = identity.signed(result | {"made_from": made_from, "files": identity.manifest(folder)})
    write_json(result, folder / identity.RESULT)
    return result


def _facts(network: Network) -> JsonObject:
    """What every result says of the network."""
    return {
        "stage": network.stage,
        "trained_on": network.trained_on,
        "note": "research software, not for clinical use",
        **network.options.facts(),
        "networks": network.networks,
    }


def _classes(prediction: Prediction, network: Network) -> JsonObject:
    """The most probable class, and the probability of each."""
    if prediction.classes is None:
        return {}
    exact = dict(zip(network.data.classes, prediction.classes.tolist(), strict=True))
    return {
        "probabilities": {name: round(share, 4) for name, share in exact.items()},
        "class": max(exact, key=lambda c: exact[c]),
    }


def finds_lungs(volumes: Collection[str]) -> bool:
    """Whether a network that gives these needs no lungs."""
    return {"left_lung", "right_lung"} <= set(volumes)


def found_lungs(
    prediction: Prediction, grid: preprocess.WorkingGrid
) -> Bool[np.ndarray, "depth height width"]:
    """Both lungs, lesions included, as a network found them, on the source's grid."""
    both = sum(prediction.volumes[name] for name in ("left_lung", "right_lung", "lesion"))
    return preprocess.to_source(np.asarray(both), grid) >= 0.5


def _write(
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
    result: JsonObject = _facts(network) | {"lung_ml": round(float(lung.sum()) * voxel_ml, 2)}
    probability = mask = shown = classes = None
    if prediction.lesion is not None:
        probability = preprocess.to_source(prediction.lesion, prepared.grid)
        inside = lung if network.data.mask == "lungs" else None
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
        result |= _classes(prediction, network)
    if prediction.classes is not None or prediction.evidence:
        result["evidence_share_in_lung"] = []
    for name, working in prediction.evidence.items():
        evidence = preprocess.to_source(working, prepared.grid)
        scans.save_like(evidence, scan, folder / f"{name}.nii.gz", np.float32)
        share = float(evidence[lung].sum() / max(evidence.sum(), 1e-6))
        result["evidence_share_in_lung"].append(round(share, 4))
        if shown is None:  # the finest: the picture shows its part inside the lungs
            shown = np.where(lung, evidence, 0)
    if prediction.values:
        numbers = {name: float(value) for name, value in prediction.values.items()}
        result["values"] = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
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
        window=LUNG_WINDOW_HU if hu else (0.0, float(scan.values.max())),
    )
    return result, Findings(mask, probability, shown)
