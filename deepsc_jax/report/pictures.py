"""The picture of a scan: what was found in it, where, and on what evidence."""

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from deepsc_jax.report.curves import loss_curves
from deepsc_jax.report.figures import drawn, save_png
from deepsc_jax.runtime.names import shown

__all__ = ["loss_curves", "scan_picture", "telling_slices"]

LUNG_WINDOW_HU = (-1000.0, 200.0)
PREDICTED, TRUE, MARK, MUTED = "#E69F00", "#56B4E9", "#F0E442", "#8C8C8C"
# Of classes whose names are short; others are drawn as they are.
SPELLED_OUT = {"cap": "community-acquired pneumonia", "covid-19": "COVID-19"}
NOT_CLINICAL = "research use only, not for clinical use"


def scan_picture(
    path: str | os.PathLike[str],
    values_hu: Float[np.ndarray, "D H W"],
    lesion_probability: Float[np.ndarray, "D H W"] | None,
    lesion_mask: Bool[np.ndarray, "D H W"] | None,
    evidence: Float[np.ndarray, "D H W"] | None,
    class_probabilities: Mapping[str, float] | None,
    *,
    spacing_mm: Sequence[float],
    title: str,
    truth: Bool[np.ndarray, "D H W"] | None = None,
    lung_mask: Bool[np.ndarray, "D H W"] | None = None,
    window: tuple[float, float] = LUNG_WINDOW_HU,
    threshold: float | None = None,
    lungs: str = "given",
    trained_on: str = "scans",
    values: Mapping[str, float] | None = None,
    slices: int = 4,
) -> None:
    """Writes a PNG of a scan's most telling slices, with lesions and evidence drawn in.

    Above, the slices with lesion contours; below, the same slices under the evidence for the most
    probable class (the lesion probability where there is no evidence); beside them a coronal view
    with the slices marked, and the class probabilities. Slices are seen from the feet, with the
    patient's right on the left, as radiologists do. They are counted from the lowest, which is 1.
    Below it all stands how to read it.

    Args:
        path: of the PNG; it appears whole or not at all.
        values_hu: the scan (D, H, W) in canonical orientation, HU.
        lesion_probability: 0 to 1, or None.
        lesion_mask: the predicted lesions, or None (a classification-only run).
        evidence: the finest mask, 0 to 1, where 1 is the scan's most, or None (a segmentation-only
            run).
        class_probabilities: by class name, or None (a segmentation-only run).
        spacing_mm: voxel spacing in (D, H, W) order, mm.
        title: what is shown, e.g. the scan's name.
        truth: the true lesions, where they are known.
        lung_mask: the view is cut to it.
        values: numbers by name, which stand in the place of classes.
        window: the values drawn black and white; HU, or the image's own unit.
        threshold: the lesion probability from which a voxel is lesion, where it is known.
        lungs: whether the lung mask was `given` or `found`.
        trained_on: what the network was trained on; if not scans, the footer says it.
        slices: how many slices to show.
    """
    heat, heat_name = _heat(lesion_probability, evidence, class_probabilities)
    rows, columns = _view(lung_mask, values_hu.shape, spacing_mm)
    indices = telling_slices(lesion_mask, heat, lung_mask, values_hu.shape[0], slices)
    _, height_mm, width_mm = spacing_mm
    view_mm = (rows.stop - rows.start) * height_mm, (columns.stop - columns.start) * width_mm
    figure, grid = _page(slices, view_mm[0] / view_mm[1])
    for column, index in enumerate(indices):
        upper = figure.add_subplot(grid[0, column])
        lower = figure.add_subplot(grid[1, column])
        for axes in (upper, lower):
            _draw_ct(axes, values_hu[index, rows, columns], height_mm / width_mm, window)
        upper.set_title(f"slice {index + 1} of {values_hu.shape[0]}", fontsize=12)
        _outline(upper, _at(lesion_mask, (index, rows, columns)), PREDICTED)
        _outline(upper, _at(truth, (index, rows, columns)), TRUE, dashed=True)
        _draw_heat(lower, _at(heat, (index, rows, columns)))
        if column == 0:
            for axes in (upper, lower):
                _letter(axes, 0.03, "R")
                _letter(axes, 0.97, "L")

    side = grid[:, slices].subgridspec(2, 1, height_ratios=[1.0, 0.62], hspace=0.3)
    coronal = figure.add_subplot(side[0])
    _draw_coronal(coronal, values_hu, heat, lesion_mask, lung_mask, columns, spacing_mm, window)
    for index in indices:
        coronal.axhline(index, color=MARK, linewidth=1.2)
        coronal.annotate(
            str(index + 1),
            (1.0, index),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
            annotation_clip=False,
        )
    coronal.set_title("coronal, slices marked", fontsize=12)
    draw_probabilities(figure.add_subplot(side[1]), class_probabilities, values)

    height = figure.get_figheight()
    title = shown(title)
    title = title if len(title) <= 90 else f"{title[:43]}…{title[-44:]}"
    figure.text(0.015, 1 - 0.3 / height, drawn(title), va="center", fontsize=16, fontweight="bold")
    volumes = _volumes(lesion_mask, truth, lung_mask, spacing_mm)
    figure.text(0.015, 1 - 0.68 / height, volumes, va="center", fontsize=12)
    _legend(figure, lesion_mask, truth)
    if heat is not None:
        _colour_bar(figure, heat_name)
    footer = (
        NOT_CLINICAL
        if trained_on == "scans"
        else f"network trained on {drawn(trained_on)}; {NOT_CLINICAL}"
    )
    lines = [*_reading(window, lesion_mask, lung_mask, threshold, lungs), footer]
    for line, inches in zip(lines, (0.64, 0.42, 0.2), strict=True):
        figure.text(
            0.985, inches / height, line, ha="right", va="center", fontsize=11, color="#555555"
        )
    save_png(figure, path)


def telling_slices(
    lesion_mask: Bool[np.ndarray, "D H W"] | None,
    heat: Float[np.ndarray, "D H W"] | None,
    lung_mask: Bool[np.ndarray, "D H W"] | None,
    depth: int,
    count: int,
) -> list[int]:
    """Up to `count` slice indices, upmost first: those that show most, spread out in depth.

    A slice's score is its lesion area and, less, the area of strong heat. Slices are taken best
    first, each well away from those before it. What remains, all where nothing was found, are
    slices evenly spread over the lungs (over the scan without a lung mask).
    """
    score = np.zeros(depth)
    for mask, weight in ((lesion_mask, 1.0), (_strong(heat), 0.25)):
        if mask is not None and mask.any():
            area = mask.sum(axis=(1, 2))
            score += weight * area / area.max()
    chosen: list[int] = []
    candidates = np.flatnonzero(score > 0.05 * score.max())
    gap = (np.ptp(candidates) + 1) / count if candidates.size else 0
    while gap >= 1 and len(chosen) < count:
        for index in sorted(map(int, candidates), key=lambda i: -score[i]):
            if len(chosen) < count and _distance(index, chosen) >= gap:
                chosen.append(index)
        gap /= 2
    lungs = np.flatnonzero(lung_mask.any(axis=(1, 2))) if lung_mask is not None else np.array([])
    low, high = (lungs[0], lungs[-1] + 1) if lungs.size else (0, depth)
    spread = [int(low + (high - low) * (i + 0.5) / count) for i in range(count)]
    for indices in (spread, range(depth)):
        while len(chosen) < count and (left := set(indices) - set(chosen)):
            chosen.append(max(sorted(left), key=lambda i: _distance(i, chosen)))
    return sorted(chosen, reverse=True)


def _distance(index: int, chosen: Sequence[int]) -> float:
    return min((abs(index - other) for other in chosen), default=math.inf)


def _strong(heat: np.ndarray | None) -> np.ndarray | None:
    return None if heat is None else heat >= 0.5


def _page(slices: int, panel_ratio: float) -> tuple[Figure, GridSpec]:
    """A figure of two rows of slices and a side column, as high as the panels' shape asks."""
    panel, head, foot = 3.0, 1.3, 1.0  # inches
    heights = 2 * panel * float(np.clip(panel_ratio, 0.6, 1.2))
    height = head + heights + 0.15 + foot
    figure = Figure(figsize=(panel * slices + 4.0, height), facecolor="white")
    grid = figure.add_gridspec(
        2,
        slices + 1,
        width_ratios=[1.0] * slices + [1.1],
        left=0.015,
        right=0.975,
        top=1 - head / height,
        bottom=foot / height,
        wspace=0.06,
        hspace=0.05,
    )
    return figure, grid


def _heat(
    probability: np.ndarray | None,
    evidence: np.ndarray | None,
    class_probabilities: Mapping[str, float] | None,
) -> tuple[np.ndarray | None, str]:
    if evidence is None:
        return probability, "lesion probability"
    if not class_probabilities:
        return evidence, "evidence_1, the finest mask;\nrelative: 1 is this scan's most"
    name = _spelled(max(class_probabilities, key=lambda k: class_probabilities[k]))
    return evidence, f"evidence_1 for {name};\nrelative: 1 is this scan's most"


def _spelled(name: str) -> str:
    """The name of a class, in words where it is short for them."""
    return SPELLED_OUT.get(name, drawn(name))


def _reading(
    window: tuple[float, float],
    lesion_mask: np.ndarray | None,
    lung_mask: np.ndarray | None,
    threshold: float | None,
    lungs: str,
) -> tuple[str, str]:
    """Two lines on how to read the picture."""
    low, high = window
    unit = " HU" if low < 0 else ""
    above = [f"black to white: {low:g} to {high:g}{unit}".replace("-", "−")]
    above.append("slices are counted from the lowest")
    below = []
    if lesion_mask is not None and threshold is not None:
        below.append(f"predicted lesion: probability at least {threshold:g}")
    if lung_mask is not None:
        below.append(f"lung mask: {lungs}")
    return "; ".join(above), "; ".join(below)


def _view(
    lung_mask: np.ndarray | None, shape: tuple[int, ...], spacing_mm: Sequence[float]
) -> tuple[slice, slice]:
    """The rows and columns of the lungs and 15 mm round them; all of them without a lung mask."""
    if lung_mask is None or not lung_mask.any():
        return slice(0, shape[1]), slice(0, shape[2])
    view = []
    for axis in (1, 2):
        inside = np.flatnonzero(lung_mask.any(axis=(0, 3 - axis)))
        margin = round(15 / spacing_mm[axis])
        view.append(slice(max(inside[0] - margin, 0), min(inside[-1] + margin + 1, shape[axis])))
    return view[0], view[1]


def _draw_ct(axes: Axes, plane: np.ndarray, aspect: float, window: tuple[float, float]) -> None:
    low, high = window
    axes.imshow(plane, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="bilinear")
    axes.set_axis_off()


def _draw_heat(axes: Axes, plane: np.ndarray | None) -> None:
    if plane is not None:
        colours, aspect = _heat_colours(), axes.get_aspect()
        axes.imshow(plane, cmap=colours, vmin=0, vmax=1, aspect=aspect, interpolation="bilinear")


def _draw_coronal(
    axes: Axes,
    values_hu: np.ndarray,
    heat: np.ndarray | None,
    lesion_mask: np.ndarray | None,
    lung_mask: np.ndarray | None,
    columns: slice,
    spacing_mm: Sequence[float],
    window: tuple[float, float],
) -> None:
    """The row with most lesion, else most strong heat, else most lung; head up."""
    row = values_hu.shape[1] // 2
    for mask in (lesion_mask, _strong(heat), lung_mask):
        if mask is not None and mask.any():
            row = int(mask.sum(axis=(0, 2)).argmax())
            break
    _draw_ct(axes, values_hu[:, row, columns], spacing_mm[0] / spacing_mm[2], window)
    _outline(axes, _at(lesion_mask, (slice(None), row, columns)), PREDICTED)
    axes.invert_yaxis()


def draw_probabilities(
    axes: Axes,
    class_probabilities: Mapping[str, float] | None,
    values: Mapping[str, float] | None = None,
) -> None:
    """A bar for each class, with its probability; or the values, where there are no classes."""
    if not class_probabilities:
        lines = [f"{drawn(name)}  {value:.4g}" for name, value in (values or {}).items()]
        said = "\n".join(lines) or "no diagnosis\n(segmentation only)"
        axes.set_axis_off()
        axes.text(0.5, 0.5, said, ha="center", va="center", fontsize=12)
        return
    names = list(class_probabilities)
    best = max(names, key=lambda name: class_probabilities[name])
    places = np.arange(len(names))[::-1]
    for place, name in zip(places, names, strict=True):
        probability = class_probabilities[name]
        axes.barh(place, 1.0, color="#EEEEEE", height=0.36)
        axes.barh(place, probability, color="#0072B2" if name == best else MUTED, height=0.36)
        said = _spelled(name)
        axes.text(0, place + 0.24, said, fontsize=12 if len(said) < 22 else 10, va="bottom")
        share = f"{100 * probability:.1f} %"
        axes.text(1, place + 0.24, share, fontsize=12, va="bottom", ha="right")
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.4, len(names) - 0.2)
    axes.set_title("probability of each class", fontsize=12)
    axes.set_axis_off()


def _outline(axes: Axes, plane: np.ndarray | None, colour: str, *, dashed: bool = False) -> None:
    if plane is not None and plane.any():
        # a closed line also where the mask touches the edge of the view
        padded = np.pad(plane.astype(np.float32), 1)
        x, y = np.arange(-1, plane.shape[1] + 1), np.arange(-1, plane.shape[0] + 1)
        style = "dashed" if dashed else "solid"
        axes.contour(x, y, padded, [0.5], colors=colour, linewidths=1.4, linestyles=style)


def _letter(axes: Axes, x: float, letter: str) -> None:
    axes.text(
        x,
        0.5,
        letter,
        transform=axes.transAxes,
        color="white",
        fontsize=12,
        fontweight="bold",
        ha="center",
        va="center",
        path_effects=[withStroke(linewidth=2.5, foreground="black")],
    )


def _legend(figure: Figure, lesion_mask: np.ndarray | None, truth: np.ndarray | None) -> None:
    lines = []
    if lesion_mask is not None:
        lines.append(Line2D([], [], color=PREDICTED, linewidth=2, label="predicted lesion"))
    if truth is not None:
        lines.append(
            Line2D([], [], color=TRUE, linewidth=2, linestyle="dashed", label="true lesion")
        )
    if lines:
        figure.legend(
            handles=lines,
            loc="center right",
            bbox_to_anchor=(0.99, 1 - 0.68 / figure.get_figheight()),
            ncols=2,
            fontsize=12,
            frameon=False,
        )


def _colour_bar(figure: Figure, name: str) -> None:
    height = figure.get_figheight()
    axes = figure.add_axes((0.23, 0.52 / height, 0.32, 0.17 / height), facecolor="#404040")
    ramp = np.linspace(0, 1, 256)[None]
    axes.imshow(ramp, cmap=_heat_colours(), aspect="auto", extent=(0, 1, 0, 1))
    axes.set_yticks([])
    axes.set_xticks([0, 0.5, 1])
    axes.tick_params(labelsize=11)
    axes.text(-0.02, 0.5, name, ha="right", va="center", fontsize=10)


def _heat_colours() -> Colormap:
    """Viridis, seen through where it is low."""
    colours = ScalarMappable(cmap="viridis").to_rgba(np.linspace(0, 1, 256))
    colours[:, 3] = 0.75 * np.clip((np.linspace(0, 1, 256) - 0.1) / 0.4, 0, 1)
    return ListedColormap(colours)


def _volumes(
    lesion_mask: np.ndarray | None,
    truth: np.ndarray | None,
    lung_mask: np.ndarray | None,
    spacing_mm: Sequence[float],
) -> str:
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    parts = []
    for name, mask in (("predicted lesions", lesion_mask), ("true lesions", truth)):
        if mask is None:
            continue
        part = f"{name} {np.count_nonzero(mask) * voxel_ml:.1f} ml" if mask.any() else f"no {name}"
        if mask.any() and lung_mask is not None and lung_mask.any():
            part += f" ({100 * np.count_nonzero(mask & lung_mask) / lung_mask.sum():.1f} % of lung)"
        parts.append(part)
    return "; ".join(parts)


def _at(array: np.ndarray | None, index: tuple) -> np.ndarray | None:
    return None if array is None else array[index]
