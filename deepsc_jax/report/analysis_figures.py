"""Figures of lesions in the manner of the paper's Fig. 1(d) to (i), as SVG.

Dotted lines and hollow marks are the paper's numbers, where it has some of a class.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d.axes3d import Axes3D

from deepsc_jax.metrics.cohort import FIGURES, LVR_GROUPS, PAPERS_GROUP, Cohort
from deepsc_jax.metrics.findings import HU_EDGES, PERIPHERY_MM, THICKNESSES_MM
from deepsc_jax.report.evaluation_figures import STYLES, short, source
from deepsc_jax.runtime.types import JsonObject

Classes = Mapping[str, Cohort]
MOST_LESIONS = 10  # of a scan, in its histogram; more are counted there
SHOWN_LESIONS = 372  # in the scatter: as many as the paper's
LVR_BINS = np.arange(0, 41, 2)  # percent; above the last all are in it


def lesion_counts(classes: Classes) -> str:
    """(d) How many lesions scans have, as an address for `src`."""
    figure, axes = _axes("lesions in a scan", "share of scans")
    numbers = np.arange(1, MOST_LESIONS + 1)
    for place, name, scans, colour in _each(classes):
        shares = [np.mean(np.minimum(scans.counts, MOST_LESIONS) == n) for n in numbers]
        axes.bar(numbers + place, shares, _width(classes), color=colour, label=short(name))
        _papers_line(axes, "count", name, colour)
    axes.set_xticks(numbers, [*map(str, numbers[:-1]), f"{MOST_LESIONS}+"])
    return source(figure, axes, "upper right")


def lesion_sizes(classes: Classes) -> str:
    """(e) Width, length and height of lesions, drawn at random, as an address for `src`."""
    figure = Figure(figsize=(4.6, 4.2), facecolor="white")
    axes = figure.add_subplot(projection="3d")
    assert isinstance(axes, Axes3D)
    rng = np.random.default_rng(0)
    sizes = [np.concatenate(scans.sizes_mm) for scans in classes.values()]
    of_class = np.repeat(np.arange(len(sizes)), [len(each) for each in sizes])
    chosen = rng.permutation(len(of_class))[:SHOWN_LESIONS]
    pooled = np.concatenate(sizes)[chosen]
    for index, name in enumerate(classes):
        height, length, width = pooled[of_class[chosen] == index].T
        colour, _, mark = STYLES[index % len(STYLES)]
        axes.plot(width, length, height, mark, color=colour, markersize=3.5, label=short(name))
    axes.set(xlabel="width, mm", ylabel="length, mm", zlabel="height, mm")
    axes.view_init(20, -55)
    # Or the label of heights is cut. Its annotation says a whole number.
    axes.set_box_aspect(None, zoom=0.85)  # pyright: ignore[reportArgumentType]
    return source(figure, axes, "upper left")


def hu_distribution(classes: Classes) -> str:
    """(f) The distribution of the lesions' values, as an address for `src`."""
    figure, axes = _axes("CT value, HU", "share of lesion volume in 20 HU")
    middles = (HU_EDGES[:-1] + HU_EDGES[1:]) / 2
    for index, (name, scans) in enumerate(classes.items()):
        if scans.hu_ml is None:
            continue
        colour, line, _ = STYLES[index % len(STYLES)]
        pooled = scans.hu_ml.sum(axis=0)
        axes.plot(middles, pooled / pooled.sum(), color=colour, linestyle=line, label=short(name))
    return source(figure, axes, "upper right")


def lesion_volume_ratios(classes: Classes) -> str:
    """(g) The lesion volume ratios of scans, as an address for `src`."""
    figure, axes = _axes("lesion volume ratio, %", "share of scans")
    low = LVR_BINS[:-1]
    for place, name, scans, colour in _each(classes):
        percent = np.clip(scans.lvr * 100, 0, LVR_BINS[-1] - 1e-9)
        shares = np.histogram(percent, LVR_BINS)[0] / scans.scans
        axes.bar(low + 1 + 2 * place, shares, 2 * _width(classes), color=colour, label=short(name))
        _papers_line(axes, "lvr", name, colour, scale=100)
    return source(figure, axes, "upper right")


def spread_by_ratio(classes: Classes, document: JsonObject) -> str:
    """(h) The spread of lesions' centres by LVR group, as an address for `src`."""
    figure, axes = _axes("lesion volume ratio, %", "spread of lesions, mm")
    keys = [f"{low}-{high}" for low, high in LVR_GROUPS]
    places = np.arange(len(keys))
    for place, name, _, colour in _each(classes):
        groups = document["classes"][name]["spread_by_lvr_percent"]
        known = [i for i, key in enumerate(keys) if groups[key]["value"] is not None]
        values = np.array([groups[keys[i]]["value"] for i in known])
        ends = np.array([[groups[keys[i]][end] for end in ("low", "high")] for i in known], float)
        reach = np.abs(ends.reshape(-1, 2).T - values)
        at = places[known] + place
        axes.bar(at, values, _width(classes), color=colour, label=short(name))
        axes.errorbar(at, values, reach, fmt="none", ecolor="k", elinewidth=0.8, capsize=2)
        if said := FIGURES["spread_4_6"].paper.get(name.lower()):
            x = places[LVR_GROUPS.index(PAPERS_GROUP)] + place
            axes.plot(x, float(said), "D", color="k", mfc="white", markersize=6)
    last = f"≥ {LVR_GROUPS[-1][0]}"
    axes.set_xticks(places, [*(key.replace("-", "–") for key in keys[:-1]), last])
    return source(figure, axes, "upper left")


def peripheral_ratios(classes: Classes, document: JsonObject) -> str:
    """(i) The peripheral lesion ratio by peripheral thickness, as an address for `src`."""
    figure, axes = _axes("peripheral thickness, mm", "peripheral lesion ratio")
    for index, name in enumerate(classes):
        colour, line, _ = STYLES[index % len(STYLES)]
        curve = document["classes"][name]["plr_by_thickness_mm"]
        middle, low, high = ([point[key] for point in curve] for key in ("value", "low", "high"))
        axes.fill_between(THICKNESSES_MM, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(THICKNESSES_MM, middle, color=colour, linestyle=line, label=short(name))
        if said := FIGURES["plr"].paper.get(name.lower()):
            axes.axhline(float(said), color=colour, linestyle=":", linewidth=1.2)
    axes.axvline(PERIPHERY_MM, color="#8c8c8c", linewidth=0.8)
    axes.set_ylim(0, 1.02)
    return source(figure, axes, "lower right")


def _each(classes: Classes) -> Iterator[tuple[float, str, Cohort, str]]:
    """Of each class: by how much its bars lie beside their place, its scans and its colour."""
    for index, (name, scans) in enumerate(classes.items()):
        beside = (index - (len(classes) - 1) / 2) * _width(classes)
        yield beside, name, scans, str(STYLES[index % len(STYLES)][0])


def _width(classes: Sequence[str] | Classes) -> float:
    return 0.8 / len(classes)


def _papers_line(axes: Axes, key: str, name: str, colour: str, scale: float = 1) -> None:
    if said := FIGURES[key].paper.get(name.lower()):
        axes.axvline(float(said) * scale, color=colour, linestyle=":", linewidth=1.5)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 4.2), facecolor="white")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(alpha=0.3, axis="y")
    return figure, axes
