"""Find lesions in scans, classify them, and show the evidence.

    python -m deepsc_jax.predict --checkpoint=WORKDIR --scan=scan.nii.gz --out=DIR

Several scans: repeat --scan. A scan is a NIfTI file or a folder of DICOM slices. For each, DIR/NAME
holds lesion_mask, lesion_probability and evidence_1..3 as NIfTI on the scan's own grid,
result.json and picture.png. A scan that cannot be predicted is named in one line, the others are
done, and the exit code is 1. Research software, not for clinical use.
"""

import collections
import pathlib
import sys
import time
import traceback

import numpy as np
from absl import flags

from deepsc_jax import inference, program
from deepsc_jax.config import CLASSES, STAGES
from deepsc_jax.data import lungs, preprocess, scans
from deepsc_jax.errors import InputError
from deepsc_jax.files import folder_aside, write_json
from deepsc_jax.inference import Predictor
from deepsc_jax.report.pictures import LUNG_WINDOW_HU, scan_picture


def predict(
    predictor: Predictor,
    path: pathlib.Path,
    out: pathlib.Path,
    lung_mask: pathlib.Path | None = None,
) -> dict:
    """Predict one scan into `out`, which appears whole or not at all; returns result.json's object.

    An earlier result there is replaced.

    Raises:
      InputError: the scan or its lung mask is not usable, or `out` holds something else.
    """
    if out.exists() and not (out / "result.json").is_file():
        raise InputError(
            f"{out}: exists and holds no earlier result, expected a new folder: give another --out"
        )
    data = predictor.config.data
    scan = scans.load_scan(path, data.intensity)
    if lung_mask is None:
        lung = lungs.find_lungs(scan, data.intensity)
    else:
        lung = scans.load_mask(lung_mask, scan, "lung mask")
    prepared = preprocess.prepare_scan(scan, lung, data)
    prediction = predictor(prepared.volume)

    voxel_ml = float(np.prod(scan.spacing_mm)) / 1000
    result: dict = {
        "scan": str(path),
        "stage": predictor.stage,
        "trained_on": predictor.trained_on,
        "lung_ml": float(lung.sum()) * voxel_ml,
        "note": "research software, not for clinical use",
    }
    probability = mask = shown = classes = None
    with folder_aside(out) as folder:
        if prediction.lesion is not None:
            # Outside of the lungs the network sees nothing.
            probability = np.where(lung, preprocess.to_source(prediction.lesion, prepared.grid), 0)
            mask = probability >= predictor.threshold
            scans.save_like(probability, scan, folder / "lesion_probability.nii.gz", np.float32)
            scans.save_like(mask, scan, folder / "lesion_mask.nii.gz", np.uint8)
            lesion_ml = float(mask.sum()) * voxel_ml
            result |= {"lesion_ml": lesion_ml, "lesion_threshold": predictor.threshold}
            result["lesion_share_of_lung"] = float(mask.sum() / lung.sum())
        if prediction.probabilities is not None and prediction.evidence is not None:
            found: list[float] = prediction.probabilities.tolist()
            classes = {str(name): value for name, value in zip(CLASSES, found, strict=True)}
            result |= {"probabilities": classes, "class": max(classes, key=lambda c: classes[c])}
            result["evidence_share_in_lung"] = []
            for level, working in enumerate(prediction.evidence, start=1):
                evidence = preprocess.to_source(working, prepared.grid)
                scans.save_like(evidence, scan, folder / f"evidence_{level}.nii.gz", np.float32)
                share = float(evidence[lung].sum() / max(evidence.sum(), 1e-6))
                result["evidence_share_in_lung"].append(share)
                if level == 1:  # the finest: the picture shows its part inside the lungs
                    shown = np.where(lung, evidence, 0)
        window = LUNG_WINDOW_HU if data.intensity == "hu" else (0.0, float(scan.values.max()))
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
            trained_on=predictor.trained_on,
            window=window,
        )
        write_json(result, folder / "result.json")
    return result


def describe(result: dict) -> str:
    """One line about a result."""
    parts = []
    if "class" in result:
        name = result["class"]
        parts.append(f"{name} ({result['probabilities'][name]:.0%})")
    if "lesion_ml" in result:
        share = result["lesion_share_of_lung"]
        parts.append(f"{result['lesion_ml']:.0f} ml of lesion, {share:.1%} of the lungs")
    if result["trained_on"] != "scans":
        parts.append(f"by a network trained on {result['trained_on']}")
    return ", ".join(parts)


def main() -> int:
    """Predict every scan; 1 if one of them could not be predicted."""
    options = flags.FLAGS
    paths = [pathlib.Path(path) for path in options.scan]
    masks = [pathlib.Path(path) for path in options.lung_mask] or [None] * len(paths)
    if len(masks) != len(paths):
        raise InputError(
            f"--lung_mask: {len(masks)} given for {len(paths)} scans: give one per --scan, in order"
        )
    names = [scans.scan_name(path) for path in paths]
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise InputError(
            f"--scan: two scans are named {repeated[0]}, as their results would be: predict them "
            "into different --out"
        )
    predictor = inference.load(pathlib.Path(options.checkpoint), options.stage)
    failed = 0
    for path, mask, name in zip(paths, masks, names, strict=True):
        begun = time.monotonic()
        try:
            result = predict(predictor, path, pathlib.Path(options.out) / name, mask)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
        except Exception as error:  # the other scans must not be lost to it
            traceback.print_exception(error)
            print(f"error: {path}: {type(error).__name__}: {error}", file=sys.stderr)
            failed += 1
        else:
            print(f"{name}: {describe(result)} ({time.monotonic() - begun:.1f} s)")
    if failed:
        print(f"{failed} of {len(paths)} scans could not be predicted", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "A training run's --workdir.", required=True)
    flags.DEFINE_multi_string("scan", None, "NIfTI file or DICOM folder; repeat for more.")
    flags.mark_flag_as_required("scan")
    flags.DEFINE_multi_string("lung_mask", [], "Lung mask of each scan; default: found.")
    flags.DEFINE_string("out", None, "Folder for the results.", required=True)
    flags.DEFINE_enum("stage", None, STAGES, "Whose checkpoint; default: the last one trained.")
    program.run(main)
