"""A train step's time against voxels, channels, scans and devices: measured, fitted and drawn."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from deepsc_jax.benchmarking import jobs, scaling
from deepsc_jax.benchmarking.jobs import Job
from deepsc_jax.benchmarking.measure import Measured, measure
from deepsc_jax.report.figures import save_png
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import JsonObject

AXES = {
    "voxels": "voxels of a tile",
    "channels": "channels, in multiples",
    "scans": "scans in a batch",
    "devices": "devices, of one batch",
}
COLOURS = {"ours": "#0072B2", "torch": "#D55E00"}
DEVICE = ("device", "platform", "compute_dtype")  # of a worker's environment
Beside = Callable[[Job, bool], list[Measured]]


class Curve(TypedDict):
    """How the time of one side's step grows with a quantity."""

    quantity: str
    side: str
    sizes: list[int]
    seconds: list[float]  # medians
    least_s: list[float]
    greatest_s: list[float]
    names: list[str]  # of what was measured: of peers the fastest
    exponent: float


def scaling_rows(
    job: Job, devices: Sequence[int], repeats: int, tell: Callable[[str], None]
) -> list[JsonObject]:
    """Weak and strong scaling of a train step over `devices`, each a run of its own.

    `tell` is told how far it is.
    """
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
        tell(f"{job.title}, {kind} scaling: on {', '.join(map(str, devices))} devices")
        measured = _side_by_side(placed[kind], repeats, tell)
        seconds = [one.times.median for one in measured]
        shares = scaling.efficiency(devices, seconds, weak=weak)
        for one, count, share in zip(measured, devices, shares, strict=True):
            scans, _ = jobs.counts(one.job)
            rows.append(
                {
                    "scaling": kind,
                    "work": job.title,
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


def _side_by_side(
    placed: Sequence[Job], repeats: int, tell: Callable[[str], None]
) -> list[Measured]:
    with tempfile.TemporaryDirectory() as folder:
        apart = []
        for number, job in enumerate(placed):
            place = pathlib.Path(folder, str(number))
            place.mkdir()
            apart.append(dataclasses.replace(job, folder=place))
        return measure(apart, repeats, tell).measured


def curves(
    job: Job, quantities: Sequence[str], devices: Sequence[int], beside: Beside
) -> Iterator[list[Curve]]:
    """For every quantity in turn, a curve for each side.

    Args:
      job: the train step to vary.
      quantities: of `scaling.QUANTITIES`.
      devices: the numbers of devices.
      beside: measures a job and, where it is told to, its peers.

    Raises:
      InputError: before anything is measured, for a quantity that cannot be varied.
    """
    points = {}
    for quantity in quantities:
        try:
            points[quantity] = scaling.points(job, quantity, devices)
        except ValueError as error:
            raise InputError(f"--growth={quantity}: {error}: give another configuration") from error
        if len(points[quantity]) < 2:
            raise InputError(f"--growth={quantity}: one number of --devices: give two or more")
    return (_curves(quantity, points[quantity], beside) for quantity in points)


def _curves(quantity: str, points: Sequence[tuple[int, Job]], beside: Beside) -> list[Curve]:
    measured: dict[str, dict[int, Measured]] = {}
    for size, point in points:
        ours, *peers = beside(point, quantity != "devices")  # torch has the one
        measured.setdefault("ours", {})[size] = ours
        if peers:  # a variant that cannot be built is left out
            best = min(peers, key=lambda peer: peer.times.median)
            measured.setdefault("torch", {})[size] = best
    drawn = []
    for side, by_size in measured.items():
        sizes, times = list(by_size), [one.times for one in by_size.values()]
        if len(sizes) > 1:
            seconds = [one.median for one in times]
            curve: Curve = {
                "quantity": quantity,
                "side": side,
                "sizes": sizes,
                "seconds": seconds,
                "least_s": [one.low for one in times],
                "greatest_s": [one.high for one in times],
                "names": [one.job.name for one in by_size.values()],
                "exponent": scaling.exponent(sizes, seconds),
            }
            drawn.append(curve)
    return drawn


def draw(measured: Sequence[Curve], work: str, path: pathlib.Path) -> None:
    """Write a PNG with a panel for every quantity, both axes logarithmic."""
    quantities = list(dict.fromkeys(curve["quantity"] for curve in measured))
    columns = min(len(quantities), 2)
    lines = -(-len(quantities) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * lines), facecolor="white")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in panels[len(quantities) :]:
        axes.remove()
    for axes, quantity in zip(panels, quantities, strict=False):
        exponents, drawn = [], [curve for curve in measured if curve["quantity"] == quantity]
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
