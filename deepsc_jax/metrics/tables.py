"""What `metrics.json` holds, as text to print."""

from collections.abc import Mapping, Sequence

from deepsc_jax.metrics.scan_figures import SEGMENTATION
from deepsc_jax.metrics.summary import CLASSIFICATION, DETECTION, Spread
from deepsc_jax.runtime.types import JsonObject

LEGEND = (
    "mean ± standard deviation over scans, and the mean's interval; RMSD, HD95, ASSD: root mean "
    "square,\n95th percentile and mean of the distances of the surfaces; LVR: share of the lungs"
)


def table(metrics: JsonObject) -> str:
    """What `summarise` returned, as text to print."""
    parts = []
    if "lesions" in metrics:
        parts.append(_segmentation_table(metrics["lesions"]))
        parts.append(_detection_table(metrics["lesions"]["detection"]))
    if "classes" in metrics:
        parts.append(_classification_table(metrics["classes"]))
    if "evidence" in metrics:
        parts.append(_evidence_table(metrics))
    if "indicators" in metrics:
        parts.append(_indicator_table(metrics["indicators"]))
    if "intervals" in metrics:
        parts.append(_method(metrics["intervals"]))
    return "\n\n".join(parts)


def _segmentation_table(segmentation: JsonObject) -> str:
    groups = {"all": segmentation} | {
        name: group
        for name, group in segmentation.items()
        if isinstance(group, Mapping) and "dsc" in group
    }
    heads = [f"{name} (n={group['n']})" for name, group in groups.items()]
    head = ["lesions", heads[0], "interval", *heads[1:]]
    lines = []
    for key, (name, decimals) in SEGMENTATION.items():
        cells = [_figure(group[key], decimals, group["n"]) for group in groups.values()]
        lines.append([name, cells[0], ends(segmentation[key], decimals), *cells[1:]])
    missed = [str(group["missed"]) for group in groups.values()]
    text = aligned([head, *lines, ["missed scans", missed[0], "", *missed[1:]]])
    notes = (
        ["missed scans count as DSC = NSD = 0 and have no distance"]
        if segmentation["missed"]
        else []
    )
    return "\n".join([text, LEGEND, *notes, _lesion_free_line(segmentation["lesion_free"])])


def _lesion_free_line(free: JsonObject) -> str:
    if not free["n"]:
        return "no lesion-free scans"
    volume = _figure(free["false_positive_ml"], 1, free["n"])
    return (
        f"lesion-free scans: {free['with_false_positives']} of {free['n']} with false positives, "
        f"{volume} ml a scan"
    )


def _detection_table(found: JsonObject) -> str:
    sizes = found["by_size_ml"]
    heads = [
        f"{size['from']:g} to {size['to']:g} ml" if size["to"] else f"from {size['from']:g} ml"
        for size in sizes
    ]
    head = [f"single lesions (of {found['scans']} scans)", "all", "interval", *heads]
    groups = [found, *sizes]
    counts = [f"{group['found']} of {group['found'] + group['missed']}" for group in groups]
    lines = [["found", counts[0], "", *counts[1:]]]
    for key, name in DETECTION.items():
        of_sizes = [_number(size[key]) for size in sizes]
        lines.append([name, _number(found[key]["value"]), ends(found[key], 3), *of_sizes])
    note = "found: intersection over union of 0.5 or more with one predicted lesion"
    return f"{aligned([head, *lines])}\n{note}"


def _classification_table(figures: JsonObject) -> str:
    scans = f"all (n={figures['accuracy']['n']})"
    lines = [
        [name, _number(figures[key]["mean"]), ends(figures[key], 3)]
        for key, (name, _) in CLASSIFICATION.items()
    ]
    for name, of_class in figures["by_class"].items():
        auc = of_class["auc"]
        lines.append([f"AUC, {name} (n={of_class['n']})", _number(auc["value"]), ends(auc, 3)])
    confusion = [
        [f"is {name}", *map(str, counts)]
        for name, counts in zip(figures["classes"], figures["confusion"], strict=True)
    ]
    given = ["", *(f"given {name}" for name in figures["classes"])]
    diagnosis = aligned([["diagnosis", scans, "interval"], *lines])
    return f"{diagnosis}\n\n{aligned([given, *confusion])}{_temperature(figures)}"


def _temperature(figures: JsonObject) -> str:
    if "temperature" not in figures:
        return ""
    found = figures["temperature"]
    return (
        f"\n\nat a temperature of {found['temperature']:.2f}, fitted on {found['scans']} scans of "
        f"validation: ECE {found['ece']:.3f}, Brier score {found['brier']:.3f}"
    )


# What the table of evidence prints: name, and where it is in metrics.json; `*` is the map.
EVIDENCE = {
    "AUC of lesion voxels": ("evidence", "*", "auc"),
    "energy in lesions": ("evidence", "*", "energy"),
    "highest voxel in a lesion": ("evidence", "*", "hit"),
    "DSC at its threshold": ("evidence", "*", "dice"),
    "energy in predicted lesions, right": ("agreement", "*", "right", "energy"),
    "energy in predicted lesions, wrong": ("agreement", "*", "wrong", "energy"),
    "deletion": ("perturbation", "*", "deletion"),
    "insertion": ("perturbation", "*", "insertion"),
    "deletion in random order": ("perturbation", "*", "random"),
}


def _evidence_table(metrics: JsonObject) -> str:
    maps = list(metrics["evidence"])
    wanted: dict[str, tuple[str, ...]] = dict(EVIDENCE)
    for check in metrics.get("sanity", {}):
        wanted[f"likeness, {check}"] = ("sanity", check, "*", "likeness")
    rows = []
    for name, place in wanted.items():
        found = [_at(metrics, [each if part == "*" else part for part in place]) for each in maps]
        if any(found):
            rows.append([name, *("-" if x is None else _figure(x, 3, x["n"]) for x in found)])
    tests = [_at(metrics, ("agreement", each, "difference", "energy")) for each in maps]
    if any(tests):
        rows.append(
            ["p that these are alike", *("-" if x is None else _number(x["p"]) for x in tests)]
        )
    return aligned([["evidence", *maps], *rows])


def _at(metrics: JsonObject, place: Sequence[str]) -> JsonObject | None:
    """What is at a place of metrics.json; None where it is not there."""
    for name in place:
        if name not in metrics:
            return None
        metrics = metrics[name]
    return metrics


def _indicator_table(figures: JsonObject) -> str:
    rows = [[f"indicator (n={figures['n']})", "r", "95 % of r", "R²", "MAE", "MSE"]]
    named = figures["each"] | {"mean of each": figures["mean"], "all pooled": figures["pooled"]}
    for name, one in (named | {"constant, pooled": figures["constant"]}).items():
        limits = [one.get(key) for key in ("r_low", "r_high")]
        between = "" if None in limits else "{:.2f} to {:.2f}".format(*limits)
        numbers = [one.get(key) for key in ("r2", "mae", "mse")]
        cells = ["-" if x is None else f"{x:.3f}" for x in (one["r"], *numbers)]
        rows.append([name, cells[0], between, *cells[1:]])
    note = "of shares of the way from the least to the largest training case"
    return f"{aligned(rows)}\n{note}"


def _method(made: JsonObject) -> str:
    return (
        f"intervals: {100 * made['level']:g} %, {made['method']}, {made['resamples']} resamples of "
        f"{made['patients']} patients; of a class's AUC by DeLong where each scan is a patient's"
    )


def _figure(spread: Spread | JsonObject, decimals: int, scans: int) -> str:
    """Mean and deviation; of how many, where some of the scans have none."""
    if spread["mean"] is None:
        return "-"
    mean = f"{spread['mean']:.{decimals}f}"
    text = mean if spread["sd"] is None else f"{mean} ± {spread['sd']:.{decimals}f}"
    return text if spread["n"] == scans else f"{text} (of {spread['n']})"


def ends(figure: Mapping[str, float | None] | Spread, decimals: int) -> str:
    """The ends of an interval, as a cell."""
    low, high = figure.get("low"), figure.get("high")
    return "" if low is None or high is None else f"{low:.{decimals}f} to {high:.{decimals}f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines: a head, a rule, and the rest; the first column is text."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
