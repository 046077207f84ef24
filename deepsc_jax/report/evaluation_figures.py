"""The figures in the page of an evaluation, as SVG."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from deepsc_jax.metrics.calibration import expected_calibration_error, reliability
from deepsc_jax.metrics.statistics import pr_area, roc_area
from deepsc_jax.report.figures import drawn
from deepsc_jax.report.pictures import SPELLED_OUT

# Of a class: colours of Okabe and Ito, and lines and marks that differ without them.
STYLES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", ":", "^"),
    ("#CC79A7", "-.", "D"),
    ("#56B4E9", (0, (5, 1, 1, 1, 1, 1)), "v"),
)
SHORT = {"covid-19": "COVID-19", "cap": "CAP"}

Corner = Literal["lower right", "upper right", "upper left"]
Labels = Int[np.ndarray, "scans"]
Probabilities = Float[np.ndarray, "scans classes"]


def roc(labels: Labels, probabilities: Probabilities, classes: Sequence[str]) -> str:
    """The ROC curve of each class that has scans and others, as an address for `src`."""
    figure, axes = _axes("1 − specificity", "sensitivity")
    axes.plot([0, 1], [0, 1], color="#8c8c8c", linewidth=0.8)
    for index, name in enumerate(classes):
        truth, scores = labels == index, probabilities[:, index]
        if truth.any() and not truth.all():
            false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
            _curve(axes, index, false, true, f"{short(name)}: AUC {roc_area(truth, scores):.3f}")
    return source(figure, axes)


def precision_recall(labels: Labels, probabilities: Probabilities, classes: Sequence[str]) -> str:
    """The precision-recall curve of each class that has scans, as an address for `src`."""
    figure, axes = _axes("sensitivity (recall)", "precision")
    for index, name in enumerate(classes):
        truth, scores = labels == index, probabilities[:, index]
        if truth.any():
            precision, recall, _ = precision_recall_curve(truth, scores)
            area = pr_area(truth, scores)
            _curve(axes, index, recall, precision, f"{short(name)}: {area:.3f}", "steps-pre")
    return source(figure, axes)


def reliability_curve(labels: Labels, probabilities: Probabilities) -> str:
    """How often the given class is right, by its probability, as an address for `src`."""
    figure, axes = _axes("probability of the given class", "share that is right")
    axes.plot([0, 1], [0, 1], color="#8c8c8c", linewidth=0.8)
    curve = reliability(labels, probabilities)
    axes.plot(curve.confidence, curve.frequency, color="#0072B2", linewidth=1)
    sizes = 30 + 300 * curve.scans / curve.scans.sum()
    axes.scatter(curve.confidence, curve.frequency, s=sizes, color="#0072B2", zorder=3)
    for x, y, scans in zip(curve.confidence, curve.frequency, curve.scans, strict=True):
        place = (0, -16 if y > 0.9 else 10)
        axes.annotate(str(scans), (x, y), place, textcoords="offset points", ha="center", size=9)
    error = expected_calibration_error(labels, probabilities)
    axes.plot([], [], "o-", color="#0072B2", label=f"scans counted; ECE {error:.3f}")
    return source(figure, axes)


def dice_distribution(scores: Mapping[str, Sequence[float]]) -> str:
    """The DSC of every scan, and its quartiles, by class, as an address for `src`."""
    figure = Figure(figsize=(4.6, 4.2), facecolor="white")
    axes = figure.add_subplot()
    names = list(scores)
    values = [np.asarray(scores[name]) for name in names]
    places = np.arange(1, len(names) + 1)
    axes.boxplot(
        values, positions=places, widths=0.55, showfliers=False, medianprops={"color": "k"}
    )
    for place, dots in zip(places, values, strict=True):
        spread = np.linspace(-0.18, 0.18, len(dots)) if len(dots) > 1 else np.zeros(len(dots))
        colour, _, mark = STYLES[(place - 1) % len(STYLES)]
        axes.plot(place + spread, dots, mark, color=colour, alpha=0.65, markersize=5)
    labels = [f"{short(n)}\nn = {len(v)}" for n, v in zip(names, values, strict=True)]
    axes.set_xticks(places, labels)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("DSC")
    axes.grid(alpha=0.3, axis="y")
    return source(figure, None)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 4.2), facecolor="white")
    axes = figure.add_subplot()
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _curve(
    axes: Axes, index: int, x: np.ndarray, y: np.ndarray, label: str, steps: str = "steps-post"
) -> None:
    colour, line, _ = STYLES[index % len(STYLES)]
    axes.plot(x, y, color=colour, linestyle=line, linewidth=2, drawstyle=steps, label=label)


def short(name: str) -> str:
    """A class's name, drawn; a long one cut."""
    said = SHORT.get(name, SPELLED_OUT.get(name, drawn(name)))
    return said if len(said) <= 24 else f"{said[:23]}…"


def source(figure: Figure, axes: Axes | None, legend: Corner = "lower right") -> str:
    """A figure as an address for `src`, with a legend of `axes` at a place of theirs."""
    if axes is not None and axes.get_legend_handles_labels()[0]:
        axes.legend(loc=legend, fontsize=9, framealpha=0.9)
    figure.tight_layout()
    drawing = io.StringIO()
    # Of the same figure the same bytes: neither a date nor random names of its parts.
    with rc_context({"svg.hashsalt": "deepsc_jax", "svg.fonttype": "path"}):
        FigureCanvasSVG(figure).print_svg(drawing, metadata={"Date": None})
    letters = base64.b64encode(drawing.getvalue().encode("utf-8")).decode("ascii")
    return f"data:image/svg+xml;base64,{letters}"
