"""A train step's time against voxels, channels, scans and devices: measured, fitted and drawn."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from deepsc_jax.benchmarking import jobs, scaling
from deepsc_jax.benchmarking.jobs import Job
from deepsc_jax.benchmarking.measure import Measured, measure
from deepsc_jax.errors import InputError
from deepsc_jax.report.figures import save_png

AXES = {
    "voxels": "voxels of a tile",
    "channels": "channels of the inception block",
    "scans": "scans in a batch",
    "devices": "devices, of one batch",
}
COLOURS = {"ours": "#0072B2", "torch": "#D55E00"}
DEVICE = ("device", "platform", "compute_dtype")  # of a worker's environment
Curve = dict[str, Any]
Beside = Callable[[Job, bool], list[Measured]]


def scaling_rows(job: Job, devices: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Weak and strong scaling of a train step over `devices`, each a run of its own."""
    kinds = {"weak": True, "strong": False}
    try:
        placed = {
            kind: [scaling.on_devices(job, count, weak=weak) for count in devices]
            for kind, weak in kinds.items()
        }
    except ValueError as error:
        raise InputError(f"--devices={','.join(map(str, devices))}: {error}") from error
    rows = []
    for kind, weak in kinds.items():
        found = _side_by_side(placed[kind], repeats)
        seconds = [one.times.median for one in found]
        shares = scaling.efficiency(devices, seconds, weak=weak)
        for one, count, share in zip(found, devices, shares, strict=True):
            scans, _ = jobs.counts(one.job)
            rows.append(
                {
                    "scaling": kind,
                    "work": job.work,
                    "devices": count,
                    "batch": scans,
                    "ours_s": one.times.median,
                    "ours_min_s": one.times.low,
                    "ours_max_s": one.times.high,
                    "scans_per_s": scans / one.times.median,
                    "efficiency": share,
                    "repeats": repeats,
                    **{name: one.environment[name] for name in DEVICE},
                }
            )
    return rows


def _side_by_side(placed: Sequence[Job], repeats: int) -> list[Measured]:
    with tempfile.TemporaryDirectory() as folder:
        apart = []
        for number, job in enumerate(placed):
            place = pathlib.Path(folder, str(number))
            place.mkdir()
            apart.append(dataclasses.replace(job, folder=place))
        return measure(apart, repeats)[0]


def curves(job: Job, quantities: Sequence[str], devices: Sequence[int], beside: Beside) -> list:
    """For every quantity and side, `sizes`, `seconds` and the `exponent` of their growth.

    Args:
      job: the train step to vary.
      quantities: of `scaling.QUANTITIES`.
      devices: the numbers of devices.
      beside: measures a job and, where it is told to, its peers; of those the fastest counts.
    """
    found = []
    for quantity in quantities:
        try:
            points = scaling.points(job, quantity, devices)
        except ValueError as error:
            raise InputError(f"--growth={quantity}: {error}: give another configuration") from error
        seconds: dict[str, dict[int, float]] = {}
        for size, point in points:
            ours, *peers = beside(point, quantity != "devices")  # torch has the one
            seconds.setdefault("ours", {})[size] = ours.times.median
            if peers:  # a variant that cannot be built is left out
                best = min(peer.times.median for peer in peers)
                seconds.setdefault("torch", {})[size] = best
        for side, values in seconds.items():
            sizes, times = list(values), list(values.values())
            curve = {"quantity": quantity, "side": side, "sizes": sizes, "seconds": times}
            if len(sizes) > 1:
                found.append(curve | {"exponent": scaling.exponent(sizes, times)})
    return found


def draw(found: Sequence[Curve], work: str, path: pathlib.Path) -> None:
    """Write a PNG with a panel for every quantity, both axes logarithmic."""
    quantities = list(dict.fromkeys(curve["quantity"] for curve in found))
    columns = min(len(quantities), 2)
    lines = -(-len(quantities) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * lines), facecolor="white")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in panels[len(quantities) :]:
        axes.remove()
    for axes, quantity in zip(panels, quantities, strict=False):
        exponents, drawn = [], [curve for curve in found if curve["quantity"] == quantity]
        for curve in drawn:
            side = curve["side"]
            colour = COLOURS[side]
            axes.plot(curve["sizes"], curve["seconds"], "o-", color=colour, label=side)
            exponents.append(f"{side} {curve['exponent']:.2f}")
        axes.set_title(f"{quantity}: exponent {', '.join(exponents)}", fontsize=12)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        sizes = sorted({size for curve in drawn for size in curve["sizes"]})
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(AXES[quantity], fontsize=11)
        axes.set_ylabel("seconds a step", fontsize=11)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(f"{work}: median time of a step", fontsize=13)
    figure.tight_layout()
    save_png(figure, path)
