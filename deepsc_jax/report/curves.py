"""The loss and validation curves of a training run."""

import json
import os
import pathlib

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from deepsc_jax.report.figures import drawn, save_png
from deepsc_jax.runtime.errors import InputError

LOSS_TERMS = {  # key in metrics.jsonl: (name, colour)
    "loss": ("loss", "black"),
    "dice": ("Dice", "#0072B2"),
    "focal": ("focal", "#56B4E9"),
    "cross_entropy": ("cross-entropy", "#D55E00"),
    "task_aware": ("task-aware", "#CC79A7"),
}
VALIDATION = {
    "validation_dsc": ("DSC", "#009E73"),
    "validation_auc": ("macro AUC", "#0072B2"),
    "validation_accuracy": ("accuracy", "#E69F00"),
}


def loss_curves(path: str | os.PathLike[str], metrics_jsonl: str | os.PathLike[str]) -> None:
    """Writes a PNG of the losses and validation figures of every stage of a training run.

    Args:
        path: of the PNG; it appears whole or not at all.
        metrics_jsonl: what training wrote: lines of {"stage", "step", "loss", its terms, …} and
            {"stage", "step", "validation_…"}. A last line cut short is left out; of two lines of
            one step the later counts.

    Raises:
        InputError: the file does not exist, holds a line that is not JSON, or no loss at all.
    """
    stages = _read_curves(pathlib.Path(metrics_jsonl))
    figure = Figure(figsize=(4.6 * len(stages) + 1.8, 6.6), facecolor="white")
    panels = figure.subplots(2, len(stages), sharex="col", squeeze=False)
    for column, (stage, curves) in enumerate(stages.items()):
        losses, validation = panels[:, column]
        losses.set_title(drawn(stage), fontsize=14, fontweight="bold")
        for key, (name, colour) in LOSS_TERMS.items():
            if key in curves:
                _draw_curve(losses, *curves[key], name, colour, 2.2 if key == "loss" else 1.3)
        losses.set_yscale("log")
        losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        losses.yaxis.set_major_formatter("{x:g}")
        losses.yaxis.set_minor_formatter(NullFormatter())
        for key, (name, colour) in VALIDATION.items():
            if key in curves:
                validation.plot(*curves[key], "o-", color=colour, markersize=4, label=name)
        validation.set_ylim(-0.03, 1.03)
        validation.set_xlabel("step", fontsize=12)
        for axes in (losses, validation):
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize=11)
    for row, name in zip(panels, ("training loss", "validation"), strict=True):
        row[0].set_ylabel(name, fontsize=12)
        lines = {line.get_label(): line for axes in row for line in axes.lines}
        shown = [line for label, line in lines.items() if not label.startswith("_")]
        if shown:
            row[-1].legend(
                handles=shown,
                fontsize=11,
                frameon=False,
                loc="center left",
                bbox_to_anchor=(1, 0.5),
            )
    figure.tight_layout()
    save_png(figure, path)


def _read_curves(path: pathlib.Path) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """{stage: {key: (steps, values)}}, stages in the order in which they began."""
    if not path.is_file():
        raise InputError(f"{path}: no such file: expected the metrics.jsonl of a training run")
    read: dict[str, dict[str, dict[int, float]]] = {}
    try:
        text = path.read_text("utf-8", "replace")  # foreign bytes are no JSON, and named as such
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check it") from error
    lines = text.removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            stage, step = record.pop("stage"), record.pop("step")
            if not isinstance(stage, str) or not isinstance(step, int):
                raise ValueError
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            if number == len(lines):
                break  # cut short when the run was stopped
            raise InputError(
                f"{path}: line {number} is {line[:60]!r}: expected JSON with a stage and a step; "
                "remove the line"
            ) from error
        for key, value in record.items():
            if isinstance(value, int | float):
                read.setdefault(stage, {}).setdefault(key, {})[step] = value
    if not any("loss" in curves for curves in read.values()):
        raise InputError(f"{path}: holds no loss: expected the metrics.jsonl of a training run")
    return {
        stage: {
            key: (sorted(points), [points[step] for step in sorted(points)])
            for key, points in curves.items()
        }
        for stage, curves in read.items()
    }


def _draw_curve(
    axes: Axes, steps: list[int], values: list[float], name: str, colour: str, width: float
) -> None:
    """The values, faint, and their running mean over a fortieth of the run."""
    span = max(len(values) // 40, 1)
    if span > 1:
        axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
    total = np.cumsum(np.concatenate([[0.0], values]))
    starts = np.maximum(np.arange(len(values)) + 1 - span, 0)
    ends = np.arange(len(values)) + 1
    axes.plot(
        steps,
        (total[ends] - total[starts]) / (ends - starts),
        color=colour,
        linewidth=width,
        label=name,
    )
