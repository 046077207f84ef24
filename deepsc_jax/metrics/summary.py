"""From single scans to `metrics.json` and the printed table.

Undefined figures are None (`null` in JSON), never a number and never left out.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from jaxtyping import Bool, Float, Int

from deepsc_jax.config import CLASSES
from deepsc_jax.metrics import classification
from deepsc_jax.metrics.overlap import dice, sensitivity, specificity
from deepsc_jax.metrics.surface import normalized_surface_dice, root_mean_square_surface_distance
from deepsc_jax.runtime.types import JsonObject

NSD_TOLERANCE_MM = 3.0
# Key in metrics.json, and how the table prints it: name, decimals.
SEGMENTATION = {
    "dsc": ("DSC", 3),
    "sensitivity": ("sensitivity", 3),
    "specificity": ("specificity, lung", 3),
    "specificity_scan": ("specificity, scan", 3),
    "nsd": (f"NSD at {NSD_TOLERANCE_MM:g} mm", 3),
    "rmsd_mm": ("RMSD, mm", 1),
}
# Key in metrics.json, how the table prints it, and its measure.
CLASSIFICATION = {
    "accuracy": ("accuracy", classification.accuracy),
    "sensitivity": ("sensitivity, macro", classification.macro_sensitivity),
    "specificity": ("specificity, macro", classification.macro_specificity),
    "f1": ("F1, macro", classification.macro_f1),
    "auc": ("AUC, macro", classification.macro_auc),
}
LEGEND = "mean ± standard deviation over scans; RMSD: root mean square distance of the surfaces"


class ScanFigures(TypedDict):
    """The segmentation figures of a scan; None where one is not defined (`per_scan`)."""

    dsc: float | None
    sensitivity: float | None
    specificity: float | None
    specificity_scan: float | None
    nsd: float | None
    rmsd_mm: float | None
    has_lesion: bool
    missed: bool
    lesion_ml: float
    predicted_ml: float
    false_positive_ml: float


class Spread(TypedDict):
    """A figure over scans: `n` of them have it."""

    mean: float | None
    sd: float | None
    n: int


def per_scan(
    pred: Bool[np.ndarray, "D H W"],
    truth: Bool[np.ndarray, "D H W"],
    lung: Bool[np.ndarray, "D H W"],
    spacing_mm: Sequence[float],
    tolerance_mm: float = NSD_TOLERANCE_MM,
) -> ScanFigures:
    """The segmentation figures of one scan, a row for `summarise` once it has a `label`.

    Args:
        pred: the predicted lesion mask.
        truth: the true lesion mask.
        lung: the lung mask, over which `specificity` is taken.
        spacing_mm: voxel spacing in (D, H, W) order, mm.
        tolerance_mm: of the normalised surface Dice.

    Returns:
        `dsc`, `sensitivity`, `specificity` (over the lung), `specificity_scan`, `nsd` as shares;
        `rmsd_mm`; `lesion_ml`, `predicted_ml`, `false_positive_ml` in ml; `has_lesion`: the truth
        has one; `missed`: it has one and nothing was predicted, so that `dsc` and `nsd` are 0 and
        `rmsd_mm` is None. Without a lesion `dsc`, `sensitivity`, `nsd`, `rmsd_mm` are None.

    Raises:
        ValueError: the masks are not boolean volumes of one shape, or a spacing is not positive.
    """
    has_lesion = bool(truth.any())
    voxel_ml = math.prod(spacing_mm) / 1000
    row: ScanFigures = {
        "dsc": dice(pred, truth) if has_lesion else None,
        "sensitivity": _defined(sensitivity(pred, truth)),
        "specificity": _defined(specificity(pred, truth, lung)),
        "specificity_scan": _defined(specificity(pred, truth)),
        "nsd": None,
        "rmsd_mm": None,
        "has_lesion": has_lesion,
        "missed": has_lesion and not pred.any(),
        "lesion_ml": float(np.count_nonzero(truth) * voxel_ml),
        "predicted_ml": float(np.count_nonzero(pred) * voxel_ml),
        "false_positive_ml": float(np.count_nonzero(pred & ~truth) * voxel_ml),
    }
    if has_lesion:
        row["nsd"] = normalized_surface_dice(pred, truth, spacing_mm, tolerance_mm)
        row["rmsd_mm"] = _defined(root_mean_square_surface_distance(pred, truth, spacing_mm))
    return row


def summarise(
    rows: Sequence[JsonObject] = (),
    labels: Int[np.ndarray, "scans"] | None = None,
    probabilities: Float[np.ndarray, "scans classes"] | None = None,
    classes: Sequence[str] = CLASSES,
) -> JsonObject:
    """The content of `metrics.json`.

    `lesions` holds each figure of `per_scan` as `{"mean", "sd", "n"}` over the scans that have
    truth lesions (n: of them, those where it is defined; sd: sample standard deviation, None for
    n < 2), `missed` (scans with lesions and nothing predicted), the same again for the scans of
    each class that has lesions (`covid-19`, `cap`), and `lesion_free` for the others: share of
    scans with any false positive voxel, and their ml. `classes` holds the figures of the one
    run (sd is None), `confusion` (rows: label; columns: given class) and `classes`.

    Args:
        rows: one `per_scan` of each scan, with its class name as `label` where it has one.
        labels: the true class ids; left out for a segmentation-only run.
        probabilities: the class probabilities, a row per label.
        classes: the class names, by id.

    Raises:
        ValueError: labels and probabilities do not fit each other.
    """
    document: JsonObject = {}
    if rows:
        with_lesions = [row for row in rows if row["has_lesion"]]
        segmentation = _over_lesions(with_lesions)
        for name in classes:
            of_class = [row for row in with_lesions if row.get("label") == name]
            if of_class:
                segmentation[name] = _over_lesions(of_class)
        segmentation["lesion_free"] = _over_lesion_free(
            [row for row in rows if not row["has_lesion"]]
        )
        document["lesions"] = segmentation
    if labels is not None and probabilities is not None:
        document["classes"] = {
            key: {"mean": _defined(measure(labels, probabilities)), "sd": None, "n": len(labels)}
            for key, (_, measure) in CLASSIFICATION.items()
        } | {
            "confusion": classification.confusion_matrix(labels, probabilities).tolist(),
            "classes": list(classes),
        }
    return document


def table(metrics: JsonObject) -> str:
    """What `summarise` returned, as text to print."""
    parts = []
    if "lesions" in metrics:
        parts.append(_segmentation_table(metrics["lesions"]))
    if "classes" in metrics:
        parts.append(_classification_table(metrics["classes"]))
    if "indicators" in metrics:
        parts.append(_indicator_table(metrics["indicators"]))
    return "\n\n".join(parts)


def _over_lesions(rows: Sequence[JsonObject]) -> JsonObject:
    figures: JsonObject = {key: spread([row[key] for row in rows]) for key in SEGMENTATION}
    return figures | {"n": len(rows), "missed": sum(row["missed"] for row in rows)}


def _over_lesion_free(rows: Sequence[JsonObject]) -> JsonObject:
    false_positive_ml = [row["false_positive_ml"] for row in rows]
    with_false_positives = sum(volume > 0 for volume in false_positive_ml)
    return {
        "n": len(rows),
        "with_false_positives": with_false_positives,
        "share": with_false_positives / len(rows) if rows else None,
        "false_positive_ml": spread(false_positive_ml),
        "specificity": spread([row["specificity"] for row in rows]),
    }


def spread(values: Sequence[float | None]) -> Spread:
    """The mean and sample deviation of those that are defined."""
    defined = [value for value in values if value is not None]
    return {
        "mean": float(np.mean(defined)) if defined else None,
        "sd": float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
        "n": len(defined),
    }


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _segmentation_table(segmentation: JsonObject) -> str:
    groups = {"all": segmentation} | {
        name: group
        for name, group in segmentation.items()
        if isinstance(group, Mapping) and "dsc" in group
    }
    head = ["lesions", *(f"{name} (n={group['n']})" for name, group in groups.items())]
    lines = [
        [name, *(_figure(group[key], decimals) for group in groups.values())]
        for key, (name, decimals) in SEGMENTATION.items()
    ]
    missed = ["missed scans", *(str(group["missed"]) for group in groups.values())]
    text = aligned([head, *lines, missed])
    notes = (
        ["missed scans count as DSC = NSD = 0 and have no RMSD"] if segmentation["missed"] else []
    )
    return "\n".join([text, LEGEND, *notes, _lesion_free_line(segmentation["lesion_free"])])


def _lesion_free_line(free: JsonObject) -> str:
    if not free["n"]:
        return "no lesion-free scans"
    volume = _figure(free["false_positive_ml"], 1)
    return (
        f"lesion-free scans: {free['with_false_positives']} of {free['n']} with false positives, "
        f"{volume} ml a scan"
    )


def _classification_table(figures: JsonObject) -> str:
    scans = f"all (n={figures['accuracy']['n']})"
    lines = [[name, _figure(figures[key], 3)] for key, (name, _) in CLASSIFICATION.items()]
    confusion = [
        [f"is {name}", *map(str, counts)]
        for name, counts in zip(figures["classes"], figures["confusion"], strict=True)
    ]
    given = ["", *(f"given {name}" for name in figures["classes"])]
    return f"{aligned([['diagnosis', scans], *lines])}\n\n{aligned([given, *confusion])}"


def _indicator_table(figures: JsonObject) -> str:
    rows = [[f"indicator (n={figures['n']})", "r", "95 % of r", "R²", "MAE", "MSE"]]
    named = figures["each"] | {"mean of each": figures["mean"], "all pooled": figures["pooled"]}
    for name, one in (named | {"constant, pooled": figures["constant"]}).items():
        ends = [one.get(key) for key in ("r_low", "r_high")]
        between = "" if None in ends else "{:.2f} to {:.2f}".format(*ends)
        numbers = [one.get(key) for key in ("r2", "mae", "mse")]
        cells = ["-" if x is None else f"{x:.3f}" for x in (one["r"], *numbers)]
        rows.append([name, cells[0], between, *cells[1:]])
    note = "of shares of the way from the least to the largest training case"
    return f"{aligned(rows)}\n{note}"


def _figure(spread: Spread, decimals: int) -> str:
    if spread["mean"] is None:
        return "-"
    mean = f"{spread['mean']:.{decimals}f}"
    return mean if spread["sd"] is None else f"{mean} ± {spread['sd']:.{decimals}f}"


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines: a head, a rule, and the rest; the first column is text."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
