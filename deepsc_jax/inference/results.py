"""One scan from its file to its result, around whatever computes the network.

DIR/NAME holds lesion_mask, lesion_probability and evidence_1..3 as NIfTI on the scan's own grid,
picture.png, report.html where its viewer is installed, DICOM objects of a DICOM series, and
result.json, which says what it was made from. Nothing here imports JAX: the processes that read
scans and write results do without.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from jaxtyping import Float

from deepsc_jax.data import lungs, preprocess, scans, unmasked, xrays
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.evaluation.centres import on_grid, salient_centres
from deepsc_jax.inference import dicom_results, identity
from deepsc_jax.inference.failures import told
from deepsc_jax.inference.identity import Sources
from deepsc_jax.inference.network import Network, network_digest
from deepsc_jax.inference.request import Request
from deepsc_jax.inference.writing import (
    classes_of,
    facts_of,
    finds_lungs,
    found_lungs,
    values_of,
    write,
)
from deepsc_jax.report import xray_picture
from deepsc_jax.report.scan_page import PAGE, scan_page
from deepsc_jax.report.viewer import installed
from deepsc_jax.runtime import exit_codes
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import FAILING, folder_aside, put_back, write_json
from deepsc_jax.runtime.types import JsonObject

Compute = Callable[[Float[np.ndarray, "depth height width"]], Prediction]


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
    by_it = result["made_from"] == {"network": network_digest(network)}
    return sources.are_of(result) and by_it and not identity.missing_and_changed(folder, result)[0]


def _found(request: Request, folder: pathlib.Path, result: JsonObject, sources: Sources) -> Outcome:
    """A result that was there, and what is to be said of it."""
    notes = [
        f"{folder / name}: has changed since it was written; it stays as it is"
        for name in identity.missing_and_changed(folder, result)[1]
    ]
    if result["scan"] != sources.scan.place:
        notes.append(f"{request.label}: has the content of {result['scan']}, whose result is there")
    return Outcome(request, result, skipped=True, notes=tuple(notes))


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
    request.require_readable(network.data)
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
    lesion = None
    if request.lesion_mask is not None:
        lesion = scans.load_mask(request.lesion_mask, scan, "lesion mask", allow, notes)
    sources.require_unchanged()
    prepared = unmasked.prepare(scan, lung, network.data, lesion, allow)
    prediction = compute(prepared.volume)
    if lung is None:
        lung = found_lungs(prediction, prepared.grid)
    with folder_aside(out, ours) as folder:
        figures, findings = write(
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
    xray, lesion, _ = xrays.load_with_masks(
        request.name, request.path, request.lesion_mask, boxes=request.boxes
    )
    sources.require_unchanged()
    prepared = xrays.prepare(xray, network.data, lesion, None, request.boxes, request.path)
    prediction = compute(prepared.volume)
    evidence = {
        name: preprocess.to_source(working, prepared.grid)[0]
        for name, working in prediction.evidence.items()
    }
    with folder_aside(out, ours) as folder:
        result = sources.facts() | facts_of(network) | classes_of(prediction, network)
        result |= values_of(prediction)
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
            values=prediction.values,
        )
        result["notes"] = list(prediction.notes)
        return _finished(result, folder, network)


def _finished(result: JsonObject, folder: pathlib.Path, network: Network) -> JsonObject:
    """The result with what it was made from and the sums of its files, written beside them."""
    made_from = {"network": network_digest(network)}
    result = identity.signed(result | {"made_from": made_from, "files": identity.manifest(folder)})
    write_json(result, folder / identity.RESULT)
    return result
